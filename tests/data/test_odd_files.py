"""Every kind of file people have in their folders: what can be used is used, what cannot is named with its reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastdcgan import heic
from fastdcgan.data import Dataset, census, pillow_decode
from fastdcgan.data.census import Census
from fastdcgan.data.check import check
from fastdcgan.data.header import JPEG, OTHER, Glimpse, examine
from fastdcgan.errors import UserError

Encode = Callable[..., bytes]
Picture = Callable[..., Image.Image]
GOOD = 9
BLUE = (9, 90, 200)


def file_of(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated(picture: Image.Image, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise, so it is stored turned the other way
    return file_of(picture.transpose(Image.Transpose.ROTATE_90), format, quality=95, exif=exif.tobytes())


def turned_by_xmp(picture: Image.Image, format: str) -> bytes:
    """As some programs do who write no EXIF."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored = picture.transpose(Image.Transpose.ROTATE_90)
    if format == "JPEG":
        return file_of(stored, "JPEG", quality=95, xmp=xmp)
    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return file_of(stored, "PNG", pnginfo=chunks)


def exif_block(orientation: int) -> bytes:
    return b"II" + struct.pack("<HIHHHII", 42, 8, 1, 0x112, 3, 1, orientation) + bytes(4)


def app1(data: bytes) -> bytes:
    """A JPEG's segment of EXIF."""
    return b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data


def stored_turned(picture: Image.Image, format: str) -> bytes:
    return file_of(picture.transpose(Image.Transpose.ROTATE_90), format, quality=95)


def with_segments(jpeg: bytes, *segments: bytes, behind_frame: bool = False) -> bytes:
    at = 2
    if behind_frame:
        frame = jpeg.index(b"\xff\xc0")
        at = frame + 2 + int.from_bytes(jpeg[frame + 2 : frame + 4])
    return jpeg[:at] + b"".join(segments) + jpeg[at:]


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk(name, data) + png[at:]


def raw_profile(exif: bytes) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text."""
    return b"Raw profile type exif\0" + f"\nexif\n{len(exif) + 6:8}\n".encode() + (b"Exif\0\0" + exif).hex().encode()


XMP = b'<x tiff:Orientation="6"/>'
NONSENSE = b"garbage garbage garbage"


def one_clear_grey(picture: Image.Image) -> bytes:
    """16 bits a pixel, of which the left half has the one value that is transparent."""
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 7
    grey[:, : grey.shape[1] // 2] = 1000
    return with_chunk(file_of(Image.fromarray(grey), "PNG"), b"tRNS", struct.pack(">H", 1000))


def oddly_described(picture: Image.Image) -> bytes:
    """A turned JPEG whose EXIF has an entry besides of which one byte is damaged."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    data = bytearray(file_of(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif))
    data[data.index(b"\x01\x0e\x00\x02") + 1] = 0  # its description becomes a width, in words
    return bytes(data)


def half_transparent(picture: Image.Image) -> Image.Image:
    image = picture.convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, image.width // 2, image.height))
    return image


