# mypy: disable-error-code="misc,no-untyped-def,no-untyped-call,untyped-decorator"
"""Three ways to spend less on BatchNorm + LeakyReLU than two launches and two reads, tried beside what is shipped.

    python -m fastdcgan.bench.next_kernels --json bench/results/next-kernels.json

    epilogue      the convolution before it leaves the statistics too: their pass, a launch and a read of x, is gone,
                  if a k4 s2 convolution in Triton is not that much slower than cuDNN's
    dependent     programmatic dependent launch: `normalize` is set up while `statistics` still runs (sm_90 and later)
    cooperative   one launch, in which all programs wait for one another between the two passes

None is part of the product. Each must give the right numbers before it is timed, inside a CUDA graph, in the shapes of
the 64-pixel discriminator with its real and fake images in one batch. `saved` are the bytes of the pass that is gone
less those of its partial results, and the time they take at the speed of a copy measured beside it: the most that
`epilogue` can gain besides a launch.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdcgan.bench.environment import describe, write_json
from fastdcgan.kernels import batch_norm_act, batch_norm_act_op
from fastdcgan.kernels import batch_norm_act_triton as kernels

LAYERS = [(64, 128, 32), (128, 256, 16), (256, 512, 8)]  # channels in and out, pixels a side of the input
BATCHES = [128, 1024]
MULTIPROCESSORS = 132  # of an H100 and an H200: as many programs convolve at once
MOMENTUM, EPS, SLOPE = 0.1, 1e-5, 0.2
OPTIONS: dict[str, Any] = {"training": True, "momentum": MOMENTUM, "eps": EPS, "negative_slope": SLOPE}


def plan(rows: int, channels: int, groups: int) -> kernels.Plan:
    """The cut of a convolution's output, `groups` groups of `rows` rows each: one wave of programs."""
    block_rows, block_cols = 128, min(128, triton.next_power_of_2(channels))
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(channels, block_cols) * groups
    turns = triton.cdiv(tiles, MULTIPROCESSORS)
    return kernels.Plan(block_rows, block_cols, turns, triton.cdiv(rows, block_rows * turns))


