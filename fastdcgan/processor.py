"""What the CPU can do."""

from __future__ import annotations

import torch


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it does not, bfloat16 is far slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
