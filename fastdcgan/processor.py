"""What the processors can do."""

from __future__ import annotations

import torch

from fastdcgan.errors import UserError


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it does not, bfloat16 is far slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_device(wanted: str) -> torch.device:
    """The device of --device.

    Raises:
        UserError: cuda asked for and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu, or check nvidia-smi")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision of --precision; auto is bf16 on a GPU that computes in it, fp32 elsewhere.

    Raises:
        UserError: TF32 on a CPU, which has none.
    """
    if wanted == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is of NVIDIA GPUs: use fp32, or bf16, on a CPU")
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
