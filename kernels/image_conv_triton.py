# mypy: disable-error-code="misc,no-untyped-def,no-untyped-call,untyped-decorator"
"""The Triton kernels of `image_conv` and `image_conv_transpose`: three products, no atomics, the same bits every time.

Both operations are one linear map between a fine tensor (N, C, 2h, 2w) and a coarse one (N, K, h, w), channels_last:

    down    coarse from fine: the convolution, and the input's gradient of the transposed one
    up      fine from coarse: the transposed convolution, and the input's gradient of the other
    outer   the weight's gradient of both; `add_splits` then adds the partial sums of its programs

The coarse tensor is a matrix of rows (sample, y, x) and K columns. Row (y, x) meets the 4 x 4 fine pixels around it; a
line of four is 4 * C values side by side in memory, and the four lines are the taps of a row, gathered where they are
used. Each line is read as a window of WINDOW values, a power of two, from LEAD values before it. With an odd C that
one value makes the window start at an even place, so that two 16-bit values come with one load.

An activation costs no pass: the forward kernels apply it before they store, and the others make the gradient of its
input, dz, out of dy and the output while they load. Where BatchNorm comes first, `outer` loads its input and makes its
output again. Sums are in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdcgan.kernels.batch_norm_act_triton import act, act_input
from fastdcgan.kernels.plan import Plan, cut, splits_for


def plan(rows: int, channels: int, itemsize: int, tallest: int, programs: int | None = None) -> Plan:
    """The cut of `rows` x `channels` into tiles of up to `tallest` rows, for about `programs` programs, each with
    `turns` tiles of one split's rows, or for as many as there are tiles."""
    # Values of 4 bytes in tiles as large would not fit shared memory, nor, without TF32, the registers.
    block_rows, block_cols = tallest if itemsize == 2 else 32, min(64, max(16, triton.next_power_of_2(channels)))
    if programs is None:
        return cut(rows, block_rows, block_cols, triton.cdiv(rows, block_rows))
    return cut(rows, block_rows, block_cols, splits_for(programs, channels, 1, block_cols))


@triton.jit
def _leaky_gradient(dy, out, SLOPE: tl.constexpr):
    """dz of LeakyReLU, whose output has its input's sign."""
    wide = dy.to(tl.float32)
    return tl.where(out > 0.0, wide, wide * SLOPE).to(dy.dtype)


@triton.jit
def _tanh_gradient(dy, out):
    wide = out.to(tl.float32)
    return (dy.to(tl.float32) * (1.0 - wide * wide)).to(dy.dtype)


@triton.jit
def _normalized(x, mean, inverse, weight, bias, SLOPE: tl.constexpr):
    """LeakyReLU of BatchNorm, [BLOCK_ROWS, BLOCK_COLS]: the bits that `batch_norm_act` gave."""
    z = act_input(x.to(tl.float32), mean[None, :], inverse[None, :], weight[None, :], bias[None, :])
    return act(z, SLOPE).to(x.dtype)


