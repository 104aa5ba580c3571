"""How torch takes GPU memory, a switch of the whole process."""

from __future__ import annotations

import os

import torch

# cuBLAS's workspace: eight blocks of 16 KiB, in place of 32 MiB on Hopper and 8 on other GPUs. The step's matrix products
# are too small to use more.
WORKSPACE = ":16:8"


def take_no_more_than_needed() -> None:
    """Let segments of GPU memory grow, so that no gaps stay between them, and cuBLAS have a small workspace.

    What the user has set in PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, and in CUBLAS_WORKSPACE_CONFIG, stays. A
    workspace that cuBLAS has already stays too, and so do segments.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
