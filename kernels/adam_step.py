"""One Adam update of all parameters of a network, with their low-precision copies and moving averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdcgan.kernels.backend import Backend, use_triton

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    copies: Sequence[Tensor | None] | None = None,
    emas: Sequence[Tensor | None] | None = None,
    ema_decay: float | Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Update parameters and moments in place, as `torch.optim.Adam` without weight decay, and step by one.

        step = step + 1
        exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
        exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad^2
        param = param - lr / (1 - betas[0]^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - betas[1]^step) + eps)
        copy = param, rounded to copy's dtype
        ema = ema_decay * ema + (1 - ema_decay) * param

    Everything that changes from step to step is read from the device, so a captured CUDA graph can replay the call: a
    schedule writes into the `lr` tensor, a ramp into the `ema_decay` tensor. A Python number is fixed at capture.

    The Triton implementation updates up to 64 tensors in one launch, after a launch of one program that advances
    `step` and computes the two bias corrections in float64. Addresses travel as kernel arguments, so nothing is copied
    to the device and gradients may lie elsewhere at every call.

    Args:
        params: float32, dense in any memory format (contiguous, channels_last, ...). The reference, on a CPU
            thus "auto", takes float64 too.
        grads: one for each parameter, same shape; float32, bfloat16, float16 (or the parameter's dtype). One that lies
            in memory in another order than its parameter is copied first.
        exp_avgs, exp_avg_sqs: moments, with the parameter's shape, dtype and strides; zero before the first step.
        step: () float32, on the parameters' device: updates done so far; one more afterwards.
        lr: learning rate, a number or a () float32 or float64 tensor on the parameters' device. A number that changes
            has a Triton kernel compiled anew.
        betas, eps: as in torch.optim.Adam.
        copies: for each parameter None or a bfloat16 or float16 tensor with its shape and strides. For Triton one of
            these two dtypes in a call, with that of `grads`.
        emas: for each parameter None or a tensor with its shape, dtype and strides.
        ema_decay: in 0..1, a number or a () tensor as `lr`; needed with `emas`.
        backend: "auto" (Triton on CUDA tensors, the reference elsewhere), "triton" or "reference".

    Raises:
        ValueError: lists of different lengths, or tensors that do not fit.
        RuntimeError: backend="triton" where Triton cannot run.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1.
    """
    if not params:
        raise ValueError("adam_step: there are no parameters")
    copies = [None] * len(params) if copies is None else copies
    emas = [None] * len(params) if emas is None else emas
    for name, tensors in (
        ("grads", grads),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
        ("copies", copies),
        ("emas", emas),
    ):
        if len(tensors) != len(params):
            raise ValueError(f"adam_step: {len(params)} parameters, but {len(tensors)} {name}")
    for position, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, copies, emas, strict=True)):
        _check(position, *tensors)
    device = params[0].device
    _check_scalar("step", step, device, (torch.float32,))
    if isinstance(lr, Tensor):
        _check_scalar("lr", lr, device, (torch.float32, torch.float64))
    if isinstance(ema_decay, Tensor):
        _check_scalar("ema_decay", ema_decay, device, (torch.float32, torch.float64))
    elif ema_decay is not None and not 0 <= ema_decay <= 1:
        raise ValueError(f"adam_step: ema_decay is in 0..1, not {ema_decay}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adam_step: betas are at least 0 and below 1, not {betas}")
    if ema_decay is None and any(ema is not None for ema in emas):
        raise ValueError("adam_step: emas need ema_decay")

    # A gradient's elements must lie in memory as its parameter's do: both implementations walk through memory.
    grads = [
        grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]
    if use_triton("adam_step", params[0], backend):
        from fastdcgan.kernels.adam_step_triton import launch

        launch(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, copies, emas, ema_decay)
    else:
        reference(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, copies, emas, ema_decay)


def reference(
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
    """The same with the operator under torch's own fused Adam, or, for torch.compile to fuse, as the formulas stand."""
    step += 1
    wide_grads = [grad.to(param.dtype) for param, grad in zip(params, grads, strict=True)]
    if torch.compiler.is_compiling():  # which has no rule for the fused operator
        correction1, correction2 = (1 - beta ** step.double() for beta in betas)
        for param, grad, exp_avg, exp_avg_sq in zip(params, wide_grads, exp_avgs, exp_avg_sqs, strict=True):
            exp_avg.lerp_(grad, 1 - betas[0])
            exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
            root = exp_avg_sq.sqrt() * correction2.rsqrt().to(param.dtype) + eps
            param.sub_((lr / correction1).to(param.dtype) * exp_avg / root)
    else:
        torch._fused_adam_(  # type: ignore[call-overload]  # its stubs know neither Sequence nor a union for lr
            params,
            wide_grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(params),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        # Which the operator forgets: without, a graph that still holds a parameter would be given a wrong gradient.
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])
    for param, copy, ema in zip(params, copies, emas, strict=True):
        if copy is not None:
            copy.copy_(param)
        if ema is not None:
            assert ema_decay is not None
            share = 1 - ema_decay
            ema.lerp_(param, share.to(param.dtype) if isinstance(share, Tensor) else share)


def _check(
    position: int,
    param: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    ema: Tensor | None,
) -> None:
    if param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adam_step: parameter {position} is {param.dtype}; parameters are float32")
    dense = torch.empty_like(param, device="meta").stride()  # keeps strides only of dense tensors
    if dense != param.stride():
        raise ValueError(
            f"adam_step: parameter {position} is not dense: {tuple(param.shape)}, strides {param.stride()}"
        )
    if grad is None:
        raise ValueError(f"adam_step: parameter {position} has no gradient")
    if grad.shape != param.shape or grad.dtype not in (*GRAD_DTYPES, param.dtype) or grad.device != param.device:
        raise ValueError(
            f"adam_step: the gradient of parameter {position} is {tuple(grad.shape)}, {grad.dtype}, on {grad.device}; "
            f"the parameter {tuple(param.shape)}, {param.dtype}, on {param.device}"
        )
    for name, tensor, dtypes in (
        ("exp_avg", exp_avg, (param.dtype,)),
        ("exp_avg_sq", exp_avg_sq, (param.dtype,)),
        ("copy", copy, (torch.bfloat16, torch.float16)),
        ("ema", ema, (param.dtype,)),
    ):
        if tensor is not None and (
            tensor.shape != param.shape
            or tensor.stride() != param.stride()
            or tensor.dtype not in dtypes
            or tensor.device != param.device
        ):
            raise ValueError(
                f"adam_step: {name} of parameter {position} has shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}, {tensor.dtype}, on {tensor.device}; it needs the parameter's shape "
                f"{tuple(param.shape)} and strides {param.stride()}, {' or '.join(map(str, dtypes))}, on {param.device}"
            )


def _check_scalar(name: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != () or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"adam_step: {name} is a () tensor, {' or '.join(map(str, dtypes))}, on {device}, not "
            f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
        )
