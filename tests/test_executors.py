"""Whoever runs the step, it is the same; capture with stand-ins for CUDA, and on a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastdcgan import models
from fastdcgan.bench.contenders import Shape, fast_step
from fastdcgan.errors import UserError
from fastdcgan.executors import Captured, make_executor, why_not_compiled
from fastdcgan.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent


def make_step(device: str = "cpu", size: int = 32, width: int = 8, batch_size: int = 8, **options: object) -> TrainStep:
    torch.manual_seed(1)
    generator, discriminator = models.Generator(size, 3, 10, width), models.Discriminator(size, 3, width)
    source = torch.randint(0, 256, (40, size, size, 3), dtype=torch.uint8).to(device)
    options = {"flip": True, "seed": 5, **options}
    index = torch.arange(batch_size).to(device)
    return TrainStep(generator.to(device), discriminator.to(device), source, index, **options)  # type: ignore[arg-type]


def on_gpu(**options: object) -> TrainStep:
    return make_step("cuda", width=32, batch_size=16, precision="bf16", **options)


def weights(*networks: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])


def assert_close(step: TrainStep, expected: TrainStep, tolerance: float) -> None:
    for name in ("generator", "discriminator"):
        ours, theirs = (weights(getattr(each, name)) for each in (step, expected))
        assert (ours - theirs).norm() < tolerance * theirs.norm(), name


def run_alone(step: TrainStep, steps: int) -> Tensor:
    for _ in range(steps):
        step.update()
    return weights(step.generator, step.discriminator)


def test_executors_agree() -> None:
    eager, compiled = make_step(), make_step()
    executors = (
        make_executor(eager, compile=False, cuda_graph="auto"),
        make_executor(compiled, compile=True, cuda_graph="auto"),
    )
    assert [e.name for e in executors] == ["eager", "compiled"]
    for executor in executors:
        for _ in range(3):
            executor.run()
    assert torch.equal(eager.rng.get_state(), compiled.rng.get_state())
    assert_close(compiled, eager, 1e-5)


def test_cuda_graph_on_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        make_executor(make_step(), compile=False, cuda_graph="on")


def test_another_cuda_graph_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="there is no cuda_graph 'never': auto, on or off"):
        make_executor(make_step(), compile=False, cuda_graph="never")


@pytest.mark.parametrize(
    ("compile", "cuda_graph", "expected"),
    [
        (False, "auto", "eager"),
        (True, "auto", "captured"),
        (False, "off", "eager"),
        (True, "off", "compiled"),
        (False, "on", "captured"),
        (True, "on", "captured"),
    ],
)
def test_who_runs_the_step_on_a_gpu(
    compile: bool, cuda_graph: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the step, of which no update is asked."""
    monkeypatch.setattr("fastdcgan.executors.why_not_compiled", lambda kind: None)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    compiled: list[bool] = []
    source = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    step = SimpleNamespace(source=source, compile=lambda: compiled.append(True))
    executor = make_executor(step, compile=compile, cuda_graph=cuda_graph)  # type: ignore[arg-type]
    assert executor.name == expected and compiled == [True] * compile
    assert not isinstance(executor, Captured) or executor.require == (cuda_graph == "on")


def test_where_nothing_can_be_compiled_the_step_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = "from fastdcgan.executors import why_not_compiled; print(why_not_compiled('cpu'))"
    nowhere = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "absent"}
    told = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | nowhere, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "C++ compiler" in told.stdout
    monkeypatch.setattr("fastdcgan.executors.why_not_compiled", lambda kind: f"no compiler for a {kind}")
    step = make_step()
    executor = make_executor(step, compile=True, cuda_graph="auto")
    executor.run()
    assert executor.name == "eager" and not step.compiled and step.adam_g.steps == 1
    assert "no compiler for a cpu" in caplog.text
    with pytest.raises(UserError, match="fast-compiled cannot be compiled here"):
        fast_step(Shape(2, (16, 16), width=4), step.source[:, :16, :16], step.index[:2], "fp32", "fast-compiled")


