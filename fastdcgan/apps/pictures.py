"""Pictures in and out: files to tensors of the size a run draws, tensors to files that are whole or not there."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastdcgan import heic
from fastdcgan.errors import UserError, first_line
from fastdcgan.files import LONGEST, replace_file, short, target
from fastdcgan.models import AnyGenerator
from fastdcgan.pixels import as_picture, in_8_bits, to_uint8, upright, without_range

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
KINDS = {1: "grey", 3: "colour", 4: "colour with transparency"}
CELL = 96  # pixels: smaller pictures are enlarged in sheets made to be looked at
GAP = 2
HEADING = 20
ROOM = 25  # bytes of a result's name, for a number and .safetensors


def open_picture(path: Path) -> Image.Image:
    """The picture in a file, turned as its camera says, in mode L, RGB or RGBA.

    Raises:
        UserError: no such file, or not a picture, or a damaged one.
    """
    try:
        with Image.open(path) as file:
            why = without_range(file)
            file.load()
            picture = upright(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a picture") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = ""
        if isinstance(error, UnidentifiedImageError):
            with suppress(OSError), open(path, "rb") as stream:
                reason = heic.why_unread(stream.read(heic.LOOKED_AT))
        raise UserError(f"{path} is not a picture that can be read: {reason or first_line(error)}") from None
    if why:
        raise UserError(f"{path} has {why}")
    picture = in_8_bits(picture, file)
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def read_pictures(paths: Sequence[Path], generator: AnyGenerator, fit: bool) -> Tensor:
    """Pictures from files, as the generator draws them: (N, C, H, W) in -1..1.

    Args:
        fit: crop, resize and convert what has another size or another number of channels.

    Raises:
        UserError: no files, one that cannot be read, or one that does not fit without `fit`.
    """
    if not paths:
        raise UserError("there is no picture to work on: name at least one image file after the run")
    height, width = generator.image_size
    channels = generator.channels
    pictures = []
    for path in paths:
        picture = open_picture(path)
        found = len(picture.getbands())
        if not fit and picture.size != (width, height):
            raise UserError(
                f"{path} is {picture.width}x{picture.height}, and this run draws {width}x{height}:"
                " add --fit to crop and resize it"
            )
        if not fit and found != channels:
            raise UserError(
                f"{path} is {KINDS[found]}, and this run draws {KINDS[channels]} pictures: add --fit to convert it"
            )
        pictures.append(to_tensor(fitted(picture, (width, height), channels)))
    return torch.stack(pictures)


def fitted(picture: Image.Image, size: tuple[int, int], channels: int) -> Image.Image:
    """The centre of a picture at (width, height), with 1, 3 or 4 channels; transparency goes on white."""
    picture = (picture if channels == 4 else opaque(picture)).convert(MODES[channels])
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def opaque(picture: Image.Image) -> Image.Image:
    """The picture in mode L or RGB; transparency goes on white."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture in mode L, RGB or RGBA -> (C, H, W) in -1..1."""
    pixels = np.array(picture, dtype=np.float32)
    return torch.from_numpy(pixels.reshape(picture.height, picture.width, -1)).permute(2, 0, 1) / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """(C, H, W) in -1..1 -> a picture in mode L, RGB or RGBA."""
    return as_picture(to_uint8(image))


def sheet(rows: Sequence[Sequence[Tensor | None]], headings: Sequence[str] = ()) -> Image.Image:
    """Images (C, H, W) in -1..1 in rows, on white; None leaves a place empty. Small ones are enlarged to be seen.

    Args:
        headings: of the columns; one that is longer than a column needs "" for the next.
    """
    first = next(image for row in rows for image in row if image is not None)
    height, width = first.shape[-2:]
    times = max(1, -(-CELL // min(height, width)))
    step_x, step_y = width * times + GAP, height * times + GAP
    columns = max(len(row) for row in rows)
    top = HEADING if headings else 0
    page = Image.new(MODES[len(first)], (columns * step_x - GAP, top + len(rows) * step_y - GAP), "white")
    for x, heading in enumerate(headings):
        ImageDraw.Draw(page).text((x * step_x + GAP, 2), heading, "black", ImageFont.load_default(14))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                picture = to_picture(image).resize((width * times, height * times), Image.Resampling.NEAREST)
                page.paste(picture, (x * step_x, top + y * step_y))
    return page


def save(content: Image.Image | bytes, path: Path) -> None:
    """Write a picture (in the format its suffix names) or bytes, whole or not at all; to where a link points.

    Raises:
        UserError: it cannot be written.
    """
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, Image.registered_extensions()[path.suffix.lower()])
        content = buffer.getvalue()
    try:
        replace_file(target(path), content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def names(paths: Sequence[Path], out: Path, also_read: Sequence[Path] = ()) -> list[str]:
    """A name in the folder `out` for what comes of each file: its stem, numbered where that is taken, shortened where
    that leaves no room for a suffix.

    Args:
        also_read: other pictures.

    Raises:
        UserError: the results would take the place of pictures that are read.
    """
    given = [path.stem if len(os.fsencode(path.stem)) <= LONGEST - ROOM else short(path.stem) for path in paths]
    stems, taken = list(given), {"sheet"}
    for i, stem in enumerate(given):
        number = i
        while stems[i] in taken or (stems[i] == stem and given.count(stem) > 1):
            stems[i], number = f"{stem}-{number}", number + 1
        taken.add(stems[i])
    read = {os.path.realpath(path) for path in [*paths, *also_read]}
    if any(os.path.realpath(out / f"{name}.png") in read for name in taken):
        raise UserError(f"--out {out} would replace pictures that are read: give another folder")
    return stems
