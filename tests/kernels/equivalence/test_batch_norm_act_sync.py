"""The Triton kernels with statistics over the batches of two processes, against one batch in float64.

Only in the interpreter: two processes on one GPU would need a second process group than the one that serves GPUs.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastdcgan.kernels import batch_norm_act_sync, batch_norm_act_sync_triton
from fastdcgan.kernels.layout import as_rows
from fastdcgan.kernels.plan import Plan

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the processes compute on the CPU")


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((8, 7, 5, 3), 2, torch.float32), ((8, 64, 4, 4), 1, torch.bfloat16), ((20, 33), 1, torch.float32)],
    ids=str,
)
def test_two_processes_are_one_batch(check_sync, shape, groups, dtype):
    check_sync(shape, dtype, groups, backend="triton")


@pytest.mark.parametrize("cut", [Plan(16, 16, 3, 2), Plan(32, 16, 1, 3), Plan(16, 32, 6, 1)], ids=str)
def test_every_cut_has_the_same_moments(monkeypatch, cut):
    """Several turns, several splits, a last split that is nearly empty: 81 rows."""
    monkeypatch.setattr(batch_norm_act_sync_triton.op, "plan_for", lambda x, groups: cut)
    x = as_rows(torch.randn(2, 19, 9, 9) + 3)
    found = batch_norm_act_sync_triton.moments(x, 2, torch.float32)
    for ours, exact in zip(found, batch_norm_act_sync.moments(x.double(), 2, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
