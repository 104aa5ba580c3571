# mypy: disable-error-code="misc,no-untyped-def,no-untyped-call,untyped-decorator"
"""The Triton kernels of `adam_step`: one program for the scalars, then one launch for all tensors.

A launch covers the tensors' blocks one after another. The tensors' addresses are arguments of `adam`, as integers;
each program finds the tensor its block belongs to by comparing its number with where the tensors' blocks begin. 0
stands for a copy or moving average that is not wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
TENSORS = 64  # in one launch: their addresses stay under the 4 KiB that a kernel's arguments may take
LOW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    copies: Sequence[Tensor | None],
    emas: Sequence[Tensor | None],
    ema_decay: float | Tensor | None,
) -> None:
    """Arguments as `adam_step` checked them; every gradient in its parameter's memory order."""
    if any(param.dtype != torch.float32 for param in params):
        raise ValueError('adam_step: Triton updates float32 parameters; for others use backend="reference"')
    low = {tensor.dtype for tensor in (*grads, *copies) if tensor is not None and tensor.dtype in LOW}
    if len(low) > 1:
        raise ValueError('adam_step: backend="triton" takes bfloat16 or float16 gradients and copies, not both at once')
    copied = [i for i, copy in enumerate(copies) if copy is not None]
    averaged = [i for i, ema in enumerate(emas) if ema is not None]
    update(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        step,
        lr if isinstance(lr, Tensor) else None,
        0.0 if isinstance(lr, Tensor) else lr,
        *betas,
        eps,
        [copy for copy in copies if copy is not None],
        copied,
        [ema for ema in emas if ema is not None],
        averaged,
        ema_decay if isinstance(ema_decay, Tensor) else None,
        0.0 if ema_decay is None or isinstance(ema_decay, Tensor) else ema_decay,
    )


@torch.library.custom_op(
    "fastdcgan::adam_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "step", "copies", "emas")
)
def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    copies: list[Tensor],
    copied: list[int],
    emas: list[Tensor],
    averaged: list[int],
    ema_decay_tensor: Tensor | None,
    ema_decay: float,
) -> None:
    """As `adam_step`; copies[k] is that of params[copied[k]], emas[k] that of params[averaged[k]]."""
    with torch.cuda.device_of(step):
        scalars = torch.empty(3, dtype=torch.float32, device=step.device)
        advance[(1,)](
            step,
            scalars,
            step if lr_tensor is None else lr_tensor,
            step if ema_decay_tensor is None else ema_decay_tensor,
            LR=lr if lr_tensor is None else None,
            EMA_DECAY=ema_decay if ema_decay_tensor is None else None,
            BETA1=beta1,
            BETA2=beta2,
            num_warps=1,
        )
        copy_of: list[Tensor | None] = [None] * len(params)
        ema_of: list[Tensor | None] = [None] * len(params)
        for i, copy in zip(copied, copies, strict=True):
            copy_of[i] = copy
        for i, ema in zip(averaged, emas, strict=True):
            ema_of[i] = ema
        low = next((tensor.dtype for tensor in (*grads, *copies) if tensor.dtype in LOW), torch.bfloat16)
        for first in range(0, len(params), TENSORS):
            here = range(first, min(first + TENSORS, len(params)))
            sizes = tuple(params[i].numel() for i in here)
            begins = tuple(accumulate((triton.cdiv(size, BLOCK) for size in sizes), initial=0))
            addresses = [
                tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors[here.start : here.stop])
                for tensors in (params, grads, exp_avgs, exp_avg_sqs, copy_of, ema_of)
            ]
            adam[(begins[-1],)](
                *addresses,
                scalars,
                BEGINS=begins[:-1],
                SIZES=sizes,
                LOW_GRADS=tuple(grads[i].dtype == low for i in here),
                ALIGNMENT=math.gcd(16, *sizes, *(address for addresses_ in addresses for address in addresses_)),
                LOW=LOW[low],
                BETA1=beta1,
                BETA2=beta2,
                EPS=eps,
                BLOCK=BLOCK,
                num_warps=8,
            )


@update.register_fake
def _(*_):
    return None


