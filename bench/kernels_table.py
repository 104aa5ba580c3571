"""Every BatchNorm layer of the 32, 64 and 128-pixel networks: the fused kernels against eager torch and torch.compile.

    python -m fastdcgan.bench.kernels_table --json bench/results/kernels.json

Each time is a median. On a GPU two are taken, both inside CUDA graphs, where launches cost what they cost in a captured
step: `cold` with the L2 cache emptied before each run (`do_bench`), and `graph` with many runs in one graph, one after
another (`do_bench_cudagraph`). The bandwidth
counts the bytes that two passes over the data move: x twice and y once forward; both adds x and dy twice and dx once.
It is given beside that of a plain copy of the same tensor, timed the same way in the same run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.kernels import batch_norm_act

LAYERS = {  # image size: (channels, pixels a side) of each BatchNorm layer, width 64
    32: [(256, 4), (128, 8), (64, 16)],
    64: [(512, 4), (256, 8), (128, 16), (64, 32)],
    128: [(1024, 4), (512, 8), (256, 16), (128, 32), (64, 64)],
}
Operation = Callable[..., Tensor]
Shape = tuple[int, int, int, int]
BATCHES = [64, 128, 1024]
BEYOND_L2 = 120e6  # bytes: over twice the L2 cache of an H200
TUNED: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 12,
    "triton.force_cooperative_reductions": True,
}  # the options with which Inductor moved the fewest bytes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def variants(device: str) -> dict[str, Operation]:
    """Name -> function with batch_norm_act's signature."""
    eager: Operation = functools.partial(batch_norm_act, backend="reference")
    found: dict[str, Operation] = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}
    if device == "cuda":
        found["tuned"] = torch.compile(eager, dynamic=False, options=TUNED)
        found["fused"] = functools.partial(batch_norm_act, backend="triton")
    return found


def layer(
    shape: Shape, dtype: torch.dtype, device: str, groups: int
) -> tuple[dict[str, tuple[Callable[[Operation], Any], int]], Callable[[], Tensor], int]:
    """For the forward pass and for both: what runs an operation, and the bytes it moves; a copy, and its bytes."""
    channels = shape[1]
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.rand(channels, device=device, requires_grad=True) for _ in range(2))
    running_mean, running_var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    dy = torch.randn_like(x)

    def forward(operation: Operation) -> Tensor:
        return operation(x, weight, bias, running_mean, running_var, training=True, negative_slope=0.2, groups=groups)

    def both(operation: Operation) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(operation), (x, weight, bias), dy)

    once = x.numel() * x.element_size()
    copy = functools.partial(torch.empty_like(x, requires_grad=False).copy_, x.detach())
    return {"forward": (forward, 3 * once), "both": (both, 8 * once)}, copy, 2 * once


def milliseconds(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Timer -> median milliseconds of run()."""
    if device == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        run()  # compiles here, not inside the capture
        torch.cuda.synchronize()
        once = torch.cuda.CUDAGraph()
        with torch.cuda.graph(once):
            run()
        return {
            "cold": do_bench(once.replay, warmup=5, rep=20, return_mode="median"),
            "graph": do_bench_cudagraph(run, rep=2, return_mode="median"),  # ten times so many milliseconds
        }
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return {"cpu": statistics.median(times)}


def measure(shapes: Sequence[Shape], dtype_name: str, device: str, groups: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of all shapes so far, after each shape."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        torch._dynamo.reset()
        passes, copy, copy_bytes = layer(shape, DTYPES[dtype_name], device, groups)
        copied = {timer: copy_bytes / ms / 1e6 for timer, ms in milliseconds(copy, device).items()}
        for (name, operation), (which, (run, count)) in itertools.product(variants(device).items(), passes.items()):
            try:
                times = milliseconds(functools.partial(run, operation), device)
            except Exception as error:  # one variant that a version of torch cannot compile must not end the run
                rows.append({"shape": list(shape), "variant": name, "pass": which, "error": str(error)[:500]})
                print(f"{shape} {name} {which}: {error}"[:300], flush=True)
                continue
            for timer, ms in times.items():
                rows.append(
                    {
                        "shape": list(shape),
                        "groups": groups,
                        "dtype": dtype_name,
                        "variant": name,
                        "pass": which,
                        "timer": timer,
                        "ms": ms,
                        "gb_per_s": count / ms / 1e6,
                        "copy_gb_per_s": copied[timer],
                        "fraction_of_copy": count / ms / 1e6 / copied[timer],
                    }
                )
                print(line(rows[-1]), flush=True)
        yield rows


def line(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    return (
        f"{shape:>18} {row['dtype']} groups {row['groups']}  {row['variant']:>8} {row['pass']:>7} {row['timer']:>5} "
        f"{row['ms']:9.4f} ms {row['gb_per_s']:8.1f} GB/s {row['fraction_of_copy']:6.1%} of a copy"
    )


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows say of `fused`: where another is faster, and how near to a copy it comes on tensors beyond L2."""
    timed = [row for row in rows if "ms" in row]
    lines = []
    for row in (row for row in timed if row["variant"] == "fused"):
        same = [
            other
            for other in timed
            if all(other[key] == row[key] for key in ("shape", "groups", "dtype", "pass", "timer"))
        ]
        fastest = min(same, key=lambda other: other["ms"])
        if fastest["ms"] < row["ms"]:
            lines.append(f"{line(row)}; {fastest['variant']} takes {fastest['ms'] / row['ms']:.0%} of that")
    beyond = [
        row
        for row in timed
        if row["variant"] == "fused" and math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize > BEYOND_L2
    ]
    for which in ("forward", "both"):
        found = [row["fraction_of_copy"] for row in beyond if row["pass"] == which and row["timer"] == "cold"]
        if found:
            lines.append(f"{which}, larger than L2: {min(found):.0%} to {max(found):.0%} of a copy's bandwidth")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and y (default: %(default)s)")
    parser.add_argument(
        "--groups", type=int, default=1, help="statistics per slice of the batch (default: %(default)s)"
    )
    parser.add_argument("--image-sizes", type=int, nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [
        (n, c, side, side) for n in arguments.batches for size in arguments.image_sizes for c, side in LAYERS[size]
    ]
    if device == "cpu":
        print("no GPU here: one small layer, to show that this runs")
        shapes = [(8, 16, 8, 8)]
    command = command_line("kernels_table")
    content = describe(torch.device(device), command) | {"measured": "kernels"}
    for rows in measure(shapes, arguments.dtype, device, arguments.groups):
        if arguments.json:  # after every shape: compiling takes minutes, and the run may be cut short
            write_result(arguments.json, content | {"rows": rows})
    print("\n".join(verdict(rows)))


if __name__ == "__main__":
    main()