def test_ctrl_c_waits_until_the_compiler_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def interrupted(function: object, dynamic: bool) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return lambda x: tried.append(True)

    monkeypatch.setattr(torch, "compile", interrupted)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            why_not_compiled.__wrapped__("cpu")
    finally:
        signal.signal(signal.SIGINT, found)
    assert tried == [True]


class StandInGraph:
    """In the place of torch.cuda.CUDAGraph: remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.order: list[str] = []  # of what the streams do

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.calls.append("register")

    def replay(self) -> None:
        self.calls.append("replay")

    def reset(self) -> None:
        self.calls.append("reset")


def captured_with_stand_ins(
    monkeypatch: pytest.MonkeyPatch, require: bool, fails: bool, **options: object
) -> tuple[Captured, StandInGraph]:
    from contextlib import contextmanager

    graph, step = StandInGraph(), make_step(**options)

    class Stream:
        name = "side"

        def wait_stream(self, other: Stream) -> None:
            graph.order.append(f"{self.name} waits for {other.name}")

    class Current(Stream):
        name = "current"

    @contextmanager
    def enter(stream: Stream):  # type: ignore[no-untyped-def]
        before = int(step.adam_g.steps)
        yield
        graph.order.append(f"{int(step.adam_g.steps) - before} update on {stream.name}")

    @contextmanager
    def record(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        assert kwargs["capture_error_mode"] == "thread_local" and kwargs["stream"].name == "side"
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        graph.calls.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Current)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: graph.order.append(f"stays on {stream.name}"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: graph.calls.append(f"wait for the {device}"))
    return Captured(step, require), graph


def test_captured_warms_up_with_ordinary_steps_then_records_once(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=False)
    for _ in range(Captured.WARM_UP):
        executor.run()
    assert graph.calls == [] and executor.step.adam_g.steps == Captured.WARM_UP
    warm_up = ["side waits for current", "1 update on side", "current waits for side"]
    assert graph.order == warm_up * Captured.WARM_UP
    for _ in range(4):
        executor.run()
    assert graph.calls == ["register", "capture", "replay", "replay", "replay", "replay"]
    assert executor.name == "captured"


def test_updates_with_and_without_a_penalty_are_two_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=False, size=16, r1=1.0, r1_every=2)
    for number in range(2 * Captured.WARM_UP):
        executor.run()
        assert executor.step.updates == number + 1
    assert graph.calls == [] and executor.step.adam_d.steps == 2 * Captured.WARM_UP
    for _ in range(4):
        executor.run()
    again = ["register", "capture", "replay"]
    assert graph.calls == [*again, *again, "replay", "replay"]
    assert executor.step.updates == 2 * Captured.WARM_UP + 4


def test_r1_beside_another_penalty_is_recorded_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of wgan-gp every update has a penalty: what differs from one to the next is R1."""
    options: dict[str, object] = {"size": 16, "loss": "wgan-gp", "r1": 1.0, "r1_every": 4}
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=False, **options)
    computed: list[str] = []
    monkeypatch.setattr("fastdcgan.step.r1_penalty", lambda logits, images: computed.append("r1") or logits.sum() * 0)
    monkeypatch.setattr(graph, "replay", lambda: graph.calls.append("with r1" if due else "without"))
    recorded = dict[bool, bool]()
    for number in range(4 * (Captured.WARM_UP + 1)):
        due, graphs, before = number % 4 == 0, len(executor.graphs), len(computed)
        executor.run()
        assert (due in executor.graphs) == (executor.runs[due] > Captured.WARM_UP)
        if len(executor.graphs) > graphs:
            recorded[due] = len(computed) > before
    assert recorded == {True: True, False: False}


def test_graphs_are_given_up_when_nothing_runs_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=False, size=16, r1=1.0, r1_every=2)
    for _ in range(2 * Captured.WARM_UP + 2):
        executor.run()
    executor.close()
    assert graph.calls[-3:] == ["wait for the cpu", "reset", "reset"] and executor.graphs == {}