@triton.jit
def _patches(
    fine_ptr,  # [N, 2 * HEIGHT, 2 * WIDTH, C]
    out_ptr,  # of fine's shape; not read without TANH_GRADIENT
    first,  # of the rows
    rows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    LEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    TANH_GRADIENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The taps of BLOCK_ROWS rows, [BLOCK_ROWS, 4 * WINDOW]: 0 off the image and beside a line in its window."""
    row = first + tl.arange(0, BLOCK_ROWS)
    tap = tl.arange(0, 4 * WINDOW)
    sample, y, x = row // (HEIGHT * WIDTH), row // WIDTH % HEIGHT, row % WIDTH
    first_sample = first // (HEIGHT * WIDTH)
    start = first_sample.to(tl.int64) * (4 * HEIGHT * WIDTH * C)  # 32 bits count the rest
    line = (2 * y - 1)[:, None] + (tap // WINDOW)[None, :]
    across = (x * (2 * C) - (C + LEAD))[:, None] + (tap % WINDOW)[None, :]
    offsets = ((sample - first_sample) * (2 * HEIGHT))[:, None] * (2 * WIDTH * C) + line * (2 * WIDTH * C) + across
    mask = (row < rows)[:, None] & (line >= 0) & (line < 2 * HEIGHT) & (across >= 0) & (across < 2 * WIDTH * C)
    fine = tl.load(fine_ptr + start + offsets, mask=mask, other=0.0)
    if TANH_GRADIENT:
        fine = _tanh_gradient(fine, tl.load(out_ptr + start + offsets, mask=mask, other=0.0))
    # Not left to a weight of 0, which would carry a neighbour's NaN in here.
    return tl.where(_is_tap(tap, C, LEAD, WINDOW)[None, :], fine, 0.0)


@triton.jit
def _is_tap(tap, C: tl.constexpr, LEAD: tl.constexpr, WINDOW: tl.constexpr):
    return (tap % WINDOW >= LEAD) & (tap % WINDOW < LEAD + 4 * C)


@triton.jit
def down(
    fine_ptr,  # [N, 2 * HEIGHT, 2 * WIDTH, C]; with TANH_GRADIENT the gradient of a tanh's output
    out_ptr,  # [N, 2 * HEIGHT, 2 * WIDTH, C], that output; not read otherwise
    weight_ptr,  # [K, 4, 4, C]
    coarse_ptr,  # [rows, K]
    rows,  # N * HEIGHT * WIDTH
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    LEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    TANH_GRADIENT: tl.constexpr,
    SLOPE: tl.constexpr,  # of what is stored where it is negative
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first, cols = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    tap = tl.arange(0, 4 * WINDOW)
    weight = tl.load(
        weight_ptr + cols[None, :] * (16 * C) + (tap // WINDOW * (4 * C) + tap % WINDOW - LEAD)[:, None],
        mask=_is_tap(tap, C, LEAD, WINDOW)[:, None] & (cols < K)[None, :],
        other=0.0,
    )
    patches = _patches(fine_ptr, out_ptr, first, rows, HEIGHT, WIDTH, C, LEAD, WINDOW, TANH_GRADIENT, BLOCK_ROWS)
    total = tl.dot(patches, weight, input_precision=PRECISION)
    coarse = tl.where(total > 0.0, total, total * SLOPE).to(coarse_ptr.dtype.element_ty)
    place = tl.arange(0, BLOCK_ROWS)
    mask = (place < rows - first)[:, None] & (cols < K)[None, :]
    tl.store(coarse_ptr + first.to(tl.int64) * K + place[:, None] * K + cols[None, :], coarse, mask=mask)


@triton.jit
def up(
    coarse_ptr,  # [rows, K]; with LEAKY_GRADIENT the gradient of a LeakyReLU's output
    out_ptr,  # [rows, K], that output; not read otherwise
    weight_ptr,  # [K, 4, 4, C]
    fine_ptr,  # [N, 2 * HEIGHT, 2 * WIDTH, C]
    rows,  # N * HEIGHT * WIDTH
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    LEAKY_GRADIENT: tl.constexpr,
    SLOPE: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Each row's own 2 x 2 fine pixels, from the row and its eight neighbours. The first and last rows are only that.

    Of 16 columns 4 are for each of these pixels, (p, q), one a channel. Line 2 * y + p takes from the rows at y + dy
    the weight's line p + 1 - 2 * dy, where there is one. Across, pixel 2 * x + q takes the weight's q + 1 from its own
    row and 3 - 3 * q from the one beside it, at x - 1 + 2 * q: that sum is made where this one is read, then moved
    over. So a row is read three times, not nine.

    Where there is no line the weight is 0, so a NaN or an infinity reaches six lines of four pixels, and not only the
    4 x 4 in which it has weight.
    """
    STEPS: tl.constexpr = (K + BLOCK_COLS - 1) // BLOCK_COLS
    first = tl.program_id(0) * (BLOCK_ROWS - 2) - 1
    place = tl.arange(0, BLOCK_ROWS)
    row = first + place
    sample, y, x = row // (HEIGHT * WIDTH), row // WIDTH % HEIGHT, row % WIDTH
    first_sample = first // (HEIGHT * WIDTH)
    coarse_ptr += first.to(tl.int64) * K
    out_ptr += first.to(tl.int64) * K
    fine_ptr += first_sample.to(tl.int64) * (4 * HEIGHT * WIDTH * C)
    p, q, channel = tl.arange(0, 16) // 8, tl.arange(0, 16) // 4 % 2, tl.arange(0, 16) % 4
    own, beside = tl.zeros([BLOCK_ROWS, 16], tl.float32), tl.zeros([BLOCK_ROWS, 16], tl.float32)
    for step in range(3 * STEPS):
        dy = step // STEPS - 1
        cols = step % STEPS * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        exists = (row >= 0) & (row < rows) & (y + dy >= 0) & (y + dy < HEIGHT)
        offsets = (place + dy * WIDTH)[:, None] * K + cols[None, :]
        mask = exists[:, None] & (cols < K)[None, :]
        coarse = tl.load(coarse_ptr + offsets, mask=mask, other=0.0)
        if LEAKY_GRADIENT:
            coarse = _leaky_gradient(coarse, tl.load(out_ptr + offsets, mask=mask, other=0.0), SLOPE)
        line = p + 1 - 2 * dy
        is_tap = (cols < K)[:, None] & ((line >= 0) & (line < 4) & (channel < C))[None, :]
        weight = weight_ptr + cols[:, None] * (16 * C) + (line * (4 * C) + channel)[None, :]
        own_weight = tl.load(weight + ((q + 1) * C)[None, :], mask=is_tap, other=0.0)
        own = tl.dot(coarse, own_weight, own, input_precision=PRECISION)
        beside_weight = tl.load(weight + ((3 - 3 * q) * C)[None, :], mask=is_tap, other=0.0)
        beside = tl.dot(coarse, beside_weight, beside, input_precision=PRECISION)
    dx = (2 * q - 1)[None, :]
    source = tl.minimum(tl.maximum(place[:, None] + dx, 0), BLOCK_ROWS - 1)
    exists = (x[:, None] + dx >= 0) & (x[:, None] + dx < WIDTH)
    total = own + tl.where(exists, tl.gather(beside, source, 0), 0.0)
    if TANH:
        total = 1.0 - 2.0 / (tl.exp(2.0 * total) + 1.0)  # an error of 1e-7 of the full range, and no overflow
    pixel = (sample - first_sample) * (4 * HEIGHT * WIDTH) + y * (4 * WIDTH) + x * 2
    written = (place > 0) & (place < BLOCK_ROWS - 1) & (row < rows)
    tl.store(
        fine_ptr + pixel[:, None] * C + (p * (2 * WIDTH * C) + q * C + channel)[None, :],
        total.to(fine_ptr.dtype.element_ty),
        mask=written[:, None] & (channel < C)[None, :],
    )


@triton.jit
def outer(
    fine_ptr,  # [N, 2 * HEIGHT, 2 * WIDTH, C]; with TANH_GRADIENT the gradient of a tanh's output
    fine_out_ptr,  # [N, 2 * HEIGHT, 2 * WIDTH, C], that output; not read otherwise
    coarse_ptr,  # [rows, K]; with LEAKY_GRADIENT the gradient of a LeakyReLU's output, with NORMALIZE BatchNorm's input
    coarse_out_ptr,  # [rows, K], LeakyReLU's output; not read otherwise
    mean_ptr,  # [K], and the next three; read with NORMALIZE alone
    inverse_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    partial_ptr,  # [SPLITS, K, 4 * WINDOW]
    rows,  # N * HEIGHT * WIDTH
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    LEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    TANH_GRADIENT: tl.constexpr,
    LEAKY_GRADIENT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    split, cols = tl.program_id(0), tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    place = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_COLS, 4 * WINDOW], tl.float32)
    if NORMALIZE:
        mean = tl.load(mean_ptr + cols, mask=cols < K, other=0.0)
        inverse = tl.load(inverse_ptr + cols, mask=cols < K, other=0.0)
        norm_weight = tl.load(norm_weight_ptr + cols, mask=cols < K, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + cols, mask=cols < K, other=0.0)
    for turn in range(TURNS):
        first = (split * TURNS + turn) * BLOCK_ROWS
        mask = (place < rows - first)[:, None] & (cols < K)[None, :]
        start = first.to(tl.int64) * K
        offsets = place[:, None] * K + cols[None, :]
        coarse = tl.load(coarse_ptr + start + offsets, mask=mask, other=0.0)
        if LEAKY_GRADIENT:
            coarse = _leaky_gradient(coarse, tl.load(coarse_out_ptr + start + offsets, mask=mask, other=0.0), SLOPE)
        if NORMALIZE:
            coarse = _normalized(coarse, mean, inverse, norm_weight, norm_bias, SLOPE)  # patches are 0 beyond the rows
        patches = _patches(
            fine_ptr, fine_out_ptr, first, rows, HEIGHT, WIDTH, C, LEAD, WINDOW, TANH_GRADIENT, BLOCK_ROWS
        )
        total = tl.dot(tl.trans(coarse), patches, total, input_precision=PRECISION)
    tap = tl.arange(0, 4 * WINDOW)
    partial = partial_ptr + (split * K + cols)[:, None] * (4 * WINDOW) + tap[None, :]
    tl.store(partial, total, mask=(cols < K)[:, None])


@triton.jit
def add_splits(
    partial_ptr,  # [SPLITS, K, 4 * WINDOW]
    dweight_ptr,  # [K, 4, 4, C]
    C: tl.constexpr,
    K: tl.constexpr,
    LEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < K * 16 * C
    source = place // (4 * C) * WINDOW + LEAD + place % (4 * C)
    split = tl.arange(0, SPLITS_POW2)[:, None]
    mask = (split < SPLITS) & inside[None, :]
    partial = tl.load(partial_ptr + split * (K * 4 * WINDOW) + source[None, :], mask=mask, other=0.0)
    tl.store(dweight_ptr + place, tl.sum(partial, axis=0).to(dweight_ptr.dtype.element_ty), mask=inside)
