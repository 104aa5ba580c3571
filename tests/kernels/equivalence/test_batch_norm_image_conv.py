"""The Triton kernels of batch_norm_image_conv_transpose: the bits of the two operations it joins, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.kernels import (
    batch_norm_act,
    batch_norm_image_conv_op,
    batch_norm_image_conv_transpose,
    image_conv_transpose,
)
from fastdcgan.kernels.backend import INTERPRETING

DTYPES = [torch.float32, torch.float16] if INTERPRETING else [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # of x, and channels of the images
    ((3, 64, 5, 7), 3),  # one tile that is not full
    ((2, 64, 17, 9), 1),  # several turns
    ((3, 70, 3, 5), 4),  # more features than a block
    ((2, 5, 1, 1), 3),
]
NAMES = ["images", "dx", "dnorm_weight", "dnorm_bias", "dweight"]


def draw(shape, channels, device, dtype=torch.float32):
    """x, BatchNorm's weight and bias, the weight, and the images' gradient."""

    def rows(*size):
        return torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    features = shape[1]
    vectors = torch.rand(features, device=device) + 0.5, torch.randn(features, device=device)
    return (
        rows(*shape) * 2 + 1,
        *vectors,
        rows(features, channels, 4, 4) / (4 * features**0.5),
        rows(shape[0], channels, 2 * shape[2], 2 * shape[3]),
    )


def joined(x, norm_weight, norm_bias, weight, statistics, slope=0.2, backend="triton"):
    return batch_norm_image_conv_transpose(
        x, norm_weight, norm_bias, *statistics, weight, momentum=0.3, eps=1e-3, negative_slope=slope, backend=backend
    )


def apart(x, norm_weight, norm_bias, weight, statistics, slope=0.2, backend="triton"):
    y = batch_norm_act(
        x,
        norm_weight,
        norm_bias,
        *statistics,
        training=True,
        momentum=0.3,
        eps=1e-3,
        negative_slope=slope,
        backend=backend,
    )
    return image_conv_transpose(y, weight, backend=backend)


def run(operation, tensors, *, slope=0.2, wanted=(True,) * 4, dtype=None):
    """The images, the wanted gradients and the running statistics."""
    *inputs, dimages = [tensor.detach().to(dtype or tensor.dtype) for tensor in tensors]
    leaves = [tensor.requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
    statistics = torch.zeros_like(leaves[1]), torch.ones_like(leaves[1])
    images = operation(*leaves, tuple(each.detach() for each in statistics), slope)
    return [images, *torch.autograd.grad(images, [leaf for leaf in leaves if leaf.requires_grad], dimages), *statistics]


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels"), SHAPES, ids=str)
def test_the_bits_of_both_operations(device, shape, channels, dtype, slope):
    tensors = draw(shape, channels, device, dtype)
    pairs = zip(run(joined, tensors, slope=slope), run(apart, tensors, slope=slope), strict=True)
    for name, (found, expected) in zip([*NAMES, "running_mean", "running_var"], pairs, strict=True):
        assert torch.equal(found, expected), name


def test_against_float64(device, assert_close, monkeypatch):
    """Not only as both operations do it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors = draw((3, 64, 5, 7), 3, device)
    expected = run(lambda *arguments: apart(*arguments, backend="reference"), tensors, dtype=torch.float64)
    for name, found, right in zip(NAMES, run(joined, tensors), expected, strict=False):
        assert_close(name, found, right, "sum" if name.startswith("d") else "output")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_lies_between_is_not_kept(device, compiled):
    """Of tensors of x's size x alone, where both operations keep y too."""
    tensors = draw((2, 64, 6, 10), 3, device)
    backend = "aot_eager" if device == "cpu" else "inductor"

    def kept(operation):
        torch._dynamo.reset()
        run_it = torch.compile(operation, fullgraph=True, backend=backend) if compiled else operation
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda t: t):
            results = run(run_it, tensors)
        for actual, expected in zip(results, run(operation, tensors), strict=True):
            torch.testing.assert_close(actual, expected)
        return len({tensor.data_ptr() for tensor in found if tensor.numel() == tensors[0].numel()})

    assert kept(apart) == 2
    assert kept(joined) == 1


@pytest.mark.parametrize("wanted", [(True, True, True, False), (False, False, False, True)], ids=["x", "weight"])
def test_only_some_gradients(device, wanted):
    tensors = draw((2, 64, 4, 6), 3, device)
    for found, expected in zip(run(joined, tensors, wanted=wanted), run(apart, tensors, wanted=wanted), strict=True):
        assert torch.equal(found, expected)


def test_gradients_of_gradients(device, assert_close, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors = draw((2, 5, 3, 4), 3, device)

    def twice(operation, dtype):
        *inputs, dimages = [tensor.detach().to(dtype) for tensor in tensors]
        leaves = [tensor.requires_grad_() for tensor in inputs]
        statistics = torch.zeros_like(leaves[1]).detach(), torch.ones_like(leaves[1]).detach()
        once = torch.autograd.grad(operation(*leaves, statistics), leaves, dimages, create_graph=True)
        return [*once, *torch.autograd.grad(sum(each.square().sum() for each in once), leaves)]

    expected = twice(lambda *arguments: apart(*arguments, backend="reference"), torch.float64)
    for i, (found, right) in enumerate(zip(twice(joined, torch.float32), expected, strict=True)):
        assert_close(f"gradient {i}", found, right, "sum")


def test_opcheck(device):
    x, norm_weight, norm_bias, _, dimages = draw((2, 64, 3, 5), 3, device)
    images = torch.tanh(dimages)
    mean, inverse = (torch.rand(1, 64, device=device) for _ in range(2))
    torch.library.opcheck(
        batch_norm_image_conv_op.outer_normalized,
        (dimages, images, x, mean, inverse, norm_weight, norm_bias, 0.2),
    )


def test_full_layer(device):
    if device == "cpu":
        pytest.skip("the interpreter would take minutes")
    tensors = draw((128, 64, 32, 32), 3, device, torch.bfloat16)
    for name, found, expected in zip(
        NAMES, run(joined, tensors, slope=0.0), run(apart, tensors, slope=0.0), strict=False
    ):
        assert torch.equal(found, expected), name