def on_white(picture: Image.Image, white: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    image = picture.copy()
    image.paste(white, (0, 0, image.width // 2, image.height))
    return image


def sixteen_bits(picture: Image.Image) -> bytes:
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 256
    return file_of(Image.fromarray(grey), "PNG")


def in_bits(values: NDArray[np.integer[Any]], bits: int) -> NDArray[np.uint8]:
    """Rows of so many bits a value, each row filled up to whole bytes."""
    single = values[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(single.astype(np.uint8).reshape(len(values), -1), axis=1)


def tiff(rows: NDArray[Any], width: int, **tags: int | tuple[int, int]) -> bytes:
    """Uncompressed; tags by number, as t258=8."""
    pixels = rows.tobytes()
    every = {256: width, 257: len(rows), 259: 1, 262: 1, 273: 8, 277: 1, 278: len(rows), 279: len(pixels)}
    entries = b""
    for tag, value in sorted((every | {int(name[1:]): value for name, value in tags.items()}).items()):
        pair = value if isinstance(value, tuple) else (value,)
        layout = "<HHIHH" if isinstance(value, tuple) else "<HHII"
        entries += struct.pack(layout, tag, 3 if isinstance(value, tuple) else 4, len(pair), *pair)
    count = len(entries) // 12
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", count) + entries + bytes(4)


def twelve_bits(picture: Image.Image) -> bytes:
    values = np.asarray(picture.convert("L")).astype(np.uint16) * 16
    return tiff(in_bits(values, 12), picture.width, t258=12)


def white_is_zero(picture: Image.Image) -> bytes:
    """Of 16 bits a pixel."""
    return tiff(65535 - np.asarray(picture.convert("L")).astype(np.uint16) * 256, picture.width, t258=16, t262=0)


def premultiplied(picture: Image.Image) -> bytes:
    """Grey, and transparent in the left half."""
    both = np.asarray(half_transparent(picture).convert("LA")).copy()
    both[:, : picture.width // 2, 0] = 0
    return tiff(both, picture.width, t258=(8, 8), t277=2, t338=1)


def few_greys(picture: Image.Image, bits: int) -> NDArray[np.uint8]:
    """(h, w): the picture in so many bits, 1 in its left half and nowhere else."""
    values = np.asarray(picture.convert("L")) >> (8 - bits)
    values = np.where(values == 1, 2, values)
    values[:, : picture.width // 2] = 1
    return values


def one_of_few_greys_is_clear(picture: Image.Image, bits: int) -> bytes:
    """A PNG of 2 or 4 bits a pixel."""
    rows = np.pad(in_bits(few_greys(picture, bits), bits), ((0, 0), (1, 0)))  # a zero before each: not filtered
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *picture.size, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">H", 1)) + pixels + chunk(b"IEND", b"")


def of_few_greys(picture: Image.Image, bits: int) -> Image.Image:
    return on_white(
        Image.fromarray((few_greys(picture, bits) * (255 // (2**bits - 1))).astype(np.uint8)).convert("RGB")
    )


def lossless_jpeg(size: tuple[int, int]) -> bytes:
    """The left half of grey 128, the right one of 200: each pixel as its difference to the one before."""
    width, height = size
    # In Huffman's code 0 is no difference and 10 one of seven bits. Of a row's first pixel it is the one to that above.
    row = "0" * (width // 2) + "10" + f"{200 - 128:07b}" + "0" * (width - width // 2 - 1)
    bits = np.array([int(bit) for bit in row * height + "1" * (-len(row) * height % 8)], np.uint8)
    codes = b"\xff\xc4" + struct.pack(">H", 21) + bytes([0, 1, 1, *bytes(14), 0, 7])
    frame = b"\xff\xc3" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0" + b"\1\0\0"
    return b"\xff\xd8" + codes + frame + scan + np.packbits(bits).tobytes() + b"\xff\xd9"


def two_greys(size: tuple[int, int]) -> Image.Image:
    return on_white(Image.new("RGB", size, (200, 200, 200)), (128, 128, 128))


def qoi(picture: Image.Image) -> bytes:
    pixels = np.pad(np.asarray(picture), ((0, 0), (0, 0), (1, 0)), constant_values=0xFE).tobytes()  # none compressed
    return b"qoif" + struct.pack(">IIBB", *picture.size, 3, 0) + pixels + bytes(7) + b"\1"


def animated(picture: Picture) -> bytes:
    return file_of(picture(5), "GIF", save_all=True, append_images=[picture(6), picture(7)])


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


# name of the file, its bytes, what it should look like
USABLE: dict[str, tuple[str, Callable[[Picture], bytes], Callable[[Picture], Image.Image]]] = {
    "grey JPEG": ("a.jpg", lambda p: file_of(p(5).convert("L"), "JPEG", quality=95), lambda p: grey(p(5))),
    "progressive JPEG": ("a.jpg", lambda p: file_of(p(5), "JPEG", progressive=True, quality=95), lambda p: p(5)),
    "CMYK JPEG": ("a.jpg", lambda p: file_of(p(5).convert("CMYK"), "JPEG", quality=95), lambda p: p(5)),
    "large JPEG": ("a.jpg", lambda p: file_of(p(5, (400, 320)), "JPEG", quality=95), lambda p: p(5)),
    "EXIF-rotated JPEG": ("a.jpg", lambda p: rotated(p(5)), lambda p: p(5)),
    "large EXIF-rotated JPEG": ("a.jpg", lambda p: rotated(p(5, (400, 320))), lambda p: p(5)),
    "XMP-rotated JPEG": ("a.jpg", lambda p: turned_by_xmp(p(5), "JPEG"), lambda p: p(5)),
    "XMP-rotated PNG": ("a.png", lambda p: turned_by_xmp(p(5), "PNG"), lambda p: p(5)),
    "JPEG turned by EXIF behind its frame": (
        "a.jpg",
        lambda p: with_segments(stored_turned(p(5), "JPEG"), app1(exif_block(6)), behind_frame=True),
        lambda p: p(5),
    ),
    "JPEG with two blocks of EXIF": (  # Pillow takes the second for a part of the first
        "a.jpg",
        lambda p: with_segments(stored_turned(p(5), "JPEG"), app1(exif_block(6)), app1(exif_block(1))),
        lambda p: p(5),
    ),
    "turned JPEG with odd EXIF": ("a.jpg", lambda p: oddly_described(p(5)), lambda p: p(5)),
    "JPEG with damaged EXIF": (
        "a.jpg",
        lambda p: with_segments(file_of(p(5, (400, 320)), "JPEG"), app1(NONSENSE)),
        lambda p: p(5),
    ),
    "PNG turned as ImageMagick says it": (
        "a.png",
        lambda p: with_chunk(stored_turned(p(5), "PNG"), b"tEXt", raw_profile(exif_block(6))),
        lambda p: p(5),
    ),
    "PNG turned by XMP in plain text": (
        "a.png",
        lambda p: with_chunk(stored_turned(p(5), "PNG"), b"tEXt", b"XML:com.adobe.xmp\0" + XMP),
        lambda p: p(5),
    ),
    "PNG turned by compressed XMP": (
        "a.png",
        lambda p: with_chunk(stored_turned(p(5), "PNG"), b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        lambda p: p(5),
    ),
    "PNG with damaged EXIF": ("a.png", lambda p: with_chunk(file_of(p(5), "PNG"), b"eXIf", NONSENSE), lambda p: p(5)),
    "PNG with a damaged raw profile": (
        "a.png",
        lambda p: with_chunk(file_of(p(5), "PNG"), b"tEXt", b"Raw profile type exif\0a\n1\n2\nzz"),
        lambda p: p(5),
    ),
    "WebP with damaged EXIF": ("a.webp", lambda p: file_of(p(5), "WEBP", quality=95, exif=NONSENSE), lambda p: p(5)),
    "animated PNG with a picture before its film": (
        "a.png",
        lambda p: file_of(p(7), "PNG", save_all=True, append_images=[p(5), p(6)], default_image=True),
        lambda p: p(7),
    ),
    "16-bit PNG with one transparent grey": (
        "a.png",
        lambda p: one_clear_grey(p(5)),
        lambda p: on_white(grey(p(5))),
    ),
    "TIFF in L*a*b*": (
        "a.tiff",
        lambda p: file_of(Image.new("LAB", (9, 9), (200, 128, 128)), "TIFF"),
        lambda p: Image.new("LAB", (9, 9), (200, 128, 128)).convert("RGB"),
    ),
    "12-bit TIFF": ("a.tiff", lambda p: twelve_bits(p(5)), lambda p: grey(p(5))),
    "16-bit TIFF whose white is zero": ("a.tiff", lambda p: white_is_zero(p(5)), lambda p: grey(p(5))),
    "grey TIFF multiplied by its transparency": (
        "a.tiff",
        lambda p: premultiplied(p(5)),
        lambda p: on_white(grey(p(5))),
    ),
    "lossless JPEG": ("a.jpg", lambda p: lossless_jpeg((80, 64)), lambda p: two_greys((80, 64))),
    "PNG with much text": (
        "a.png",
        lambda p: with_chunk(file_of(p(5), "PNG"), b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20))),
        lambda p: p(5),
    ),
    "PNG with a long colour profile": (
        "a.png",
        lambda p: with_chunk(file_of(p(5), "PNG"), b"iCCP", b"k\0\0" + zlib.compress(bytes(2 << 20))),
        lambda p: p(5),
    ),
    "4-bit PNG with one transparent grey": (
        "a.png",
        lambda p: one_of_few_greys_is_clear(p(5), 4),
        lambda p: of_few_greys(p(5), 4),
    ),
    "2-bit PNG with one transparent grey": (
        "a.png",
        lambda p: one_of_few_greys_is_clear(p(5), 2),
        lambda p: of_few_greys(p(5), 2),
    ),
    "PNG": ("a.png", lambda p: file_of(p(5), "PNG"), lambda p: p(5)),
    "16-bit PNG": ("a.png", lambda p: sixteen_bits(p(5)), lambda p: grey(p(5))),
    "RGBA PNG": ("a.png", lambda p: file_of(half_transparent(p(5)), "PNG"), lambda p: on_white(p(5))),
    "PNG with one transparent colour": (
        "a.png",
        lambda p: file_of(on_white(p(5), BLUE), "PNG", transparency=BLUE),
        lambda p: on_white(p(5)),
    ),
    "palette PNG": ("a.png", lambda p: file_of(p(5).quantize(256), "PNG"), lambda p: p(5)),
    "transparent palette PNG": (
        "a.png",
        lambda p: file_of(half_transparent(p(5)).quantize(256), "PNG"),
        lambda p: on_white(p(5)),
    ),
    "black and white PNG": ("a.png", lambda p: file_of(p(5).convert("1"), "PNG"), lambda p: p(5).convert("1")),
    "WebP": ("a.webp", lambda p: file_of(p(5), "WEBP", quality=95), lambda p: p(5)),
    "animated GIF": ("a.gif", animated, lambda p: p(5)),
    "BMP": ("a.bmp", lambda p: file_of(p(5), "BMP"), lambda p: p(5)),
    "TIFF": ("a.tiff", lambda p: file_of(p(5), "TIFF"), lambda p: p(5)),
    "TGA": ("a.tga", lambda p: file_of(p(5), "TGA"), lambda p: p(5)),
    "TGA with transparency": (
        "a.tga",
        lambda p: file_of(half_transparent(p(5)), "TGA", compression="tga_rle"),
        lambda p: on_white(p(5)),
    ),
    "HEIC": ("a.heic", lambda p: file_of(p(5), "HEIF", quality=95), lambda p: p(5)),
    "turned HEIC, with its name in capitals": ("a.HEIC", lambda p: rotated(p(5), "HEIF"), lambda p: p(5)),
    "transparent HEIC": (
        "a.heic",
        lambda p: file_of(half_transparent(p(5)), "HEIF", quality=95),
        lambda p: on_white(p(5)),
    ),
    "HEIC without extension": ("a", lambda p: file_of(p(5), "HEIF", quality=95), lambda p: p(5)),
    "AVIF that says so only second": (  # where pillow-heif is asked first, it takes it for HEIC
        "a.avif",
        lambda p: file_of(p(5), "AVIF", quality=95).replace(b"ftypavif", b"ftypmif1", 1),
        lambda p: p(5),
    ),
    "JPEG 2000's codestream": ("a.j2k", lambda p: file_of(p(5), "JPEG2000", no_jp2=True), lambda p: p(5)),
    "JPX": ("a.jpx", lambda p: file_of(p(5), "JPEG2000"), lambda p: p(5)),
    "PCX": ("a.pcx", lambda p: file_of(p(5), "PCX"), lambda p: p(5)),
    "QOI": ("a.qoi", lambda p: qoi(p(5)), lambda p: p(5)),
    "DDS": ("a.dds", lambda p: file_of(p(5), "DDS"), lambda p: p(5)),
    "SGI": ("a.sgi", lambda p: file_of(p(5), "SGI"), lambda p: p(5)),
    "PNG named .jpg": ("a.jpg", lambda p: file_of(p(5), "PNG"), lambda p: p(5)),
    "JPEG without extension": ("a", lambda p: file_of(p(5), "JPEG", quality=95), lambda p: p(5)),
    "name that is not ASCII": ("фото ☃.jpg", lambda p: file_of(p(5), "JPEG", quality=95), lambda p: p(5)),
    "name that is not UTF-8": (
        os.fsdecode(b"caf\xe9.jpg"),
        lambda p: file_of(p(5), "JPEG", quality=95),
        lambda p: p(5),
    ),
    "1 x 1": (
        "a.png",
        lambda p: file_of(Image.new("RGB", (1, 1), BLUE), "PNG"),
        lambda p: Image.new("RGB", (9, 9), BLUE),
    ),
    "1000 x 1": (
        "a.png",
        lambda p: file_of(Image.new("RGB", (1000, 1), BLUE), "PNG"),
        lambda p: Image.new("RGB", (9, 9), BLUE),
    ),
    "JPEG behind 200 kB of metadata": (
        "a.jpg",
        lambda p: file_of(p(5), "JPEG", quality=95, icc_profile=bytes(200_000)),
        lambda p: p(5),
    ),
    "JPEG with zeros behind its end": (
        "a.jpg",
        lambda p: file_of(p(5), "JPEG", quality=95) + bytes(500),
        lambda p: p(5),
    ),
}


@pytest.mark.parametrize("kind", USABLE)
def test_what_can_be_used_is_used(
    kind: str, loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], picture: Picture
) -> None:
    name, make, expected = USABLE[kind]
    folder = make_folder(GOOD, {name: make(picture)})
    data = opened(folder, loader=loader, channels=3)
    assert data.skipped == []
    assert data.count == GOOD + 1
    index = sorted(os.listdir(folder)).index(name)
    got = data.take([index])[0].numpy().astype(int)
    wanted = expected(picture).convert("RGB")
    side = min(wanted.size)
    left, top = (wanted.width - side) // 2, (wanted.height - side) // 2
    square = wanted.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BILINEAR)
    assert abs(got - np.asarray(square).astype(int)).mean() < 8, (
        kind
    )  # lossy formats and palettes; a wrong picture: > 40


UNUSABLE: dict[str, tuple[str, Callable[[Encode], bytes], str]] = {
    "truncated JPEG": ("x.jpg", lambda e: e(size=(200, 200))[:-900], "truncated"),
    "truncated progressive JPEG": ("x.jpg", lambda e: e(size=(200, 200), progressive=True)[:-900], "truncated"),
    "truncated PNG": ("x.png", lambda e: e(format="PNG", size=(200, 200))[:-4000], "truncated"),
    "truncated GIF": ("x.gif", lambda e: e(format="GIF", size=(200, 200))[:-4000], "truncated"),
    "truncated WebP": ("x.webp", lambda e: e(format="WEBP", size=(200, 200))[:-400], ""),
    "empty": ("x.jpg", lambda e: b"", "empty file"),
    "text": ("x.jpg", lambda e: b"<html>404 not found</html>\n" * 40, "text"),
    "short text": ("x.jpg", lambda e: b"404", "text"),
    "random bytes": ("x.png", lambda e: np.random.default_rng(0).bytes(5000), "not an image"),
    "JPEG magic and then nonsense": ("x.jpg", lambda e: b"\xff\xd8\xff" + np.random.default_rng(0).bytes(5000), ""),
    "JPEG that breaks while decoding": ("x.jpg", lambda e: e().replace(b"\xff\xdb", b"\xff\xfe"), "broken"),
    "PNG that breaks while decoding": ("x.png", lambda e: broken_png(e), "broken"),
    "truncated AVIF": ("x.avif", lambda e: e(format="AVIF", size=(200, 200))[:-400], ""),
    "truncated HEIC": ("x.heic", lambda e: e(format="HEIF", size=(200, 200))[:-400], "truncated"),
    "floating point": ("x.tiff", lambda e: file_of(Image.new("F", (20, 20)), "TIFF"), "floating-point"),
    "signed 8-bit": (
        "x.tiff",
        lambda e: tiff(np.zeros((20, 20), np.int8), 20, t258=8, t339=2),
        "signed pixels",
    ),
    "32-bit": ("x.tiff", lambda e: file_of(Image.new("I", (20, 20), 200), "TIFF"), "32-bit"),
}


def test_heic_can_be_used_once_pillow_heif_is_installed(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was found and decoded without it is no reason to leave such a file out."""
    folder = make_folder(GOOD, {"x.heic": file_of(picture(5), "HEIF", quality=95)})
    with monkeypatch.context() as without:
        without.setattr(heic, "VERSION", "")
        without.setattr(census, "FORMAT", "without")
        without.setattr(pillow_decode, "FORMATS", [name for name in pillow_decode.FORMATS if name != "HEIF"])
        data = opened(folder, cache="disk")
        assert data.skipped == [("x.heic", "HEIC, which needs one more package: pip install pillow-heif")]
        data.stream(GOOD).advance()
    data = opened(folder, cache="disk")
    assert data.skipped == [] and data.take([GOOD]).float().std() > 10


def broken_png(encode: Encode) -> bytes:
    data = bytearray(encode(format="PNG"))
    at = data.index(b"IDAT") + 40
    data[at : at + 60] = bytes(60)
    return bytes(data)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_used_is_left_out_and_named(
    kind: str,
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Encode,
    batches: Callable[..., list[torch.Tensor]],
) -> None:
    name, make, reason = UNUSABLE[kind]
    folder = make_folder(GOOD, {name: make(encoded)})
    data = opened(folder, loader=loader)
    if "breaks" not in kind:  # the others show before anything is decoded
        assert [file for file, _ in data.skipped] == [name]
    whole = data.take(range(GOOD))  # the good ones sort first
    stream = data.stream(4)
    found = torch.cat(batches(stream, 2 * GOOD))  # eight epochs
    stream.close()
    seen = [[i for i in range(GOOD) if torch.equal(image, whole[i])] for image in found]
    assert all(len(ids) == 1 for ids in seen)
    for epoch in range(8):
        assert sorted(i for ids in seen[epoch * GOOD : (epoch + 1) * GOOD] for i in ids) == list(range(GOOD))
    assert [file for file, _ in data.skipped] == [name]
    assert reason in data.skipped[0][1]
    report = check(str(folder))
    assert (report.files, report.usable, [file for file, _ in report.unusable]) == (GOOD + 1, GOOD, [name])
    assert reason in report.unusable[0][1]


def test_a_file_that_breaks_is_named_once(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Encode
) -> None:
    """However often it is asked for."""
    data = opened(make_folder(3, {"breaks.jpg": encoded(1).replace(b"\xff\xdb", b"\xff\xfe")}), loader=loader)
    for _ in range(2):
        data.take(range(4))
    assert [name for name, _ in data.skipped] == ["breaks.jpg"]


@pytest.mark.parametrize("kind", ["truncated JPEG", "JPEG that breaks while decoding"])
def test_strict_stops_at_the_first_unusable_file(
    kind: str, loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Encode
) -> None:
    name, make, reason = UNUSABLE[kind]
    folder = make_folder(GOOD, {name: make(encoded)})
    with pytest.raises(UserError, match=f"{name}: .*{reason}.*--strict"):
        stream = opened(folder, loader=loader, strict=True).stream(4)
        for _ in range(GOOD):
            stream.advance()
    with pytest.raises(UserError, match=f"{name}: .*{reason}.*--strict"):
        check(str(folder), strict=True)


@pytest.mark.usefixtures("nothing_held")
def test_images_that_are_gone_for_a_while(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a network disk: a stream says that they are gone, once, and another one goes on with them."""
    folder = make_folder(12)
    data = opened(folder, cache="off", loader="torch")
    stream = data.stream(4)
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(UserError, match="too few for one batch"):
        for _ in range(20):
            stream.advance()
    assert capsys.readouterr().err.count("vanished after it was listed; what cannot be read is left out") == 1
    state = stream.state()
    assert len(state["unusable"]) == 12
    away.rename(folder)
    again = opened(folder, cache="off", loader="torch")
    again.stream(4, state).advance()
    assert again.skipped == [] and "12 images that could not be used can be used again" in capsys.readouterr().err


def test_what_was_left_out_stays_so_where_one_batch_is_left(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(12)
    state = opened(folder, loader="torch").stream(4).state()
    for unusable, left_out in ((list(range(8)), 8), (list(range(9)), 0)):
        data = opened(folder, loader="torch")
        data.stream(4, state | {"unusable": unusable}).advance()
        assert len(data.skipped) == left_out
        assert ("images that could not be used can be used again" in capsys.readouterr().err) == (left_out == 0)


@pytest.mark.usefixtures("nothing_held")
def test_a_file_that_vanishes_after_it_was_listed_costs_that_file(
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    batches: Callable[..., list[torch.Tensor]],
) -> None:
    folder = make_folder(GOOD)
    data = opened(folder, loader=loader)
    (folder / "good-0003.jpg").unlink()
    assert len(batches(data.stream(4), 5)) == 5
    assert data.skipped == [("good-0003.jpg", "vanished after it was listed")]


@pytest.mark.usefixtures("nothing_held")
def test_a_file_that_becomes_another_after_it_was_looked_at_is_still_decoded(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Encode
) -> None:
    folder = make_folder(GOOD)
    data = opened(folder, loader=loader)
    (folder / "good-0003.jpg").write_bytes(encoded(3, "PNG", size=(20, 25), mode="RGBA"))
    assert data.take([3]).float().std() > 10
    (folder / "good-0004.jpg").write_bytes(encoded(4, size=(24, 90)))  # as large as before in one direction
    assert (data.take([4]).int() - opened(folder, loader=loader).take([4]).int()).abs().max() <= 2
    assert data.skipped == []


def test_a_file_without_read_permission_is_named_and_looked_at_again_next_time(
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    unreadable: Callable[[str], AbstractContextManager[None]],
) -> None:
    folder = make_folder(GOOD)
    with unreadable("good-0002.jpg"):
        assert opened(folder, loader=loader).skipped == [("good-0002.jpg", "no permission to read it")]
    assert opened(folder, loader=loader).skipped == []


def test_what_was_too_large_for_the_memory_is_tried_again_next_time(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(GOOD, {"large.webp": encoded(5, "WEBP")})

    def too_much(*given: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("fastdcgan.data.pillow_decode._finish", too_much)
        data = opened(folder)
        data.take(range(GOOD + 1))
        assert data.skipped == [("large.webp", "too large for the memory that is free")]
    assert opened(folder).skipped == []


@pytest.mark.parametrize("channels", [1, 4])
def test_colours_in_lab_become_any_number_of_channels(
    channels: int, make_folder: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    lab = Image.new("LAB", (9, 9), (200, 128, 128))
    (pixels,) = opened(make_folder(0, {"a.tiff": file_of(lab, "TIFF")}), channels=channels).take([0])
    grey = lab.convert("RGB").convert("L").getpixel((0, 0))
    assert (pixels[..., 0].float() - grey).abs().max() <= 2


def test_a_huge_jpeg_is_used_and_a_huge_png_is_not(
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    huge_png: Callable[[int, int], bytes],
    encoded: Encode,
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = make_folder(GOOD, {"huge.jpg": huge_jpeg(20_000), "huge.png": huge_png(20_000, 20_000)})
    data = opened(folder, loader=loader)
    assert data.skipped == [("huge.png", "too large: 20000 x 20000 pixels (possibly a decompression bomb)")]
    assert (data.take([GOOD]) == 128).all()
    report = check(str(folder))
    assert report.unusable == data.skipped
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, f"{grown:.0f} MB more, where the whole picture takes 400 MB in grey"


HUGE_HEADERS = {  # name of the file, where it says how wide and high it is, and how
    "TGA": ("x.tga", 12, "<HH"),
    "PCX": ("x.pcx", 8, "<HH"),
    "DDS": ("x.dds", 12, "<II"),
    "SGI": ("x.sgi", 6, ">HH"),
    "QOI": ("x.qoi", 4, ">II"),
}


@pytest.mark.parametrize("kind", HUGE_HEADERS)
def test_what_says_that_it_is_huge_is_not_unpacked(
    kind: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], picture: Picture
) -> None:
    name, at, layout = HUGE_HEADERS[kind]
    data = bytearray(qoi(picture(5)) if kind == "QOI" else file_of(picture(5), kind))
    struct.pack_into(layout, data, at, 30_000, 30_000)
    folder = make_folder(2, {name: bytes(data)})
    (unusable,) = opened(folder).skipped
    assert unusable[0] == name and "decompression bomb" in unusable[1]
    assert check(str(folder)).unusable == [unusable]


@pytest.mark.parametrize("orientation", [0, 9])
def test_a_way_of_turning_that_there_is_not_turns_nothing(orientation: int, picture: Picture) -> None:
    data = with_segments(file_of(picture(5), "JPEG"), app1(exif_block(orientation)))
    facts = examine(Glimpse(data, data[-64:], len(data), lambda: data))
    assert facts[:3] == (JPEG, 24, 30)


@pytest.mark.parametrize(("rgb", "kind"), [(True, OTHER), (False, JPEG)])
def test_a_jpeg_that_holds_rgb_is_left_to_pillow(rgb: bool, kind: int, picture: Picture) -> None:
    """Others may take its values for those of the usual colour space."""
    data = file_of(picture(5), "JPEG", keep_rgb=rgb)
    assert examine(Glimpse(data, data[-64:], len(data), lambda: data)).kind == kind


def test_a_huge_progressive_jpeg_is_not_used(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    """Its decoder holds all of it, at any scale."""
    progressive = huge_jpeg(20_000).replace(b"\xff\xc0", b"\xff\xc2", 1)
    assert "decompression bomb" in dict(opened(make_folder(2, {"huge.jpg": progressive})).skipped)["huge.jpg"]


@pytest.mark.parametrize(
    ("image_size", "too_large"),
    [(64, []), (1024, []), (4096, []), (8000, [1]), (8192, [0, 1]), (20_000, [0, 1, 2])],
)
def test_jpegs_are_as_large_as_scaled_decoding_allows(image_size: int, too_large: list[int]) -> None:
    census = Census.empty(3)
    census.kind[:] = JPEG
    census.sizes[:] = [(16_000, 16_000), (30_000, 30_000), (20_000, 20_000)]
    reasons = census.oversized((image_size, image_size))
    assert sorted(reasons) == too_large
    assert all("too large" in reason for reason in reasons.values())


def huge_jpeg(side: int) -> bytes:
    """A grey JPEG of side x side pixels, all 128, without ever holding them: every block has the same six bits."""
    data = bytearray(file_of(Image.new("L", (8, 8), 128), "JPEG"))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    scan_header = 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    blocks = (-(-side // 8)) ** 2
    return bytes(data[: scan + scan_header]) + b"\x28\xa2\x8a" * (-(-blocks // 4)) + b"\xff\xd9"


def test_a_thousand_good_and_fifteen_bad(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Encode
) -> None:
    kinds = list(UNUSABLE.values())
    bad = {
        f"class-{k % 3}/bad-{k:02}{kinds[k % len(kinds)][0][1:]}": kinds[k % len(kinds)][1](encoded) for k in range(15)
    }
    data = opened(make_folder(1000, bad), loader=loader, cache="off")
    stream = data.stream(50)
    for _ in range(41):
        stream.advance()
    stream.close()
    assert sorted(file for file, _ in data.skipped) == sorted(bad)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_what_exif_turns_is_cropped_as_it_is_shown(
    format: str, loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], picture: Picture
) -> None:
    folder = make_folder(0, {"a.png": file_of(picture(5), "PNG"), "turned.png": rotated(picture(5), format)})
    straight, turned = opened(folder, loader=loader, image_size=(12, 30)).take([0, 1]).int()
    assert (straight - turned).abs().float().mean() < 3


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_read_in_both_byte_orders(
    order: Literal["little", "big"],
    orientation: int,
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    picture: Picture,
) -> None:
    """As cameras of different makers write it."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    mark = {"little": b"II*\0", "big": b"MM\0*"}[order]
    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + bytes(2)
    exif = b"Exif\0\0" + mark + number(8, 4) + number(1, 2) + entry + bytes(4)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes each turn, as Pillow numbers them
    stored = picture(5) if orientation == 1 else picture(5).transpose(Image.Transpose(back[orientation]))
    data = file_of(stored, "JPEG", quality=95, exif=exif)
    facts = examine(Glimpse(data, data[-64:], len(data), lambda: data))
    assert (facts.kind, facts.height, facts.width) == (JPEG if orientation == 1 else OTHER, 24, 30)
    folder = make_folder(0, {"a.png": file_of(picture(5), "PNG"), "b.jpg": data})
    straight, turned = opened(folder, loader=loader).take([0, 1]).int()
    assert (straight - turned).abs().float().mean() < 3


def test_colour_and_grey_mix(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Encode
) -> None:
    folder = make_folder(2, {"grey.jpg": encoded(4, mode="L"), "grey.png": encoded(4, "PNG", mode="L")})
    colour = opened(folder, loader=loader)
    assert (colour.channels, colour.flip) == (3, True)
    shown = colour.take([2, 3])
    assert torch.equal(shown[..., 0], shown[..., 1])
    assert torch.equal(shown[..., 0], shown[..., 2])
    assert opened(folder, loader=loader, channels=1).take(range(4)).shape == (4, 16, 16, 1)
    only_grey = opened(make_folder(0, {"grey.jpg": encoded(4, mode="L")}, "grey"), loader=loader)
    assert (only_grey.channels, only_grey.flip) == (1, False)


@pytest.mark.parametrize("kind", ["16 bits", "with transparency", "black and white"])
def test_what_has_shades_of_grey_alone_is_grey(
    kind: str, loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], picture: Picture
) -> None:
    image = {
        "16 bits": Image.fromarray(np.asarray(picture(1, mode="L")).astype(np.uint16) * 256),
        "with transparency": picture(1).convert("LA"),
        "black and white": picture(1).convert("1"),
    }[kind]
    folder = make_folder(0, {"a.png": file_of(image, "PNG")})
    for channels in (None, 3):  # in more channels it is still what it was, which may be writing
        data = opened(folder, loader=loader, channels=channels)
        assert (data.channels, data.flip) == (channels or 1, False)


def test_four_channels_keep_transparency(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], picture: Picture
) -> None:
    folder = make_folder(1, {"half.png": file_of(half_transparent(picture(5)), "PNG")})
    shown = opened(folder, loader=loader, channels=4).take([0, 1])
    assert (shown[0, ..., 3] == 255).all()
    assert (shown[1, :, :7, 3] == 0).all()
    assert (shown[1, :, 9:, 3] == 255).all()
