"""The ways to run a training step: eager, compiled, or as one CUDA graph. What it computes is the same."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Protocol

import torch

from fastdcgan.console import spinner
from fastdcgan.errors import UserError, compiler_error, first_line
from fastdcgan.signals import signals_afterwards
from fastdcgan.step import TrainStep

log = logging.getLogger("fastdcgan")


class Executor(Protocol):
    """Runs one update a call; what a step computes does not depend on which one runs it."""

    name: str

    def run(self) -> None: ...

    def close(self) -> None:
        """Let go of what it holds on the device, and of what was compiled; it runs nothing any more."""


class Uncaptured:
    """The update as Python runs it: operation by operation or, of a compiled step, in a few compiled functions."""

    def __init__(self, step: TrainStep, name: str) -> None:
        self.step, self.name = step, name

    def run(self) -> None:
        self.step.update()

    def close(self) -> None:
        self.step.uncompile()


class Captured:
    """The whole update as one CUDA graph, or as two where only some updates have the R1 penalty.

    The first `WARM_UP` runs of each are ordinary updates on a side stream, so that compilation, autotuning and the
    allocator's first requests are over; the next one is recorded, which runs nothing, and replayed from then on.

    Args:
        require: whether a step that cannot be captured is an error, not a reason to go on without.

    Raises:
        UserError: from `run`, if so.
    """

    WARM_UP = 3

    def __init__(self, step: TrainStep, require: bool) -> None:
        self.step, self.name, self.require = step, "captured", require
        self.runs = {True: 0, False: 0}  # by whether R1 is due
        self.stream = torch.cuda.Stream()
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def run(self) -> None:
        due = self.step.r1_is_due()
        if self.name == "captured" and due not in self.graphs and self.runs[due] >= self.WARM_UP:
            self.capture()
        if due in self.graphs:
            self.graphs[due].replay()
            self.step.updates += 1
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step.update()
            torch.cuda.current_stream().wait_stream(self.stream)
        self.runs[due] += 1

    def close(self) -> None:
        """Wait for the last replay and give the graphs up: their memory, and NCCL, which ends when no graph has it."""
        torch.cuda.synchronize(self.step.source.device)
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.step.uncompile()

    def capture(self) -> None:
        """Record one update; where that fails, say why once and stay with ordinary updates (or raise, if required)."""
        graph, due, updates = torch.cuda.CUDAGraph(), self.step.r1_is_due(), self.step.updates
        random, current = self.step.rng.get_state(), torch.cuda.current_stream()
        with warnings.catch_warnings():  # newer releases find the generator themselves and say that this is deprecated
            warnings.simplefilter("ignore")
            graph.register_generator_state(self.step.rng)  # so that every replay draws new numbers
        try:
            # thread_local: the data loader's threads may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step.update()
        except RuntimeError as error:
            # Ending a spoilt capture fails too, and says less than what spoilt it.
            reason = first_line(error.__context__ or error)
            torch.cuda.set_stream(current)  # torch stays with the other one where ending the capture fails
            # Torch up to 2.11 leaves its generator in capture mode, where it is no use.
            self.step.rng = torch.Generator(self.step.source.device)
            self.step.rng.set_state(random)
            if self.require:
                raise UserError(
                    f"--cuda-graph on: the step cannot be captured ({reason}); try --cuda-graph auto"
                ) from error
            log.warning("the step cannot be captured as a CUDA graph (%s); going on without", reason)
            self.name = "compiled"
            self.graphs.clear()  # one that was captured before draws from the generator that was given up
        else:
            self.graphs[due] = graph
        self.step.updates = updates  # recording runs nothing


def make_executor(step: TrainStep, *, compile: bool, cuda_graph: str) -> Executor:
    """The executor for a step: cuda_graph "auto" captures on a GPU when compiling, "on" always, "off" never.

    Where torch.compile does not work, that is said and the step is not compiled.

    Raises:
        UserError: cuda_graph "on" without a GPU.
        ValueError: another cuda_graph.
    """
    if cuda_graph not in ("auto", "on", "off"):
        raise ValueError(f"there is no cuda_graph {cuda_graph!r}: auto, on or off")
    on_gpu = step.source.is_cuda
    if cuda_graph == "on" and not on_gpu:
        raise UserError("--cuda-graph on needs a GPU; leave it at auto to train on the CPU")
    if compile and (reason := why_not_compiled(step.source.device.type)):
        log.warning(
            "the step cannot be compiled (%s); going on without. --compile needs a C++ compiler, such as g++, and"
            " Python's headers",
            reason,
        )
        compile = False
    if compile:
        step.compile()
    if cuda_graph == "on" or (cuda_graph == "auto" and compile and on_gpu):
        return Captured(step, require=cuda_graph == "on")
    return Uncaptured(step, "compiled" if compile else "eager")


@functools.cache
def why_not_compiled(kind: str) -> str | None:
    """What keeps torch.compile from working on this kind of device, found out by trying; None if nothing does."""
    # An import that Ctrl-C cuts short leaves half a compiler in the process: it is heard afterwards.
    with signals_afterwards(), spinner("looking whether torch.compile works here"):
        from torch._dynamo.exc import TorchDynamoException  # takes seconds, which an eager run need not wait for

        try:
            torch.compile(torch.neg, dynamic=False)(torch.zeros(1, device=kind))
        except TorchDynamoException as error:
            return compiler_error(error)
    return None
