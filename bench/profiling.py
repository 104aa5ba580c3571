"""Where the time and the memory of a training step go: `fastdcgan profile`.

Runs what a training run runs (the data path, the step, its executor) for a few steps after warm-up, under
torch.profiler or between cudaProfilerStart and cudaProfilerStop for Nsight; `profiles/README.md` has the recipes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastdcgan.bench.contenders import Shape, fast_step, quiet_compiler
from fastdcgan.console import say, spinner
from fastdcgan.data import open_dataset
from fastdcgan.errors import UserError, check_at_least
from fastdcgan.files import make_writable
from fastdcgan.spans import span

WARM_UP = 5  # steps; a CUDA graph is captured in the fourth
TABLE_ROWS = 25
NO_KERNELS = ("Memcpy", "Memset")  # how the names of what else runs on a GPU begin


def profile_training(
    *,
    data: str,
    image_size: tuple[int, int],
    batch_size: int,
    width: int,
    precision: str,
    device: torch.device,
    executor: str,
    steps: int,
    out: Path,
    nsight: bool,
) -> None:
    """Profile `steps` training steps.

    Writes to `out`: table.txt, the operators by their own time; trace.json, for chrome://tracing or
    https://ui.perfetto.dev; and the memory of one step: memory.pickle for https://pytorch.org/memory_viz on a GPU,
    memory.json (microseconds and live bytes) on a CPU. On a GPU also kernels.txt, the last step's kernels in order with
    their microseconds and the gap before each. With `nsight` nothing: Nsight writes its own report.

    Args:
        executor: "fast-eager", "fast-compiled" or "fast-captured".

    Raises:
        UserError: Nsight without a GPU, data that cannot be opened, a folder that cannot be written.
    """
    if nsight and device.type != "cuda":
        raise UserError("--nsight records a GPU and there is none here: leave it out to profile the CPU")
    for flag, value, least in (("--steps", steps, 1), ("--width", width, 1), ("--batch-size", batch_size, 2)):
        check_at_least(flag, value, least)
    if not nsight:
        make_writable(out, f"--out {out}")
    quiet_compiler()
    dataset = open_dataset(data, image_size=image_size, device=device)
    stream = dataset.stream(batch_size)
    shape = Shape(batch_size, image_size, dataset.channels, width=width)
    _, run = fast_step(shape, stream.source, stream.index, precision, executor, flip=dataset.flip)

    def step() -> None:
        with span("data path"):
            stream.advance()
        run()

    with spinner(f"warming up {executor} {precision}, batch {batch_size}, on {device.type}"):
        for _ in range(WARM_UP):
            step()
    if nsight:
        with_nsight(step, steps)
    else:
        try:
            with_torch_profiler(step, steps, device, out)
            memory_of(step, device, out)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    stream.close()


def with_nsight(step: Callable[[], None], steps: int) -> None:
    """Steps between cudaProfilerStart and cudaProfilerStop, with NVTX ranges for the spans and every operator."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with torch.autograd.profiler.emit_nvtx():
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def with_torch_profiler(step: Callable[[], None], steps: int, device: torch.device, out: Path) -> None:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=50)
    (out / "table.txt").write_text(table + "\n")
    profiler.export_chrome_trace(str(out / "trace.json"))
    print(table)
    if on_gpu:
        lines, summary = in_order(device_spans(profiler), steps)
        (out / "kernels.txt").write_text("\n".join([*lines, summary]) + "\n")
        print(summary)
    say(f"{out / 'table.txt'} has this table; open {out / 'trace.json'} in https://ui.perfetto.dev")


def device_spans(profiler: profile) -> list[tuple[float, float, str]]:
    """Begin and end in microseconds, and name, of every kernel and copy that the profiler saw on a GPU."""
    on_device = [e for e in profiler.events() if e.device_type.name == "CUDA" and not e.is_user_annotation]  # no spans
    return [(e.time_range.start, e.time_range.end, e.name) for e in on_device]


def in_order(spans: list[tuple[float, float, str]], steps: int) -> tuple[list[str], str]:
    """The kernels of the last of `steps` equal steps, a line each, and the sums of all steps.

    Args:
        spans: as from `device_spans`, in any order.
    """
    spans = sorted(spans)
    last = spans[-(len(spans) // steps) :]
    lines, end = [], last[0][0]
    for begin, ends, name in last:
        lines.append(f"{ends - begin:9.2f} us after {begin - end:7.2f}  {name}")
        end = ends
    busy = sum(ends - begin for begin, ends, _ in spans) / steps
    lasts = (max(ends for _, ends, _ in spans) - spans[0][0]) / steps
    return lines, f"a step: {len(spans) / steps:.1f} kernels, busy {busy:,.0f} us of {lasts:,.0f}"


def memory_of(step: Callable[[], None], device: torch.device, out: Path) -> None:
    """What one step allocates, and when."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history()
        step()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
        say(f"drop {out / 'memory.pickle'} on https://pytorch.org/memory_viz")
        return
    timeline = live_bytes(step)
    (out / "memory.json").write_text(json.dumps({"columns": ["microseconds", "live bytes"], "rows": timeline}) + "\n")
    peak = max(live for _, live in timeline) / 2**20
    say(f"a step allocates at most {peak:,.0f} MiB beyond what lives longer; {out / 'memory.json'} has its course")


def live_bytes(step: Callable[[], None]) -> list[tuple[int, int]]:
    """After every allocation on the CPU in one step: microseconds since its first, bytes beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    records = profiler.profiler.kineto_results.events()
    changes = sorted((r.start_ns(), r.nbytes()) for r in records if r.name() == "[memory]")
    timeline, live = [], 0
    for when, change in changes:
        live += change
        timeline.append(((when - changes[0][0]) // 1000, live))
    return timeline or [(0, 0)]
