"""BatchNorm followed by ReLU, LeakyReLU or nothing, as one operation, with statistics per group of samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.kernels.backend import Backend, log_once, use_triton
from fastdcgan.kernels.layout import DTYPES, as_rows

# (rows, channels), a row being a pixel of a sample: the bfloat16 layers, in one group, for whose forward and backward
# pass torch.compile's own kernels took less time on an H200 (bench/results/h200-batch-norm-all-layers.json).
COMPILED_IS_FASTER = (
    (64 * 4 * 4, 256),
    (64 * 8 * 8, 128),
    (64 * 16 * 16, 64),
    (128 * 8 * 8, 128),
    (128 * 16 * 16, 64),
    (1024 * 16 * 16, 256),
)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.0,
    groups: int = 1,
    sync: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias), act(z) = z for z > 0 and negative_slope * z elsewhere.

    In training mode mean and (biased) variance are those of the batch, separately for each of `groups` equal slices
    of N, and the running statistics move in place: running = (1 - momentum) * running + momentum * batch, with the
    unbiased variance, slice after slice in order, as `groups` separate calls would. In evaluation mode the running
    statistics normalise every sample and `groups` changes nothing.

    Both implementations are differentiable twice in x, weight and bias. The Triton one saves x and two numbers for
    each channel and group for the backward pass, writes the gradient of x over that of y (inside torch.compile, which
    knows whether that is still needed), gives the same bits every time, and falls back to plain torch
    operations when a gradient is itself to be differentiated (`create_graph=True`). The transforms of `torch.func` are
    for the reference.

    Args:
        x: (N, C, H, W) or (N, C); float32, bfloat16, float16 or float64. The Triton implementation works on
            channels_last (N, C, H, W) and contiguous (N, C) and copies any other layout to that first.
        weight, bias, running_mean, running_var: (C,), contiguous, float32 (float64 with a float64 x).
        momentum: share of the new statistics, in 0..1; the Triton kernels are compiled anew for another.
        eps: added to the variance, > 0 in training.
        negative_slope: 0 is ReLU, 1 no activation, 0.2 the DCGAN discriminator's LeakyReLU; not negative.
        groups: slices of N with statistics of their own; divides N.
        sync: take the statistics over the batches of all processes of the `torch.distributed` run, each of which calls
            this with as many samples: group g of one process belongs with group g of the others. Differentiable once.
            Evaluation mode takes no notice of it.
        backend: "auto" (Triton on CUDA tensors, the reference elsewhere, and inside torch.compile also for the layers
            of COMPILED_IS_FASTER), "triton" or "reference".

    Returns:
        y of x's shape and dtype: channels_last from a channels_last x (from the Triton implementation, always).

    Raises:
        ValueError: shapes, dtypes, groups or a slope that do not fit; one value a channel and group in training mode;
            sync without an initialised process group.
        RuntimeError: backend="triton" where Triton cannot run.

    Source: Ioffe and Szegedy, "Batch normalization", 2015, algorithm 1 and the gradients of its section 3. Statistics
    are combined with the pairwise update of Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
    1983.
    """
    check(x, (weight, bias, running_mean, running_var), training, momentum, groups, eps, negative_slope)
    if sync and training:
        from fastdcgan.kernels.batch_norm_act_sync import SyncBatchNormAct

        triton = use_triton("batch_norm_act", x, backend)
        synced: Tensor = SyncBatchNormAct.apply(
            as_rows(x), weight, bias, running_mean, running_var, momentum, eps, negative_slope, groups, triton
        )
        return synced
    if runs_triton(x, training, groups, backend):
        from fastdcgan.kernels.batch_norm_act_op import BatchNormAct

        y: Tensor = BatchNormAct.apply(
            as_rows(x), weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups
        )
        return y
    return reference(x, weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    groups: int,
) -> Tensor:
    """The same in torch's own operations, which torch.compile sees through and fuses; in training mode running
    statistics may be None, and then none move."""

    def norm(part: Tensor) -> Tensor:
        return F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)

    z = torch.cat([norm(part) for part in x.chunk(groups)]) if training and groups > 1 else norm(x)
    if negative_slope == 1:
        return z
    # In place: the gradient then needs y alone, which the next layer keeps anyway. Inductor would otherwise store the
    # sign of z as bytes, and on a CPU that one store costs more than the rest of the kernel.
    return F.relu(z, inplace=True) if negative_slope == 0 else F.leaky_relu(z, negative_slope, inplace=True)


def runs_triton(x: Tensor, training: bool, groups: int, backend: Backend) -> bool:
    """Whether `batch_norm_act` runs its Triton kernels on x, without `sync`."""
    left = backend == "auto" and _left_to_the_compiler(x, training, groups)
    return use_triton("batch_norm_act", x, backend) and not left


def _left_to_the_compiler(x: Tensor, training: bool, groups: int) -> bool:
    """Whether torch.compile is at work, on a layer for which its kernels were measured faster than the Triton ones."""
    if not torch.compiler.is_compiling() or not training or groups > 1 or x.dtype != torch.bfloat16:
        return False
    for rows, channels in COMPILED_IS_FASTER:  # a look-up would make a size that torch.compile left open a constant
        if x.shape[1] == channels and x.numel() == rows * channels:
            log_once(
                f"batch_norm_act leaves {rows} rows of {channels} channels to torch.compile, which was measured faster"
            )
            return True
    return False


def check(
    x: Tensor,
    channel_tensors: tuple[Tensor, ...],
    training: bool,
    momentum: float,
    groups: int,
    eps: float,
    negative_slope: float,
) -> None:
    if not (eps > 0 if training else eps >= 0):
        raise ValueError(f"batch_norm_act: eps is above 0 in training mode and never below, not {eps}")
    if training and not 0 <= momentum <= 1:
        raise ValueError(f"batch_norm_act: momentum is in 0..1, not {momentum}")
    if not negative_slope >= 0:
        raise ValueError(f"batch_norm_act: negative_slope is 0 or more, not {negative_slope}")
    if x.dim() not in (2, 4):
        raise ValueError(f"batch_norm_act: x is (N, C, H, W) or (N, C), not of shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"batch_norm_act: x is float32, bfloat16, float16 or float64, not {x.dtype}")
    samples, channels = x.shape[0], x.shape[1]
    statistics_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in zip(("weight", "bias", "running_mean", "running_var"), channel_tensors, strict=True):
        if (
            tensor.shape != (channels,)
            or tensor.dtype != statistics_dtype
            or tensor.device != x.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"batch_norm_act: {name} is ({channels},), contiguous, {statistics_dtype}, on {x.device}, "
                f"not {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}, on {tensor.device}"
            )
    if groups < 1 or samples % groups:
        raise ValueError(f"batch_norm_act: groups={groups} does not divide N={samples}")
    if training and x.numel() <= channels * groups:
        raise ValueError(
            f"batch_norm_act: training needs more than one value a channel and group; x is {tuple(x.shape)}, "
            f"groups={groups}"
        )
