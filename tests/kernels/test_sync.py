"""Statistics over the batches of two processes, in torch's own operations; `equivalence/` has the kernels' turn."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.kernels import batch_norm_act


@pytest.mark.parametrize(("groups", "dtype"), [(2, torch.float64), (2, torch.bfloat16)], ids=str)
def test_two_processes_are_one_batch(check_sync, groups, dtype):
    check_sync((8, 5, 4, 3), dtype, groups)


def test_rows(check_sync):
    check_sync((12, 7), torch.float64)


def test_compiled(check_sync):
    check_sync((8, 5, 4, 4), torch.float32, 2, compiled=True)


def test_it_needs_a_process_group_but_not_in_evaluation_mode():
    x, channel = torch.randn(4, 3), torch.ones(3)
    with pytest.raises(ValueError, match="process group"):
        batch_norm_act(x, channel, channel, channel.clone(), channel.clone(), training=True, sync=True)
    batch_norm_act(x, channel, channel, channel, channel, training=False, sync=True)