@triton.jit
def advance(
    step_ptr,  # [] float32
    scalars_ptr,  # [3] float32: lr / (1 - BETA1^step), 1 / sqrt(1 - BETA2^step), share of the parameter in its average
    lr_ptr,  # [] float32 or float64; not read where LR is a number
    ema_decay_ptr,  # [] float32 or float64; not read where EMA_DECAY is a number
    LR: tl.constexpr,
    EMA_DECAY: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
):
    step = tl.load(step_ptr) + 1
    tl.store(step_ptr, step)
    # In float64: 1 - 0.999^1 in float32 would be off in the fifth digit.
    steps = step.to(tl.float64)
    lr = tl.load(lr_ptr).to(tl.float64) if LR is None else tl.full((), LR, tl.float64)
    decay = tl.load(ema_decay_ptr).to(tl.float64) if EMA_DECAY is None else tl.full((), EMA_DECAY, tl.float64)
    power1 = tl.exp(steps * tl.log(tl.full((), BETA1, tl.float64)))
    power2 = tl.exp(steps * tl.log(tl.full((), BETA2, tl.float64)))
    tl.store(scalars_ptr, (lr / (1 - power1)).to(tl.float32))
    tl.store(scalars_ptr + 1, (1 / tl.sqrt(1 - power2)).to(tl.float32))
    tl.store(scalars_ptr + 2, (1 - decay).to(tl.float32))


@triton.jit
def adam(
    all_param,  # addresses: a tuple with one for each tensor of the launch, as the five below
    all_grad,
    all_exp_avg,
    all_exp_avg_sq,
    all_copy,  # 0 where there is none
    all_ema,  # 0 where there is none
    scalars_ptr,  # [3] float32, see `advance`
    BEGINS: tl.constexpr,  # first block of each tensor
    SIZES: tl.constexpr,  # elements of each tensor
    LOW_GRADS: tl.constexpr,  # whether each tensor's gradient is LOW (otherwise float32)
    ALIGNMENT: tl.constexpr,  # divides every address and size of the launch
    LOW: tl.constexpr,  # the low-precision dtype of gradients and copies
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    param, grad = all_param[0].to(tl.int64), all_grad[0].to(tl.int64)
    exp_avg, exp_avg_sq = all_exp_avg[0].to(tl.int64), all_exp_avg_sq[0].to(tl.int64)
    copy, ema = all_copy[0].to(tl.int64), all_ema[0].to(tl.int64)
    begin, size = tl.full((), BEGINS[0], tl.int32), tl.full((), SIZES[0], tl.int64)
    low_grad = tl.full((), LOW_GRADS[0], tl.int1)
    for i in tl.static_range(1, len(SIZES)):
        reached = block >= BEGINS[i]
        param, grad = tl.where(reached, all_param[i], param), tl.where(reached, all_grad[i], grad)
        exp_avg = tl.where(reached, all_exp_avg[i], exp_avg)
        exp_avg_sq = tl.where(reached, all_exp_avg_sq[i], exp_avg_sq)
        copy, ema = tl.where(reached, all_copy[i], copy), tl.where(reached, all_ema[i], ema)
        begin, size = tl.where(reached, BEGINS[i], begin), tl.where(reached, SIZES[i], size)
        low_grad = tl.where(reached, LOW_GRADS[i], low_grad)

    at = (block - begin).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.multiple_of(size, ALIGNMENT)
    step_size, inverse_root, ema_share = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    param_ptr = _pointer(param, tl.float32, ALIGNMENT) + at
    exp_avg_ptr = _pointer(exp_avg, tl.float32, ALIGNMENT) + at
    exp_avg_sq_ptr = _pointer(exp_avg_sq, tl.float32, ALIGNMENT) + at
    p = tl.load(param_ptr, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr, mask=mask, other=0.0)
    if low_grad:
        g = tl.load(_pointer(grad, LOW, ALIGNMENT) + at, mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(_pointer(grad, tl.float32, ALIGNMENT) + at, mask=mask, other=0.0)
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    p -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + EPS)
    tl.store(param_ptr, p, mask=mask)
    tl.store(exp_avg_ptr, m, mask=mask)
    tl.store(exp_avg_sq_ptr, v, mask=mask)
    if copy != 0:
        tl.store(_pointer(copy, LOW, ALIGNMENT) + at, p.to(LOW), mask=mask)
    if ema != 0:
        ema_ptr = _pointer(ema, tl.float32, ALIGNMENT) + at
        average = tl.load(ema_ptr, mask=mask, other=0.0)
        tl.store(ema_ptr, average + ema_share * (p - average), mask=mask)


@triton.jit
def _pointer(address, element: tl.constexpr, ALIGNMENT: tl.constexpr):
    """An address as a pointer that the compiler knows to be aligned, so that it moves 16 bytes at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(element)), ALIGNMENT)
