"""Other ways to cut the tensors of `batch_norm_act` into programs, against the one that `plan` gives. Needs a GPU.

    python -m fastdcgan.bench.batch_norm_cuts [--layers 128x256x4x4 1024x256x16x16] --json cuts.json

For another GPU than an H200, or layers that were not measured; by default two that are larger than L2 and furthest from
a copy's bandwidth there, and those that the dispatcher leaves to torch.compile, which was faster, each as so many
samples of one pixel. Where a cut is faster, `plan` in `kernels/batch_norm_act_triton.py` is the place for it. Times are
of both launches forward and of all four, median, many in one CUDA graph one after another. A cut changes the last bits
of the statistics and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.kernels import batch_norm_act_op as op
from fastdcgan.kernels.batch_norm_act import COMPILED_IS_FASTER
from fastdcgan.kernels.batch_norm_act_triton import plan
from fastdcgan.kernels.plan import Plan, cut, splits_for

LAYERS = ["1024x512x8x8", "1024x128x16x16"] + [f"{rows}x{channels}x1x1" for rows, channels in COMPILED_IS_FASTER]
COLUMNS, TILES, PROGRAMS = (16, 32, 64, 128, 256), (2048, 4096, 8192), (66, 132, 264, 528)


def candidates(rows: int, channels: int, groups: int) -> list[Plan]:
    """The shipped cut, and those that differ from it in one respect: columns, elements of a tile, or programs."""
    shipped = plan(rows, channels, groups)
    tile = shipped.block_rows * shipped.block_cols
    programs = shipped.splits * -(-channels // shipped.block_cols) * groups

    def make(block_cols: int, tile: int, programs: int) -> Plan:
        return cut(rows, tile // block_cols, block_cols, splits_for(programs, channels, groups, block_cols))

    others = [make(cols, tile, programs) for cols in COLUMNS if cols < 2 * channels]
    others += [make(shipped.block_cols, each, programs) for each in TILES]
    others += [make(shipped.block_cols, tile, each) for each in PROGRAMS]
    return list(dict.fromkeys([shipped, *others]))


def runs(shape: tuple[int, int, int, int], groups: int, device: torch.device) -> Callable[[Plan], dict[str, Any]]:
    """For a cut of a bfloat16 layer: what runs its forward pass, and both passes."""
    channels = shape[1]
    x, gradient = (
        torch.randn(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    # Weights below 1, as `both` turns its own gradient over and over: it must not grow beyond all numbers.
    weight, bias, running_mean, running_var = (torch.rand(channels, device=device) / 2 + 0.5 for _ in range(4))

    def of(cut: Plan) -> dict[str, Any]:
        def forward() -> tuple[Tensor, Tensor, Tensor]:
            return op.launch_forward(x, weight, bias, running_mean, running_var, True, 0.1, 1e-5, 0.2, groups, cut)

        def both() -> None:
            _, mean, inverse = forward()
            # In place, as in a compiled step; what becomes of the values takes no other time.
            op.launch_backward(x, gradient, gradient, weight, bias, mean, inverse, True, 0.2, cut)

        return {"forward": forward, "both": both}

    return of


def microseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    return 1000 * float(do_bench_cudagraph(run, rep=2, return_mode="median"))


def measure(layer: str, groups: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each cut of a layer, the shipped one first."""
    n, channels, height, width = map(int, layer.split("x"))
    rows = n * height * width // groups
    of = runs((n, channels, height, width), groups, device)
    found = []
    for each in candidates(rows, channels, groups):
        times = {which: microseconds(run) for which, run in of(each).items()}
        found.append({"layer": layer, "groups": groups, **each._asdict(), "microseconds": times})
        ratios = {which: found[0]["microseconds"][which] / time for which, time in times.items()}
        print(
            f"{layer:>16} {each.block_rows:4} x {each.block_cols:3}, {each.turns:4} turns, {each.splits:4} splits  "
            + "  ".join(f"{which} {time:7.2f} us x{ratios[which]:.2f}" for which, time in times.items()),
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="NxCxHxW each (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=1, help="statistics per slice of N (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the kernels run on a GPU, and there is none here")
    device = torch.device("cuda")
    content = describe(device, command_line("batch_norm_cuts")) | {"measured": "BatchNorm cuts"}
    rows: list[dict[str, Any]] = []
    for layer in arguments.layers:
        rows += measure(layer, arguments.groups, device)
        if arguments.json:
            write_result(arguments.json, content | {"rows": rows})


if __name__ == "__main__":
    main()
