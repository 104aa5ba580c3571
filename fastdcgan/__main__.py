from fastdcgan.cli import main

main()
