# mypy: disable-error-code="misc,no-untyped-def,no-untyped-call,untyped-decorator"
"""The Triton kernels of `batch_norm_act`: two launches forward, two backward, no atomics, the same bits every time.

A channels_last tensor is a matrix of rows (sample, height, width) and C columns, and a group is a run of rows. The
matrix is cut into tiles of BLOCK_ROWS x BLOCK_COLS; a program walks TURNS tiles, down in the first launch of a pass and
up in the second, and SPLITS programs share the rows of one group:

    statistics   reads x; each program writes the mean and the squared deviations of its rows (partials)
    normalize    combines the partials of its channels, reads x, writes y; one program a channel block also writes
                 mean and inverse deviation, and moves the running statistics
    sums         reads x and dy; each program writes the two sums of the backward pass over its rows (partials)
    gradient     combines the partials, reads x and dy, writes dx; one program a channel block writes dweight and dbias

Sums are in float32 (float64 for a float64 x). The backward pass computes z again instead of reading a mask. It does so
from the same saved numbers, with the same explicit fused multiply-add, so its sign is the forward pass's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdcgan.kernels.plan import Plan, cut, splits_for

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200, and few enough partials to read again
STAGES = 3  # tiles on their way from memory at once
WARPS = 4


def plan(rows: int, channels: int, groups: int) -> Plan:
    """The cut for `groups` groups of `rows` rows each: what was fastest on an H200 for the layers of a DCGAN."""
    rows = max(rows, 1)  # an empty tensor, in evaluation mode, gets one split too
    block_cols = 16 if channels <= 16 else 64 if 32 < channels <= 128 else 32
    splits = splits_for(PROGRAMS, channels, groups, block_cols)
    block_rows = 4096 // block_cols
    while block_rows > 16 and block_rows // 2 * splits >= rows:  # small tensors: more programs before larger tiles
        block_rows //= 2
    return cut(rows, block_rows, block_cols, splits)


@triton.jit
def act_input(x, mean, inverse, weight, bias):
    """The activation's input z: one expression, so that every kernel sees the same sign."""
    return tl.fma(x - mean, tl.broadcast_to(inverse * weight, x.shape), tl.broadcast_to(bias, x.shape))


@triton.jit
def act(z, SLOPE: tl.constexpr):
    """ReLU written so that NaN stays NaN and minus infinity becomes 0."""
    return tl.where(z <= 0.0, 0.0, z) if SLOPE == 0.0 else tl.where(z > 0.0, z, z * SLOPE)


@triton.jit
def _combine(
    partial_mean_ptr,  # [GROUPS, SPLITS, C]
    partial_m2_ptr,  # [GROUPS, SPLITS, C]
    group,
    cols,  # [BLOCK_COLS]
    rows,  # of a group
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits combined at once
    ROWS_PER_SPLIT: tl.constexpr,
):
    """Mean and squared deviations of a group's channels from those of its splits (Chan, Golub and LeVeque 1983)."""
    partial = (group * SPLITS) * C + cols[None, :]
    split = tl.arange(0, CHUNK)[:, None]
    first_mean = tl.load(partial_mean_ptr + partial + split * C, mask=(split < SPLITS) & (cols[None, :] < C), other=0.0)
    # Relative to the mean of the first splits: a sum of large near-equal numbers would lose what tells them apart.
    centre = tl.sum(first_mean, axis=0)[None, :] / tl.minimum(SPLITS, CHUNK)
    total = tl.zeros(first_mean.shape, first_mean.dtype)
    squares = tl.zeros(first_mean.shape, first_mean.dtype)
    for start in range(0, SPLITS, CHUNK):
        mask = (split < SPLITS - start) & (cols[None, :] < C)
        mean = tl.load(partial_mean_ptr + partial + (start + split) * C, mask=mask, other=0.0)
        m2 = tl.load(partial_m2_ptr + partial + (start + split) * C, mask=mask, other=0.0)
        count = tl.minimum(tl.maximum(rows - (start + split) * ROWS_PER_SPLIT, 0), ROWS_PER_SPLIT).to(mean.dtype)
        away = tl.where(mask, mean - centre, 0.0)
        total += away * count
        squares += m2 + away * away * count
    shift = tl.sum(total, axis=0) / rows
    return tl.reshape(centre, cols.shape) + shift, tl.sum(squares, axis=0) - shift * shift * rows


