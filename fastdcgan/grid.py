"""Many pictures as one."""

from __future__ import annotations

import io
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from fastdcgan.files import replace_file
from fastdcgan.pixels import as_picture, to_uint8

GRID = 64  # pictures in a grid
GAP = 2  # pixels between them


def save_grid(images: Tensor, path: Path) -> Tensor:
    """Save images (N, C, H, W) in -1..1 as one PNG, laid out as by `grid`; returns it, uint8 (C, height, width)."""
    pixels, buffer = to_uint8(grid(images.detach().float().cpu())), io.BytesIO()
    as_picture(pixels).save(buffer, "PNG")
    replace_file(path, buffer.getvalue())
    return pixels


def grid(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in -1..1 in rows, about as wide as high, with white lines around each: (C, height, width).
    A single one has none.

    As torchvision's `make_grid` has it, which imports the compiler: a run without it starts two seconds sooner.
    """
    count, channels, height, width = images.shape
    if count == 1:
        return images[0]
    columns = min(count, max(1, round((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    cells = images.new_ones(rows * columns, channels, height + GAP, width + GAP)
    cells[:count, :, GAP:, GAP:] = images
    lines = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return pad(lines.flatten(3, 4).flatten(1, 2), (0, GAP, 0, GAP), value=1.0)
