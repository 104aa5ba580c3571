"""How torch takes GPU memory, a switch of the whole process."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

# Eight blocks of 16 KiB, where torch takes 32 MiB on Hopper and 8 on other GPUs: the step's matrix products are too
# small to use more. cuBLASLt shares it, and would complain that it asked for more.
WORKSPACE, WORKSPACE_LT = ":16:8", "128"
MAPS_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED


def take_no_more_than_needed(processes: int) -> None:
    """Let segments of GPU memory grow, so that fewer gaps stay between tensors, and cuBLAS have a small workspace.

    What the user has set stays: PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, and CUBLAS_WORKSPACE_CONFIG or
    CUBLASLT_WORKSPACE_SIZE. So do segments, and a workspace, that there are already. What is set here must stay set:
    some versions of PyTorch read it again whenever they use the workspace.

    Segments do not grow in a run of several processes, whose captured graphs exchange gradients: others have seen such
    graphs hang with them (torchtitan issue 3306). Nor on Windows, which has no such segments, or in its Linux, where
    drivers before R615 fail with them on some GPUs (PyTorch issue 192330), nor on GPUs that cannot map memory, as some
    virtual ones.
    """
    if not {"CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"} & os.environ.keys():
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": WORKSPACE, "CUBLASLT_WORKSPACE_SIZE": WORKSPACE_LT}
    theirs = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    linux = platform.system() == "Linux" and "microsoft" not in platform.release().lower()
    if processes == 1 and linux and not theirs and maps_memory():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def maps_memory() -> bool:
    """Whether the current GPU can have memory mapped where a segment goes on, as the CUDA driver says."""
    device, answer = ctypes.c_int(), ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    failed = driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device())
    return not (failed or driver.cuDeviceGetAttribute(ctypes.byref(answer), MAPS_MEMORY, device)) and bool(answer.value)