@triton.jit
def statistics(
    x_ptr,  # [GROUPS, rows, C]
    partial_mean_ptr,  # [GROUPS, SPLITS, C]
    partial_m2_ptr,  # [GROUPS, SPLITS, C]
    rows,  # of a group
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    split, cols, group = tl.program_id(0), tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS), tl.program_id(2)
    start = split * (TURNS * BLOCK_ROWS)
    x_ptr += (group.to(tl.int64) * rows + start) * C
    row = tl.arange(0, BLOCK_ROWS)
    offsets = row[:, None] * C + cols[None, :]
    in_c = (cols < C)[None, :]
    # Each place in the tile sums what its values are above its first one: no exchange between threads inside the loop,
    # and nothing large to cancel. The first row of a split always exists.
    first = tl.load(x_ptr + cols, mask=cols < C, other=0.0).to(ACCUMULATOR)[None, :]
    own = tl.load(x_ptr + offsets, mask=(row < rows - start)[:, None] & in_c, other=0.0).to(ACCUMULATOR)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACCUMULATOR)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACCUMULATOR)
    for turn in tl.range(1, TURNS, num_stages=STAGES):
        x_ptr += BLOCK_ROWS * C
        mask = (row < rows - start - turn * BLOCK_ROWS)[:, None] & in_c
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        away = tl.where(mask, x - own, 0.0)
        total += away
        squares += away * away
    # Then the places are combined as the splits will be.
    left = tl.minimum(rows - start, TURNS * BLOCK_ROWS)  # rows of this split
    count = tl.maximum((left - row + BLOCK_ROWS - 1) // BLOCK_ROWS, 0).to(ACCUMULATOR)[:, None]  # of each place
    share = 1.0 / tl.maximum(count, 1.0)
    mean = own + total * share
    shift = tl.sum((mean - first) * count, axis=0)[None, :] / left
    away = mean - first - shift
    all_m2 = tl.sum(squares - total * total * share + away * away * count, axis=0)
    out = (group * SPLITS + split) * C + cols
    tl.store(partial_mean_ptr + out, tl.reshape(first + shift, cols.shape), mask=cols < C)
    tl.store(partial_m2_ptr + out, all_m2, mask=cols < C)


@triton.jit
def normalize(
    x_ptr,  # [GROUPS, rows, C]
    y_ptr,  # [GROUPS, rows, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    partial_mean_ptr,  # [GROUPS, SPLITS, C]; not read in evaluation mode
    partial_m2_ptr,  # [GROUPS, SPLITS, C]; not read in evaluation mode
    mean_ptr,  # [GROUPS, C]
    inverse_ptr,  # [GROUPS, C]
    rows,  # of a group
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits combined at once
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    TRAINING: tl.constexpr,
    MOMENTUM: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
):
    split, cols, group = tl.program_id(0), tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS), tl.program_id(2)
    in_c = cols < C
    if split == tl.num_programs(0) - 1:  # beyond the last split, so that no program with rows takes longer for this
        if TRAINING and group == 0:
            running_mean = tl.load(running_mean_ptr + cols, mask=in_c, other=0.0)
            running_var = tl.load(running_var_ptr + cols, mask=in_c, other=0.0)
            for each in range(GROUPS):  # in order
                batch_mean, batch_m2 = _combine(
                    partial_mean_ptr, partial_m2_ptr, each, cols, rows, C, SPLITS, CHUNK, TURNS * BLOCK_ROWS
                )
                running_mean = running_mean * (1 - MOMENTUM) + batch_mean * MOMENTUM
                running_var = running_var * (1 - MOMENTUM) + batch_m2 / (rows - 1) * MOMENTUM
            tl.store(running_mean_ptr + cols, running_mean, mask=in_c)
            tl.store(running_var_ptr + cols, running_var, mask=in_c)
        return
    start = split * (TURNS * BLOCK_ROWS)
    weight = tl.load(weight_ptr + cols, mask=in_c, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=in_c, other=0.0)
    if TRAINING:
        mean, m2 = _combine(partial_mean_ptr, partial_m2_ptr, group, cols, rows, C, SPLITS, CHUNK, TURNS * BLOCK_ROWS)
        var = m2 / rows
    else:
        mean = tl.load(running_mean_ptr + cols, mask=in_c, other=0.0)
        var = tl.load(running_var_ptr + cols, mask=in_c, other=1.0)
    inverse = 1.0 / tl.sqrt(var + EPS)
    if split == 0:
        tl.store(mean_ptr + group * C + cols, mean, mask=in_c)
        tl.store(inverse_ptr + group * C + cols, inverse, mask=in_c)
    last_tile = group.to(tl.int64) * rows + start + (TURNS - 1) * BLOCK_ROWS
    x_ptr += last_tile * C
    y_ptr += last_tile * C
    row = tl.arange(0, BLOCK_ROWS)
    for done in tl.range(TURNS, num_stages=STAGES):  # upwards: what `statistics` read last may still be in L2
        mask = (row < rows - start - (TURNS - 1 - done) * BLOCK_ROWS)[:, None] & in_c[None, :]
        offsets = row[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        z = act_input(x, mean[None, :], inverse[None, :], weight[None, :], bias[None, :])
        tl.store(y_ptr + offsets, act(z, SLOPE).to(y_ptr.dtype.element_ty), mask=mask)
        x_ptr -= BLOCK_ROWS * C
        y_ptr -= BLOCK_ROWS * C


@triton.jit
def sums(
    x_ptr,  # [GROUPS, rows, C]
    dy_ptr,  # [GROUPS, rows, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [GROUPS, C]
    inverse_ptr,  # [GROUPS, C]
    partial_dz_ptr,  # [GROUPS, SPLITS, C]
    partial_dzx_ptr,  # [GROUPS, SPLITS, C]
    rows,  # of a group
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    SLOPE: tl.constexpr,
):
    split, cols, group = tl.program_id(0), tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS), tl.program_id(2)
    start = split * (TURNS * BLOCK_ROWS)
    in_c = cols < C
    weight = tl.load(weight_ptr + cols, mask=in_c, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=in_c, other=0.0)[None, :]
    mean = tl.load(mean_ptr + group * C + cols, mask=in_c, other=0.0)[None, :]
    inverse = tl.load(inverse_ptr + group * C + cols, mask=in_c, other=0.0)[None, :]
    first_row = group.to(tl.int64) * rows + start
    x_ptr += first_row * C
    dy_ptr += first_row * C
    row = tl.arange(0, BLOCK_ROWS)
    sum_dz = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACCUMULATOR)
    sum_dzx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACCUMULATOR)
    for turn in tl.range(TURNS, num_stages=STAGES):
        mask = (row < rows - start - turn * BLOCK_ROWS)[:, None] & in_c[None, :]
        offsets = row[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        z = act_input(x, mean, inverse, weight, bias)
        dz = tl.where(z > 0.0, dy, dy * SLOPE)  # 0 outside the mask, where dy is 0
        sum_dz += dz
        sum_dzx += dz * ((x - mean) * inverse)
        x_ptr += BLOCK_ROWS * C
        dy_ptr += BLOCK_ROWS * C
    out = (group * SPLITS + split) * C + cols
    tl.store(partial_dz_ptr + out, tl.sum(sum_dz, axis=0), mask=in_c)
    tl.store(partial_dzx_ptr + out, tl.sum(sum_dzx, axis=0), mask=in_c)


@triton.jit
def _total(
    partial_ptr,  # [GROUPS, SPLITS, C]
    group,
    cols,  # [BLOCK_COLS]
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits combined at once
):
    split = tl.arange(0, CHUNK)[:, None]
    total = tl.zeros([CHUNK, cols.shape[0]], partial_ptr.dtype.element_ty)
    for start in range(0, SPLITS, CHUNK):
        mask = (split < SPLITS - start) & (cols[None, :] < C)
        total += tl.load(partial_ptr + (group * SPLITS + start + split) * C + cols[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def gradient(
    x_ptr,  # [GROUPS, rows, C]
    dy_ptr,  # [GROUPS, rows, C]
    dx_ptr,  # [GROUPS, rows, C]; may be dy_ptr: an element is read before it is written, and by no other program
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [GROUPS, C]
    inverse_ptr,  # [GROUPS, C]
    partial_dz_ptr,  # [GROUPS, SPLITS, C]
    partial_dzx_ptr,  # [GROUPS, SPLITS, C]
    dweight_ptr,  # [C]
    dbias_ptr,  # [C]
    rows,  # of a group
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits combined at once
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    TRAINING: tl.constexpr,
    SLOPE: tl.constexpr,
):
    split, cols, group = tl.program_id(0), tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS), tl.program_id(2)
    start = split * (TURNS * BLOCK_ROWS)
    in_c = cols < C
    if split == tl.num_programs(0) - 1:  # beyond the last split, as in `normalize`
        if group == 0:
            dbias = tl.zeros([BLOCK_COLS], ACCUMULATOR)
            dweight = tl.zeros([BLOCK_COLS], ACCUMULATOR)
            for each in range(GROUPS):
                dbias += _total(partial_dz_ptr, each, cols, C, SPLITS, CHUNK)
                dweight += _total(partial_dzx_ptr, each, cols, C, SPLITS, CHUNK)
            tl.store(dbias_ptr + cols, dbias, mask=in_c)
            tl.store(dweight_ptr + cols, dweight, mask=in_c)
        return
    weight = tl.load(weight_ptr + cols, mask=in_c, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=in_c, other=0.0)[None, :]
    mean = tl.load(mean_ptr + group * C + cols, mask=in_c, other=0.0)[None, :]
    inverse = tl.load(inverse_ptr + group * C + cols, mask=in_c, other=0.0)[None, :]
    if TRAINING:
        mean_dz = _total(partial_dz_ptr, group, cols, C, SPLITS, CHUNK)[None, :] / rows
        mean_dzx = _total(partial_dzx_ptr, group, cols, C, SPLITS, CHUNK)[None, :] / rows
    last_tile = group.to(tl.int64) * rows + start + (TURNS - 1) * BLOCK_ROWS
    x_ptr += last_tile * C
    dy_ptr += last_tile * C
    dx_ptr += last_tile * C
    row = tl.arange(0, BLOCK_ROWS)
    for done in tl.range(TURNS, num_stages=STAGES):  # upwards: what `sums` read last may still be in L2
        mask = (row < rows - start - (TURNS - 1 - done) * BLOCK_ROWS)[:, None] & in_c[None, :]
        offsets = row[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        dx = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACCUMULATOR)
        z = act_input(x, mean, inverse, weight, bias)
        dx = tl.where(z > 0.0, dx, dx * SLOPE)
        if TRAINING:  # the statistics depend on x too
            dx -= mean_dz + (x - mean) * inverse * mean_dzx
        dx *= inverse * weight
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        x_ptr -= BLOCK_ROWS * C
        dy_ptr -= BLOCK_ROWS * C
        dx_ptr -= BLOCK_ROWS * C