@triton.jit
def convolve(
    x_ptr,  # [GROUPS, rows of samples, 2 * HEIGHT, 2 * WIDTH, C_IN]
    weight_ptr,  # [C, 4, 4, C_IN]
    y_ptr,  # [GROUPS, rows, C]
    partial_mean_ptr,  # [GROUPS, SPLITS, C]
    partial_m2_ptr,  # [GROUPS, SPLITS, C]
    rows,  # of a group: samples x HEIGHT x WIDTH
    HEIGHT: tl.constexpr,  # of y
    WIDTH: tl.constexpr,
    C_IN: tl.constexpr,  # a multiple of BLOCK_K
    BLOCK_K: tl.constexpr,
    STATISTICS: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """y = k4 s2 p1 convolution of x as a matrix product whose left side is gathered; the partials are those of y."""
    split, cols, group = tl.program_id(0), tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS), tl.program_id(2)
    in_c = cols < C
    x_ptr += group.to(tl.int64) * rows * (4 * C_IN)  # each of y's rows stands for four of x's pixels
    y_ptr += group.to(tl.int64) * rows * C
    place = tl.arange(0, BLOCK_K)
    count = 0.0
    mean = tl.zeros([BLOCK_COLS], ACCUMULATOR)
    m2 = tl.zeros([BLOCK_COLS], ACCUMULATOR)
    for turn in range(TURNS):
        row = (split * TURNS + turn) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        sample, top, left = row // (HEIGHT * WIDTH), row // WIDTH % HEIGHT * 2 - 1, row % WIDTH * 2 - 1
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACCUMULATOR)
        for step in range(16 * C_IN // BLOCK_K):
            tap = step * BLOCK_K // C_IN
            h, w = top + tap // 4, left + tap % 4
            valid = inside & (h >= 0) & (h < 2 * HEIGHT) & (w >= 0) & (w < 2 * WIDTH)
            pixel = (sample * (2 * HEIGHT) + h) * (2 * WIDTH) + w
            a = tl.load(
                x_ptr + pixel[:, None] * C_IN + (step * BLOCK_K - tap * C_IN + place)[None, :],
                mask=valid[:, None],
                other=0.0,
            )
            b = tl.load(
                weight_ptr + cols[None, :] * (16 * C_IN) + (step * BLOCK_K + place)[:, None],
                mask=in_c[None, :],
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision="ieee")
        y = total.to(y_ptr.dtype.element_ty)
        mask = inside[:, None] & in_c[None, :]
        tl.store(y_ptr + row[:, None] * C + cols[None, :], y, mask=mask)
        if STATISTICS:  # of y as it was stored; tiles are combined as Chan, Golub and LeVeque (1983) do
            stored = tl.where(mask, y.to(ACCUMULATOR), 0.0)
            here = tl.sum(inside.to(ACCUMULATOR), axis=0)
            tile_mean = tl.sum(stored, axis=0) / tl.maximum(here, 1.0)
            away = tl.where(mask, stored - tile_mean[None, :], 0.0)
            both = count + here
            shift = tile_mean - mean
            m2 += tl.sum(away * away, axis=0) + shift * shift * (count * here / both)
            mean += shift * (here / both)
            count = both
    if STATISTICS:
        out = (group * SPLITS + split) * C + cols
        tl.store(partial_mean_ptr + out, mean, mask=in_c)
        tl.store(partial_m2_ptr + out, m2, mask=in_c)


def convolution(
    x: Tensor, weight: Tensor, groups: int, statistics: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], kernels.Plan]:
    """A k4 s2 p1 convolution, with the partial statistics of each of `groups` slices of its result.

    Args:
        x: (N, C_in, 2h, 2w) channels_last, below 2^31 elements; C_in a multiple of 64, or less and a power of two.
        weight: (C_out, C_in, 4, 4) channels_last, of x's dtype.
        statistics: False leaves the partials as they are.

    Returns:
        y (N, C_out, h, w) channels_last; means and squared deviations (groups, splits, C_out) float32; the plan.
    """
    samples, channels_in, height, width = x.shape
    channels_out = len(weight)
    if x.numel() >= 2**31:
        raise ValueError(f"x has {x.numel():,} elements, more than 32 bits can count")
    y = x.new_empty((samples, channels_out, height // 2, width // 2)).contiguous(memory_format=torch.channels_last)
    shared = plan(y.numel() // (channels_out * groups), channels_out, groups)
    mean = torch.empty((groups, shared.splits, channels_out), dtype=torch.float32, device=x.device)
    m2 = torch.empty_like(mean)
    rows, grid, cut = batch_norm_act_op.launch_cut(shared, y, groups, shared.splits, torch.float32)
    convolve[grid](
        x,
        weight,
        y,
        mean,
        m2,
        rows,
        HEIGHT=height // 2,
        WIDTH=width // 2,
        C_IN=channels_in,
        BLOCK_K=min(64, channels_in),
        STATISTICS=statistics,
        num_stages=3,
        **cut | {"num_warps": 8},
    )
    return y, (mean, m2), shared


Parameters = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, bias, running mean, running variance: (C,) float32


def epilogue(x: Tensor, conv_weight: Tensor, parameters: Parameters, groups: int) -> Tensor:
    """BatchNorm and LeakyReLU of a convolution that brings its own statistics."""
    y, partial, shared = convolution(x, conv_weight, groups, statistics=True)
    # `normalize` takes the partials for those of its own splits, so its splits have as many rows.
    narrow = shared._replace(block_cols=32)
    launch = batch_norm_act_op.launch_normalize
    return launch(y, *parameters, partial, True, MOMENTUM, EPS, SLOPE, narrow)[0]


@triton.jit
def statistics_and_release(
    x_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    rows,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    gdc_launch_dependents()  # the next kernel's programs may take their places; they wait for all of this one
    kernels.statistics(
        x_ptr, partial_mean_ptr, partial_m2_ptr, rows, C, SPLITS, TURNS, BLOCK_ROWS, BLOCK_COLS, STAGES, ACCUMULATOR
    )


@triton.jit
def normalize_in_turn(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    partial_mean_ptr,
    partial_m2_ptr,
    mean_ptr,
    inverse_ptr,
    rows,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    counter_ptr,  # [1] int32, unused if not ONE_LAUNCH: how often a program has arrived
    ONE_LAUNCH: tl.constexpr,
):
    """`normalize` after all programs have their statistics: of this launch, or of the one before."""
    if ONE_LAUNCH:
        if tl.program_id(0) < SPLITS:  # not the one for the running statistics
            kernels.statistics(
                x_ptr, partial_mean_ptr, partial_m2_ptr, rows, C, SPLITS, TURNS, BLOCK_ROWS, BLOCK_COLS, STAGES, ACCUMULATOR
            )
        tl.debug_barrier()  # all of this program's partials are written
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        # The counter is never set back: each launch waits for the next multiple.
        awaited = (tl.atomic_add(counter_ptr, 1, sem="acq_rel") // programs + 1) * programs
        while tl.atomic_add(counter_ptr, 0, sem="acq_rel") < awaited:
            pass
        tl.debug_barrier()
    else:
        gdc_wait()
    kernels.normalize(
        x_ptr, y_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, partial_mean_ptr, partial_m2_ptr,
        mean_ptr, inverse_ptr, rows, C, GROUPS, SPLITS, CHUNK, TURNS, BLOCK_ROWS, BLOCK_COLS, STAGES,
        ACCUMULATOR, True, MOMENTUM, EPS, SLOPE,
    )  # fmt: skip


def in_turn(x: Tensor, parameters: Parameters, groups: int, counter: Tensor | None) -> Tensor:
    """BatchNorm and LeakyReLU of x (N, C, h, w) by dependent launches; with a counter (int32, once 0) in one launch."""
    shared = batch_norm_act_op.plan_for(x, groups)
    weight, bias, running_mean, running_var = parameters
    mean, inverse = (weight.new_empty((groups, x.shape[1])) for _ in range(2))
    partial_mean, partial_m2 = (weight.new_empty((groups, shared.splits, x.shape[1])) for _ in range(2))
    y = torch.empty_like(x)
    rows, grid, cut = batch_norm_act_op.launch_cut(shared, x, groups, shared.splits, weight.dtype)
    if counter is None:
        statistics_and_release[grid](x, partial_mean, partial_m2, rows, **cut)
    normalize_in_turn[grid[0] + 1, *grid[1:]](
        x,
        y,
        weight,
        bias,
        running_mean,
        running_var,
        partial_mean,
        partial_m2,
        mean,
        inverse,
        rows,
        GROUPS=groups,
        CHUNK=min(64, triton.next_power_of_2(shared.splits)),
        MOMENTUM=MOMENTUM,
        EPS=EPS,
        SLOPE=SLOPE,
        counter_ptr=counter,
        ONE_LAUNCH=counter is not None,
        launch_pdl=counter is None,
        launch_cooperative_grid=counter is not None,
        **cut,
    )
    return y


def saved_bytes(y: Tensor, groups: int) -> int:
    """One read of y, less its partials written and, by every program of `normalize`, read: once from memory."""
    splits = plan(y.numel() // (y.shape[1] * groups), y.shape[1], groups).splits
    return y.numel() * y.element_size() - 2 * 2 * 4 * groups * splits * y.shape[1]


def measure(batch: int, channels_in: int, channels_out: int, side: int, groups: int) -> dict[str, Any]:
    """One layer: milliseconds of every way, what is saved, and how far each way is from the shipped one's numbers."""
    from triton.testing import do_bench_cudagraph

    device = torch.device("cuda")
    x = torch.randn(batch, channels_in, side, side, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    filters = torch.randn(channels_out, channels_in, 4, 4, device=device).div_((16 * channels_in) ** 0.5)
    filters = filters.to(torch.bfloat16, memory_format=torch.channels_last)
    parameters = (
        torch.rand(channels_out, device=device) + 0.5,
        torch.randn(channels_out, device=device),
        torch.zeros(channels_out, device=device),
        torch.ones(channels_out, device=device),
    )
    counter = torch.zeros(1, dtype=torch.int32, device=device)

    def cudnn() -> Tensor:
        return torch.nn.functional.conv2d(x, filters, stride=2, padding=1)

    y = cudnn()
    shipped = functools.partial(batch_norm_act, backend="triton", groups=groups, **OPTIONS)
    ways: dict[str, Callable[[], Tensor]] = {
        "convolution, cuDNN": cudnn,
        "convolution, Triton": lambda: convolution(x, filters, groups, statistics=False)[0],
        "BatchNorm, shipped": lambda: shipped(y, *parameters),
        "BatchNorm, dependent": lambda: in_turn(y, parameters, groups, None),
        "BatchNorm, cooperative": lambda: in_turn(y, parameters, groups, counter),
        "both, cuDNN and shipped": lambda: shipped(cudnn(), *parameters),
        "both, epilogue": lambda: epilogue(x, filters, parameters, groups),
        "copy of y": y.clone,
    }
    expected = {"convolution": y.float(), "BatchNorm": shipped(y, *parameters).float()}
    expected["both"] = expected["BatchNorm"]
    found: dict[str, Any] = {}
    for name, run in ways.items():
        try:
            away = 0.0
            if (what := name.split(",")[0]) in expected:
                away = ((run().float() - expected[what]).norm() / expected[what].norm()).item()
                if not away < 2**-7:  # bfloat16 holds 2^-9 of a value; two roundings and a kink may lie between
                    raise ValueError(f"wrong by {away:.2g}, so not timed")
            found[name] = {"ms": do_bench_cudagraph(run, rep=20, return_mode="median"), "away": away}
        except Exception as error:  # one way that cannot run here must not hide the others
            found[name] = {"error": str(error)[:300]}
        print(f"{batch}x{channels_in}x{side}x{side} to {channels_out}: {name:26} {found[name]}", flush=True)
    saved = saved_bytes(y, groups)
    if "ms" in found["copy of y"]:
        found["saved"] = {"bytes": saved, "ms": found["copy of y"]["ms"] * saved / (2 * y.numel() * y.element_size())}
    return {"batch": batch, "channels": [channels_in, channels_out], "side": side, "groups": groups, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        for channels_in, channels_out, side in LAYERS:
            for batch in BATCHES:
                y = torch.empty((2 * batch, channels_out, side // 2, side // 2), dtype=torch.bfloat16, device="meta")
                saved, flops = saved_bytes(y, 2), 2 * y.numel() * channels_in * 16
                print(f"batch 2 x {batch}, {channels_in} to {channels_out} channels: saves {saved / 1e6:.1f} MB of")
                print(f"    {3 * y.numel() * 2 / 1e6:.1f} that BatchNorm forward moves, beside {flops / 1e9:.1f} GFLOP")
        raise SystemExit("no GPU here: these are the predicted bytes; times need one")
    result = describe(torch.device("cuda"), f"python -m fastdcgan.bench.next_kernels --json {options.json}")
    result |= {"measured": "next kernels", "rows": []}
    for batch in BATCHES:
        for channels_in, channels_out, side in LAYERS:
            result["rows"].append(measure(2 * batch, channels_in, channels_out, side, 2))
            write_json(options.json, result)  # after every layer: the run may be cut short


if __name__ == "__main__":
    main()
