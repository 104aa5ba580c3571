"""Which image sizes a DCGAN can have, and how many doublings lead there. Imports nothing: the command line needs it."""

MIN_BASE, MAX_BASE = 4, 7


def stages(height: int, width: int) -> int:
    """Number k of doublings from the base grid to (height, width) pixels.

    Both sides must be b * 2^k with the same k >= 1 and b in 4..7; the base grid is then (height >> k, width >> k).

    Raises:
        ValueError: the size is not of that form; the message names the nearest sizes that are.
    """
    k = height.bit_length() - 3  # the only k that puts height / 2^k into 4..7
    if k >= 1 and height % (1 << k) == 0 and width % (1 << k) == 0 and MIN_BASE <= width >> k <= MAX_BASE:
        return k
    raise ValueError(
        f"image size {_name(height, width)} is not possible: each side must be 4, 5, 6 or 7 times the same power of two"
        f" (at least 8); the nearest possible: {' and '.join(_nearest(height, width))}"
    )


def parse(text: str) -> tuple[int, int]:
    """'64' -> (64, 64); '64x96' -> (64, 96): height x width, in pixels, not yet checked by `stages`.

    Raises:
        ValueError: the text is neither a whole number nor two of them joined by an x.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise ValueError(f"image size '{text}' is neither a number of pixels (64) nor HEIGHTxWIDTH (64x96)")
    return int(sides[0]), int(sides[-1])


def _nearest(height: int, width: int) -> list[str]:
    """The two valid sizes closest to (height, width); square ones only for a square request."""
    candidates = [
        (bh << k, bw << k)
        for k in range(1, 13)
        for bh in range(MIN_BASE, MAX_BASE + 1)
        for bw in range(MIN_BASE, MAX_BASE + 1)
        if height != width or bh == bw
    ]
    candidates.sort(key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
    return [_name(*size) for size in candidates[:2]]


def _name(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"
