"""Sets that need no files: scikit-learn's handwritten digits, and coloured shapes drawn from a seed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

FAKE_COUNT = 4096
SHAPES = ["disc", "square", "ring"]


def digits(image_size: tuple[int, int], channels: int) -> tuple[NDArray[np.uint8], list[int], list[str]]:
    """1,797 handwritten digits of 8x8 pixels, enlarged: (uint8 (1797, H, W, C), labels 0..9, class names)."""
    # As sklearn.datasets.load_digits does, but for importing scikit-learn, which takes longer than all else here.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    table = np.loadtxt(
        Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", np.float32, delimiter=","
    )
    small = torch.from_numpy(table[:, :64]).view(-1, 1, 8, 8) * (255 / 16)  # values 0..16
    large = torch.nn.functional.interpolate(small, image_size, mode="bicubic", align_corners=False)
    grey = large.round().clamp(0, 255).to(torch.uint8)[:, 0, :, :, None].numpy()
    return with_channels(grey, channels), table[:, 64].astype(int).tolist(), [str(digit) for digit in range(10)]


def fake(image_size: tuple[int, int], channels: int, seed: int) -> tuple[NDArray[np.uint8], list[int], list[str]]:
    """4,096 discs, squares and rings in plain colours on plain grounds: learnable, the same for the same seed."""
    height, width = image_size
    random = np.random.default_rng(seed)
    kind = random.integers(0, len(SHAPES), FAKE_COUNT)
    centre = random.uniform(0.35, 0.65, (FAKE_COUNT, 2)) * (height, width)
    radius = random.uniform(0.15, 0.33, FAKE_COUNT) * min(height, width)
    ground = random.integers(0, 100, (FAKE_COUNT, 3))
    colour = random.integers(120, 256, (FAKE_COUNT, 3))
    images = np.empty((FAKE_COUNT, height, width, 3), dtype=np.uint8)
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    for i in range(FAKE_COUNT):
        dy, dx = rows - centre[i, 0], columns - centre[i, 1]
        distance = np.maximum(abs(dy), abs(dx)) if SHAPES[kind[i]] == "square" else np.hypot(dy, dx)
        inside = np.clip(radius[i] - distance + 0.5, 0, 1)  # antialiased edge
        if SHAPES[kind[i]] == "ring":
            inside *= np.clip(distance - 0.55 * radius[i] + 0.5, 0, 1)
        images[i] = np.rint(ground[i] + inside[..., None] * (colour[i] - ground[i]))
    return with_channels(images, channels), kind.tolist(), SHAPES


def with_channels(images: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """uint8 (n, H, W, 1 or 3) -> (n, H, W, channels): luma for 1, grey repeated for 3, opaque alpha added for 4."""
    if channels == images.shape[3]:
        return np.ascontiguousarray(images)
    if channels == 1:
        return np.rint(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    colour = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
    if channels == 3:
        return np.ascontiguousarray(colour)
    return np.concatenate([colour, np.full_like(colour[..., :1], 255)], axis=3)
