"""PyTorch as this package needs it, whatever the caller has set for the rest of the program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def own_settings(kind: str) -> Iterator[None]:
    """No autocast (for a device of this kind), no inference mode, gradients; new tensors are float32 and on the CPU."""
    dtype, cpu = torch.get_default_dtype(), torch.device("cpu")
    place = nullcontext() if torch.get_default_device() == cpu else cpu  # it would slow every operation down
    with torch.autocast(kind, enabled=False), torch.inference_mode(False), torch.enable_grad(), place:
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
