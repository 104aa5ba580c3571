"""The data sets that go by a name; any other DATA is a path. A file of its own, which `data/` reads without
the command line's packages."""

NAMES = ("digits", "fake", "mnist", "fashion-mnist", "cifar10", "svhn", "celeba")
