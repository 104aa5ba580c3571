"""How far a kernel may be from the same computation in float64: the one table that the tests use.

An error is the norm of the difference over the norm of what was added up to get there (for a plain output, of the
output itself), so that a sum that happens to cancel is not held against the kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    relative_error: float
    reason: str


_FLOAT32_SUM = Tolerance(5e-6, "float32 sums in blocks: a few dozen roundings of 6e-8; more where few rows lie close")
_FLOAT64 = Tolerance(1e-12, "the reference's own precision, with room for sums in another order")

TOLERANCES: dict[torch.dtype, dict[str, Tolerance]] = {
    torch.float64: {
        "output": _FLOAT64,
        "sum": _FLOAT64,
        "update": Tolerance(1e-12, "the same formula in another order"),
    },
    torch.float32: {
        "output": Tolerance(5e-6, "a dozen float32 roundings of 6e-8, and statistics with those of `sum`"),
        "sum": _FLOAT32_SUM,
        "update": Tolerance(1e-6, "a dozen float32 roundings of 6e-8; bias corrections come from float64"),
    },
    torch.bfloat16: {
        "output": Tolerance(2**-7, "one rounding to 8 bits: 2^-9, and 2^-8 where the interpreter truncates instead"),
        "sum": _FLOAT32_SUM,
        "update": Tolerance(2**-7, "as `output`, for the copy of a parameter"),
    },
    torch.float16: {
        "output": Tolerance(2**-10, "one rounding to 11 bits: 2^-12, and 2^-11 where a platform truncates"),
        "sum": _FLOAT32_SUM,
        "update": Tolerance(2**-10, "as `output`, for the copy of a parameter"),
    },
}
