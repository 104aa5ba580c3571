"""Sets that are known by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits

from fastdcgan.data import NAMES, Dataset, default_cache_dir
from fastdcgan.data.check import check
from fastdcgan.data.embedded import with_channels
from fastdcgan.data.named import KNOWN, resized
from fastdcgan.errors import UserError


def test_digits(opened: Callable[..., Dataset]) -> None:
    digits = opened("digits", image_size=(32, 32))
    assert (digits.name, digits.count, digits.channels, digits.flip) == ("digits", 1797, 1, False)
    assert digits.class_names == [str(digit) for digit in range(10)]
    assert digits.labels is not None
    assert len(digits.labels) == 1797
    images = digits.take(range(1797))
    assert images.shape == (1797, 32, 32, 1)
    assert images.min() == 0
    assert images.max() == 255
    scikit_learns = load_digits()
    assert list(digits.labels) == scikit_learns.target.tolist()
    eighths = torch.from_numpy(scikit_learns.images) * (255 / 16)
    assert (opened("digits", image_size=(8, 8)).take(range(1797))[..., 0] - eighths).abs().max() <= 0.5
    by_class = [images[[i for i, label in enumerate(digits.labels) if label == digit]].float() for digit in (0, 1)]
    centre = [found[:, 14:18, 14:18].mean() for found in by_class]
    assert centre[1] > centre[0] + 100  # a one is inked where a zero is empty
    assert opened("digits", channels=3).take([0]).shape == (1, 16, 16, 3)


def test_fake_pictures_come_from_the_seed(opened: Callable[..., Dataset]) -> None:
    first, again, other = (opened("fake", seed=seed) for seed in (0, 0, 1))
    assert (first.channels, first.flip, first.count) == (3, True, 4096)
    assert torch.equal(first.take(range(50)), again.take(range(50)))
    assert not torch.equal(first.take(range(50)), other.take(range(50)))
    assert first.class_names == ["disc", "square", "ring"]


def test_the_order_of_a_named_set_comes_from_the_seed(opened: Callable[..., Dataset]) -> None:
    orders = []
    for seed in (0, 0, 1):
        stream = opened("digits", seed=seed).stream(64)
        stream.advance()
        orders.append(stream.index.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_every_name_is_known() -> None:
    assert set(KNOWN) == set(NAMES) - {"digits", "fake"}
    for known in KNOWN.values():
        assert hasattr(torchvision.datasets, known.torchvision_name)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_download_that_fails_says_what_to_put_where(
    name: str, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>\nand more")

    monkeypatch.setattr(torchvision.datasets, KNOWN[name].torchvision_name, fail)
    with pytest.raises(UserError, match=f"{name} cannot be downloaded .*put .* into {default_cache_dir()}") as raised:
        opened(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape", "channels"),
    [
        ("mnist", (20, 28, 28), 1),
        ("fashion-mnist", (20, 28, 28), 1),
        ("cifar10", (20, 32, 32, 3), 3),
        ("svhn", (20, 3, 32, 32), 3),
    ],
)
def test_downloaded_arrays_become_images(
    name: str, shape: tuple[int, ...], channels: int, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = SimpleNamespace(data=pixels, targets=list(range(20)), labels=np.arange(20))

    def make(folder: str, *, download: bool, **share: object) -> SimpleNamespace:
        assert share == ({"split": "train"} if name == "svhn" else {"train": True}), "not what tests are made with"
        return found

    monkeypatch.setattr(torchvision.datasets, KNOWN[name].torchvision_name, make)
    data = opened(name, image_size=shape[1:3] if shape[-1] in (28, 3) else shape[2:])
    assert (data.count, data.channels, data.labels) == (20, channels, list(range(20)))
    assert data.flip == (name == "cifar10")
    as_nhwc = pixels.transpose(0, 2, 3, 1) if name == "svhn" else pixels.reshape(20, *shape[1:3], channels)
    assert torch.equal(data.take(range(20)), torch.from_numpy(as_nhwc.copy()))
    stream = data.stream(8)
    stream.advance()
    assert stream.source[stream.index].shape == as_nhwc[:8].shape


def test_resizing_crops_to_the_proportions() -> None:
    pictures = np.zeros((3, 20, 40, 3), np.uint8)
    pictures[:, :, 10:30] = 200  # the square in the middle
    assert (resized(pictures, (10, 10), 3) == 200).all()
    assert resized(pictures, (10, 20), 1).shape == (3, 10, 20, 1)


def test_channels_of_arrays() -> None:
    colour = np.array([[[[255, 0, 0], [0, 255, 0]]]], np.uint8)
    assert with_channels(colour, 1).ravel().tolist() == [76, 150]
    assert with_channels(colour, 4)[..., 3].min() == 255
    assert with_channels(with_channels(colour, 1), 3).shape == (1, 1, 2, 3)


def test_there_is_nothing_to_check_about_names() -> None:
    with pytest.raises(UserError, match="digits is known to be sound"):
        check("digits")