def test_where_the_second_capture_fails_the_first_graph_goes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws from a generator that is given up: the same noise twice, and none that a checkpoint knows of."""
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=False, size=16, r1=1.0, r1_every=4)
    whole = executor.step.penalty

    def not_in_a_capture(real: Tensor, fake: Tensor) -> Tensor:
        if executor.runs[True] == Captured.WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing")
        return whole(real, fake)

    monkeypatch.setattr(executor.step, "penalty", not_in_a_capture)
    for _ in range(4 * Captured.WARM_UP):
        executor.run()
    replayed = graph.calls.count("replay")
    assert replayed > 0 and executor.name == "captured"
    executor.capture()
    noise = executor.step.rng.get_state()
    executor.step.penalty = whole
    for _ in range(4):
        executor.run()
    assert executor.name == "compiled" and graph.calls.count("replay") == replayed
    assert not torch.equal(executor.step.rng.get_state(), noise)
    assert executor.step.updates == 4 * Captured.WARM_UP + 4


def test_where_capture_fails_the_reason_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=True)
    for _ in range(6):
        executor.run()
    assert executor.step.adam_g.steps == 6 and "replay" not in graph.calls and executor.name == "compiled"
    said = [r.getMessage() for r in caplog.records if "cannot be captured" in r.getMessage()]
    assert len(said) == 1 and "(operation not permitted when stream is capturing)" in said[0]
    assert graph.order.count("stays on current") == 1
    assert torch.equal(run_alone(executor.step, 0), run_alone(make_step(), 6)), "the same run as without the attempt"
    required, _ = captured_with_stand_ins(monkeypatch, require=True, fails=True)
    with pytest.raises(UserError, match="--cuda-graph auto"):
        for _ in range(6):
            required.run()


def test_a_capture_that_fails_half_way_leaves_a_step_that_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor, graph = captured_with_stand_ins(monkeypatch, require=False, fails=False)
    whole = executor.step.generator_loss

    def not_in_a_capture(fake: Tensor) -> Tensor:
        if "capture" in graph.calls and "failed" not in graph.calls:
            graph.calls.append("failed")
            raise RuntimeError("operation not permitted when stream is capturing")
        return whole(fake)

    monkeypatch.setattr(executor.step, "generator_loss", not_in_a_capture)
    for _ in range(6):
        executor.run()
    assert graph.calls == ["register", "capture", "failed"] and executor.name == "compiled"
    assert executor.step.adam_g.steps == 6 and executor.step.updates == 6
    plain = make_step()
    run_alone(plain, 6)
    assert torch.equal(executor.step.rng.get_state(), plain.rng.get_state()), "what the capture drew is drawn again"
    assert any("operation not permitted" in record.getMessage() for record in caplog.records)


def test_the_reason_is_what_spoilt_the_capture_and_not_that_ending_it_fails_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in torch, where the second error is raised while the first is handled."""
    executor, _ = captured_with_stand_ins(monkeypatch, require=False, fails=False)

    @contextlib.contextmanager
    def record(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")

    def not_in_a_capture(_: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(executor.step, "generator_loss", not_in_a_capture)
    executor.capture()
    assert "(operation not permitted when stream is capturing)" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"loss": "wgan-gp", "r1": 1.0, "r1_every": 4}], ids=["bce", "two penalties"])
def test_captured_agrees_with_compiled_on_a_gpu(monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    steps = [on_gpu(**options) for _ in range(2)]
    executors = [
        make_executor(s, compile=True, cuda_graph=graph) for s, graph in zip(steps, ("off", "on"), strict=True)
    ]
    for executor in executors:
        for _ in range(50):
            executor.run()
    assert executors[1].name == "captured"
    assert torch.equal(steps[0].rng.get_state(), steps[1].rng.get_state())
    # The same kernels in the same order; cuBLAS may add in another order from run to run.
    assert_close(steps[1], steps[0], 1e-2)
    executors[1].close()


@pytest.mark.gpu
def test_replays_do_not_synchronise_nor_allocate_and_draw_new_noise() -> None:
    step = on_gpu()
    executor = make_executor(step, compile=True, cuda_graph="on")
    for _ in range(Captured.WARM_UP + 2):
        executor.run()
    torch.cuda.synchronize()
    gc.collect()  # what earlier tests left must not go meanwhile
    noise, allocated = step.noise.clone(), torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(1000):
            executor.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated
    assert not torch.equal(noise, step.noise)
