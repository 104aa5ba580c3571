"""What the processors can do."""

from __future__ import annotations

import functools

import torch

from fastdcgan.console import say
from fastdcgan.cores import allowed_cores
from fastdcgan.errors import UserError, first_line, number_in


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it does not, bfloat16 is far slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


say_once = functools.cache(say)


@functools.cache
def why_no_gpu() -> str | None:
    """What keeps this process from computing on its GPU, found out by trying; None if nothing does.

    PyTorch also finds GPUs that are too old for its kernels, or whose memory others have taken.
    """
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here"
    # More processes than GPUs are `distributed.join`'s to refuse.
    own = min(number_in("LOCAL_RANK", 0), torch.cuda.device_count() - 1)
    try:
        torch.zeros(1, device=f"cuda:{own}").add_(1).item()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        return first_line(error)
    return None


def choose_device(wanted: str) -> torch.device:
    """The device of --device; auto takes the CPU, and says so, where there is a GPU that cannot be used.

    With the CPU, torch is held to the cores of this process. By itself it has a thread for each of the machine's, also
    in a container that may use a few of them, and threads that wait take time from those that compute.

    Raises:
        UserError: cuda asked for and not to be had; or auto, by one of several processes, the others of which may have
            sound GPUs.
    """
    if wanted != "cpu":
        reason = why_no_gpu()
        if reason is None:
            return torch.device("cuda")
        found, alone = torch.cuda.is_available(), number_in("WORLD_SIZE", 1) == 1
        if wanted == "cuda" or (found and not alone):
            raise UserError(f"--device {wanted}: {reason}; use --device cpu, or check nvidia-smi")
        if found:
            say_once(f"the GPU cannot be used, so the CPU computes: {reason}")
    allowed = allowed_cores()
    if torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)
    return torch.device("cpu")


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision of --precision; auto is bf16 on a GPU that computes in it, fp32 elsewhere.

    Raises:
        UserError: TF32 on a CPU, which has none; bf16 on a GPU from before Ampere, for which cuDNN has no such
            convolutions.
    """
    if wanted == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is of NVIDIA GPUs: use fp32, or bf16, on a CPU")
    bf16_on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and device.type == "cuda" and not bf16_on_gpu:
        raise UserError("--precision bf16 is of GPUs from Ampere on, and this one is older: use fp32")
    if wanted != "auto":
        return wanted
    return "bf16" if bf16_on_gpu else "fp32"


def describe_device(device: str) -> str:
    """In words, for config.json."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
