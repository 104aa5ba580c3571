"""A k4 s2 p1 convolution with 2.56 times fewer multiplications, on a CPU: Winograd's F(4x4, 2x2).

As in Lavin and Gray 2016 (arXiv:1509.09308), for a kernel that moves by two pixels: it meets even and odd pixels at
every second tap, so it is a 2x2 kernel over pixels of 2x2. In one dimension five of those, p, give four pixels y of the
smaller grid; g are the kernel's two taps:

    y = A^T [(G g) * (B^T p)]

These are 5 multiplications where a direct convolution has 8, and in two dimensions 25 for 64. Over all tiles and
channels they are 25 matrix products. Everything else is linear (MAPS), and in float32 done by `winograd.c`, where this
machine can compile that. It is exact but for rounding: in float32 the relative error, of values and of gradients, is up
to 3e-6, that of a direct convolution up to 2e-6. A number that is not finite spreads over its tile, without the C file
over its whole image. In training mode alone: networks in evaluation mode are what people export, trace and take apart,
for which operators of one's own are in the way.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan import derivatives, native

SOURCE = Path(__file__).with_suffix(".c")

# Of F(4, 2), by the algorithm of Toom and Cook with the points 0, 1, -1, 2 and infinity.
B_T = torch.tensor(
    [
        [1, -1 / 2, -1, 1 / 2, 0],
        [0, 1, 1 / 2, -1 / 2, 0],
        [0, -1 / 3, 1 / 2, -1 / 6, 0],
        [0, -1 / 6, 0, 1 / 6, 0],
        [0, 2, -1, -2, 1],
    ],
    dtype=torch.float64,
)
G = torch.tensor([[1, 0], [1, 1], [1, -1], [1, 2], [0, 1]], dtype=torch.float64)
A_T = torch.tensor([[1, 1, 1, 1, 0], [0, 1, -1, 2, 0], [0, 1, 1, 4, 0], [0, 1, -1, 8, 1]], dtype=torch.float64)
G_2D, A_T_2D = torch.kron(G, G), torch.kron(A_T, A_T)  # (25, 4) and (16, 25): for both dimensions at once

# With AVX2 and no wider vectors memory is fast enough for the transforms, and MKL's matrix products run at the rate of
# direct convolutions (seen on AMD). Not measured at the start: the bits of a resumed run depend on what is taken.
PAYS_HERE = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()


class Limits(NamedTuple):
    """Within these a convolution was measured to be faster than a direct one."""

    longest_side: float  # of the smaller grid
    fewest_channels: int  # of the larger one
    fewest_tiles: int  # of the batch: with fewer, transforming the weights takes longer than the products save


IN_C = Limits(math.inf, 32, 16)
IN_TORCH = Limits(16, 64, 32)  # on longer sides `_rows`, which are mostly zeros, take what the products save


def is_faster(x: Tensor, grid: tuple[int, int], channels: int) -> bool:
    """Whether this is faster than the direct convolution of x; `grid` and `channels` as in `fits`."""
    possible = derivatives.are_ordinary() and pays(x.device, x.dtype) and not torch.is_autocast_enabled("cpu")
    return possible and fits(len(x), grid, channels)


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are shapes for which this is faster."""
    return PAYS_HERE and device.type == "cpu" and dtype == torch.float32


def fits(batch_size: int, grid: tuple[int, int], channels: int) -> bool:
    """Whether a convolution is of a shape for which this can be faster.

    Args:
        grid: height and width of the smaller of its grids.
        channels: of the larger one.
    """
    height, width = grid
    limits = _limits(channels)
    return (
        whole_tiles(grid)
        and max(grid) <= limits.longest_side
        and channels >= limits.fewest_channels
        and batch_size * height * width // 16 >= limits.fewest_tiles
    )


def whole_tiles(grid: tuple[int, int]) -> bool:
    """Whether a grid, the smaller one of a convolution, is made of whole tiles."""
    return all(side % 4 == 0 for side in grid)


def _limits(channels: int) -> Limits:
    return IN_TORCH if _library(channels) is None else IN_C


_limits._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it while it traces


