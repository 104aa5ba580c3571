"""Whether Triton can run and should; `image_conv` and `batch_norm_act` first ask whether it is the faster one."""

from __future__ import annotations

import logging
from typing import Literal

from torch import Tensor

try:
    import triton

    INTERPRETING: bool = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when the process started
    TRITON_MISSING: str | None = None
except Exception as error:  # a broken installation raises more than ImportError, and the reference must still work
    INTERPRETING = False
    TRITON_MISSING = f"{type(error).__name__}: {error}"

Backend = Literal["auto", "triton", "reference"]

_log = logging.getLogger("fastdcgan.kernels")
_logged: set[str] = set()


def use_triton(operation: str, tensor: Tensor, backend: Backend) -> bool:
    """Whether `operation` on `tensor` runs its Triton kernels (otherwise its reference).

    "auto" takes Triton for CUDA tensors and the reference elsewhere. In a process started with TRITON_INTERPRET=1
    "triton" also runs on CPU tensors, interpreted: slow, and how the kernels are tested without a GPU.
    The choice is logged once for each operation and device, at level INFO of the logger `fastdcgan.kernels`.

    Raises:
        RuntimeError: backend="triton" where Triton cannot run; it never falls back silently.
        ValueError: an unknown backend.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f'{operation}: backend is "auto", "triton" or "reference", not {backend!r}')
    device = tensor.device.type
    if backend == "triton":
        if TRITON_MISSING is not None:
            raise RuntimeError(f'{operation}: backend="triton", but Triton cannot be imported ({TRITON_MISSING})')
        if device != "cuda" and not (device == "cpu" and INTERPRETING):
            raise RuntimeError(
                f'{operation}: backend="triton" needs a CUDA tensor and this one is on {device}; '
                "on a CPU start Python with TRITON_INTERPRET=1 (slow, for tests)"
            )
    chosen = backend == "triton" or (backend == "auto" and device == "cuda" and TRITON_MISSING is None)
    without = f" (no Triton: {TRITON_MISSING})" if device == "cuda" and TRITON_MISSING else ""
    log_once(f"{operation} on {device} runs its {'triton' if chosen else 'reference'} implementation{without}")
    return chosen


def log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _log.info(message)


# What `torch.compiler.assume_constant_result` does, without importing the compiler: a run without it starts two seconds
# sooner. While it traces, torch.compile calls this.
log_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
