"""Named spans of a training step, for profilers; free when none is listening."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A range called `name` in torch.profiler's trace, and an NVTX range under `torch.autograd.profiler.emit_nvtx`."""
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return torch.profiler.record_function(name)
    return _NOTHING
