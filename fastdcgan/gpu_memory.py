"""How torch takes GPU memory, a switch of the whole process."""

from __future__ import annotations

import os

import torch

# cuBLAS's workspace: two blocks of 4,096 KiB, as torch has it on other GPUs than Hopper's, where it is 32 MiB. The
# step's matrix products are too small to use that.
WORKSPACE = ":4096:2"


def take_no_more_than_needed() -> None:
    """Let segments of GPU memory grow, so that no gaps stay between them, and cuBLAS have a small workspace.

    What the user has set in PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, and in CUBLAS_WORKSPACE_CONFIG, stays. A
    workspace that cuBLAS has already stays too, and so do segments.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
