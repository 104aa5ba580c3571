"""Where operators of our own have the derivatives that are asked for."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def are_ordinary() -> bool:
    """Whether derivatives are those of `backward`: not inside `torch.func` nor in forward mode, in which operators of
    our own have none, or are silently given 0."""
    return torch.compiler.is_compiling() or (
        torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    )