def _library(channels: int) -> ctypes.CDLL | None:
    """MAPS as C, which takes eight channels at a time."""
    return native.load(SOURCE) if channels % 8 == 0 else None


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.conv2d(x, weight, stride=2, padding=1)` for a 4x4 kernel; channels-last in and out.

    Args:
        x: (N, C, 2h, 2w), h and w multiples of 4.
        weight: (K, C, 4, 4).

    Returns:
        (N, K, h, w).

    Raises:
        ValueError: another kernel, or sides that do not fit.
    """
    grid = x.shape[2] // 2, x.shape[3] // 2
    _check(weight, grid, x.shape[2:] == (2 * grid[0], 2 * grid[1]))
    rows = transform(x, "pixels", False, *grid)
    found = products(rows, transform(weight, "kernel", False, *grid))
    return transform(found, "grid", False, *grid)


def conv_transpose2d(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1)` for a 4x4 kernel; channels-last too.

    It is `conv2d` transposed: the transpose of each of its steps, from the last to the first.

    Args:
        x: (N, K, h, w), h and w multiples of 4.
        weight: (K, C, 4, 4).

    Returns:
        (N, C, 2h, 2w).

    Raises:
        ValueError: another kernel, or sides that do not fit.
    """
    grid = x.shape[2], x.shape[3]
    _check(weight, grid, True)
    rows = transform(x, "grid", True, *grid)
    found = rows.transpose(0, 1) @ transform(weight, "kernel", False, *grid).transpose(0, 1)
    return transform(found.transpose(0, 1), "pixels", True, *grid)


def _check(weight: Tensor, grid: tuple[int, int], even: bool) -> None:
    if weight.shape[2:] != (4, 4) or not whole_tiles(grid) or not even:
        kernel = tuple(weight.shape[2:])
        raise ValueError(f"winograd: kernels are 4x4 and the smaller grid's sides multiples of 4, not {kernel}, {grid}")


# Operators, made without `torch.library.custom_op`: the first call of one imports the compiler, for two seconds.
PRODUCTS, TRANSFORM = "fastdcgan::winograd_products", "fastdcgan::winograd_transform"
torch.library.define(PRODUCTS, "(Tensor rows, Tensor weight) -> Tensor")
torch.library.define(
    TRANSFORM, "(Tensor x, str name, bool transposed, SymInt h, SymInt w, Tensor? kept=None) -> Tensor"
)
products = torch.ops.fastdcgan.winograd_products.default
transform = torch.ops.fastdcgan.winograd_transform.default


@torch.library.impl(PRODUCTS, "CPU")
def _products(rows: Tensor, weight: Tensor) -> Tensor:
    """25 matrix products: rows (M, 25, 4C) and weight (K, 25, 4C) -> (M, 25, K).

    An operator, because autograd's own gradient for a transposed operand is transposed too, and then copied.
    """
    return (rows.transpose(0, 1) @ weight.permute(1, 2, 0)).transpose(0, 1)


@torch.library.register_fake(PRODUCTS)  # type: ignore[untyped-decorator]
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(25, len(rows), len(weight)).transpose(0, 1)


def _remember_both(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_products(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, weight = (tensor.transpose(0, 1) for tensor in ctx.saved_tensors)
    needs_rows, needs_weight = ctx.needs_input_grad
    return (
        (gradient.transpose(0, 1) @ weight).transpose(0, 1) if needs_rows else None,
        (gradient.permute(1, 2, 0) @ rows).transpose(0, 1) if needs_weight else None,
    )


torch.library.register_autograd(PRODUCTS, _differentiate_products, setup_context=_remember_both)


# The linear maps around the products, and their transposes; tiles are counted by M.


def _pixels(x: Tensor, h: int, w: int) -> Tensor:
    """x (N, C, 2h, 2w) -> B^T p, (M, 25, 4C): the four pixels of each p side by side."""
    n, c, _, _ = x.shape
    v = _rows(h).to(x.dtype) @ x.permute(0, 2, 3, 1).reshape(n, 2 * h, -1)
    v = _rows(w).to(x.dtype) @ v.view(-1, 2 * w, c)
    return v.view(n, 5, h // 4, 2, 5, w // 4, 2, c).permute(0, 2, 5, 1, 4, 3, 6, 7).reshape(-1, 25, 4 * c)


@functools.cache
def _rows(side: int) -> Tensor:
    """(5 * tiles * 2, 2 * side): B^T for a whole row of 2 * side pixels and its padding."""
    padded = F.pad(torch.eye(2 * side, dtype=torch.float64), (0, 0, 1, 1))
    windows = padded.unfold(0, 10, 8).view(-1, 2 * side, 5, 2)  # tile, pixel, p, which of the two
    return torch.einsum("ap,tspq->atqs", B_T, windows).reshape(-1, 2 * side)


def _pixels_transposed(v: Tensor, h: int, w: int) -> Tensor:
    c = v.shape[-1] // 4
    v = v.reshape(-1, h // 4, w // 4, 5, 5, 2, 2, c).permute(0, 3, 1, 5, 4, 2, 6, 7)
    v = _rows(w).t().to(v.dtype) @ v.reshape(-1, 5 * w // 2, c)
    v = _rows(h).t().to(v.dtype) @ v.view(-1, 5 * h // 2, 2 * w * c)
    return v.view(-1, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def _kernel(weight: Tensor, h: int, w: int) -> Tensor:
    """weight (K, C, 4, 4) -> G g, (K, 25, 4C)."""
    k, c, _, _ = weight.shape
    taps = weight.permute(0, 2, 3, 1).reshape(k, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    return _each(G_2D, taps.reshape(k, 4, 4 * c))


def _kernel_transposed(u: Tensor, h: int, w: int) -> Tensor:
    k, _, columns = u.shape
    taps = _each(G_2D.t(), u).view(k, 2, 2, 2, 2, columns // 4).permute(0, 1, 3, 2, 4, 5)
    return taps.reshape(k, 4, 4, -1).permute(0, 3, 1, 2)


def _grid(found: Tensor, h: int, w: int) -> Tensor:
    """products (M, 25, K) -> y = A^T [...], (N, K, h, w)."""
    k = found.shape[-1]
    y = _each(A_T_2D, found).view(-1, h // 4, w // 4, 4, 4, k).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(-1, h, w, k).permute(0, 3, 1, 2)


def _grid_transposed(y: Tensor, h: int, w: int) -> Tensor:
    n, k, _, _ = y.shape
    tiles = y.permute(0, 2, 3, 1).reshape(n, h // 4, 4, w // 4, 4, k).permute(0, 1, 3, 2, 4, 5)
    return _each(A_T_2D.t(), tiles.reshape(-1, 16, k))


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (P, Q) times each of x (M, Q, R): small products, whose operands stay in the caches."""
    return matrix.to(x.dtype).expand(len(x), -1, -1) @ x


