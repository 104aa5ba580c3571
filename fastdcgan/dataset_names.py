"""The data sets that go by a name; any other DATA is a path. For what runs without the command line's packages too."""

NAMES = ("digits", "fake", "mnist", "fashion-mnist", "cifar10", "svhn", "celeba")
