from fastdcgan.cli import main

if __name__ == "__main__":  # not in the processes of fastdcgan bench, which import this file
    main()