MAPS = {
    "pixels": (_pixels, _pixels_transposed),
    "kernel": (_kernel, _kernel_transposed),
    "grid": (_grid, _grid_transposed),
}


@torch.library.impl(TRANSFORM, "CPU")
def _transform(x: Tensor, name: str, transposed: bool, h: int, w: int, kept: Tensor | None = None) -> Tensor:
    """One of MAPS. An operator, because the compiler makes nothing faster of them and takes twice as long.

    `kept` is not read. A gradient's call gets the x of its forward call there, so that x is kept for the backward
    pass, where the activation before takes its sign from it. The compiler would rather keep the sign, and writes such a
    mask element by element, at a thirtieth of the speed.
    """
    made = _made(x, name, transposed, h, w)
    tiles, images = (x, made) if x.dim() == 3 else (made, x)
    channels = images.shape[1]
    library = _library(channels) if x.dtype == torch.float32 else None
    if library is None:
        return MAPS[name][transposed](x, h, w)
    if x is images:
        x = x.contiguous(memory_format=torch.channels_last)
    elif x.stride(2) != 1:
        x = tiles = x.contiguous()
    function = getattr(library, f"{name}_transposed" if transposed else name)
    numbers = (len(images), h, w, channels, tiles.stride(0), tiles.stride(1))
    function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, made)), *map(ctypes.c_long, numbers))
    return made


@torch.library.register_fake(TRANSFORM)  # type: ignore[untyped-decorator]
def _(x: Tensor, name: str, transposed: bool, h: int, w: int, kept: Tensor | None = None) -> Tensor:
    return _made(x, name, transposed, h, w)


def _made(x: Tensor, name: str, transposed: bool, h: int, w: int) -> Tensor:
    """What `transform` returns, not filled in: tiles (M, 25, ...), or channels-last (N, C, H, W)."""
    columns, tiles = x.shape[-1], h * w // 16
    shape = {
        ("pixels", False): (len(x) * tiles, 25, 4 * x.shape[1]),
        ("pixels", True): (len(x) // tiles, 2 * h, 2 * w, columns // 4),
        ("kernel", False): (len(x), 25, 4 * x.shape[1]),
        ("kernel", True): (len(x), 4, 4, columns // 4),
        ("grid", False): (len(x) // tiles, h, w, columns),
        ("grid", True): (len(x) * tiles, 25, x.shape[1]),
    }[name, transposed]
    made = x.new_empty(shape)
    return made.permute(0, 3, 1, 2) if len(shape) == 4 else made


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.which, _ = inputs
    ctx.save_for_backward(x if ctx.which[:2] in (["pixels", False], ["grid", True]) else None)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    name, transposed, h, w = ctx.which
    (x,) = ctx.saved_tensors
    return transform(gradient, name, not transposed, h, w, x), None, None, None, None, None


torch.library.register_autograd(TRANSFORM, _differentiate, setup_context=_remember)
