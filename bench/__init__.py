"""How fast fastdcgan is, against what, and how far from what the hardware allows; imported as `fastdcgan.bench`."""
