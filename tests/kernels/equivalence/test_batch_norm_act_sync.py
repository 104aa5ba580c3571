"""The Triton kernels with statistics over the batches of two processes, against one batch in float64.

Only in the interpreter: two processes on one GPU would need a second process group than the one that serves GPUs.
"""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the processes compute on the CPU")


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((8, 7, 5, 3), 2, torch.float32), ((8, 64, 4, 4), 1, torch.bfloat16), ((20, 33), 1, torch.float32)],
    ids=str,
)
def test_two_processes_are_one_batch(check_sync, shape, groups, dtype):
    check_sync(shape, dtype, groups, backend="triton")
