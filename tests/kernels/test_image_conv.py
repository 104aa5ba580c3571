"""The references of image_conv and image_conv_transpose: values, which implementation runs, and errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from fastdcgan.kernels import batch_norm_act, batch_norm_image_conv_transpose, image_conv, image_conv_transpose


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_cpu_auto_is_the_reference(channels, dtype):
    images = torch.randn(2, channels, 8, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, channels, 4, 4, dtype=dtype, requires_grad=True)
    y = image_conv(images, weight, negative_slope=0.2)
    z = F.conv2d(images, weight, stride=2, padding=1)
    assert torch.equal(y, F.leaky_relu(z, 0.2)) and "Conv" not in y.grad_fn.name()
    x = torch.randn(2, 5, 4, 3, dtype=dtype, requires_grad=True)
    y = image_conv_transpose(x, weight)
    assert torch.equal(y, F.conv_transpose2d(x, weight, stride=2, padding=1).tanh())
    assert y.grad_fn.name() == "TanhBackward0"


def test_gradcheck():
    images, weight, x = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4, 6), (2, 3, 4, 4), (2, 2, 2, 3))
    )
    for operation, of in ((lambda *a: image_conv(*a, negative_slope=0.2), images), (image_conv_transpose, x)):
        assert torch.autograd.gradcheck(operation, (of, weight), fast_mode=True)
        assert torch.autograd.gradgradcheck(operation, (of, weight), fast_mode=True)


def test_errors():
    images, weight, x = torch.zeros(2, 3, 8, 6), torch.zeros(5, 3, 4, 4), torch.zeros(2, 5, 4, 3)
    for message, wrong in {
        "weight is .K, C, 4, 4.": lambda: image_conv(images, weight[..., :3], negative_slope=0.2),
        "3 channels": lambda: image_conv(images[:, :2], weight, negative_slope=0.2),
        "not empty": lambda: image_conv(images[:0], weight, negative_slope=0.2),
        "2h, 2w": lambda: image_conv(images[..., 1:], weight, negative_slope=0.2),
        r"2h, 2w.*3, 7, 6": lambda: image_conv(images[:, :, 1:], weight, negative_slope=0.2),
        "negative_slope": lambda: image_conv(images, weight, negative_slope=-0.1),
        "images is float32": lambda: image_conv(images.int(), weight.int(), negative_slope=0.2),
        "weight is torch.float32": lambda: image_conv(images, weight.half(), negative_slope=0.2),
        "weight is torch.float32, on cpu": lambda: image_conv(images, weight.to("meta"), negative_slope=0.2),
        "5 channels": lambda: image_conv_transpose(x[:, :4], weight),
        "4 dimensions": lambda: image_conv_transpose(x[0], weight),
        "x is float32": lambda: image_conv_transpose(x.long(), weight.long()),
        "backend is": lambda: image_conv_transpose(x, weight, backend="cuda"),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


def test_what_triton_is_not_for():
    with pytest.raises(RuntimeError, match=r"up to 4 image channels and not for float64; these are 5, torch.float32"):
        image_conv(torch.zeros(2, 5, 4, 4), torch.zeros(8, 5, 4, 4), negative_slope=0.2, backend="triton")
    with pytest.raises(RuntimeError, match=r"these are 3, torch.float64"):
        image_conv_transpose(torch.zeros(2, 8, 4, 4).double(), torch.zeros(8, 3, 4, 4).double(), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(dtype):
    images, weight = torch.randn(2, 3, 8, 6, dtype=dtype), torch.randn(5, 3, 4, 4, dtype=dtype, requires_grad=True)

    def network(images):
        return image_conv_transpose(image_conv(images, weight, negative_slope=0.2), weight / 9)

    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(images), network(images))


def test_auto_is_triton_only_for_what_was_measured(monkeypatch):
    seen = []
    module = sys.modules["fastdcgan.kernels.image_conv"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "use_triton", lambda operation, tensor, backend: seen.append(backend))
    for dtype, channels in ((torch.bfloat16, 3), (torch.float16, 4), (torch.float32, 3), (torch.bfloat16, 5)):
        image_conv(
            torch.zeros(1, channels, 4, 4, dtype=dtype), torch.zeros(8, channels, 4, 4, dtype=dtype), negative_slope=0
        )
    assert seen == ["auto", "auto", "reference", "reference"]


def test_auto_leaves_gpus_from_before_ampere_alone(monkeypatch):
    """Where the kernels spill kilobytes a thread."""
    module = sys.modules["fastdcgan.kernels.image_conv"]
    for capability, left in (((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert (module.spills("cuda", 1), module.spills("cpu", None)) == (left, False)


def test_the_results_have_the_inputs_dtype_under_autocast_too():
    images, maps, weight = torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3), torch.randn(5, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = image_conv(images, weight, negative_slope=0.2), image_conv_transpose(maps, weight)
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_float32_products_are_those_of_cudnn_by_either_switch():
    pytest.importorskip("triton")
    from fastdcgan.kernels.image_conv_op import precision

    single, half = torch.zeros(1), torch.zeros(1).half()
    for allowed, name in ((True, "tf32"), (False, "ieee")):
        torch.backends.cudnn.allow_tf32 = allowed
        assert (precision(single), precision(half)) == (name, "ieee")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # `allow_tf32` can no longer be read
    assert precision(single) == "ieee"


def test_joined_on_a_cpu_it_is_both_operations():
    x, (weight, bias, mean, var) = torch.randn(4, 6, 3, 5), torch.rand(4, 6).unbind()
    last, options = torch.randn(6, 3, 4, 4) / 9, {"momentum": 0.3, "eps": 0.2, "negative_slope": 0.2}
    apart, joined = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    expected = image_conv_transpose(batch_norm_act(x, weight, bias, *apart, training=True, **options), last)
    assert torch.equal(batch_norm_image_conv_transpose(x, weight, bias, *joined, last, **options), expected)
    assert all(torch.equal(a, b) for a, b in zip(joined, apart, strict=True))


def test_joined_or_not_both_run_on_the_same_backend(monkeypatch):
    """Where one of them has no kernel, say: neither is chosen anew."""
    module = sys.modules["fastdcgan.kernels.batch_norm_image_conv"]
    seen = []
    for name in ("batch_norm_act", "image_conv_transpose"):
        monkeypatch.setattr(module, name, lambda x, *_, backend="auto", **__: seen.append(backend) or x)
    x, channel, weight = torch.randn(2, 6, 4, 4), torch.rand(4, 6), torch.randn(6, 3, 4, 4)
    batch_norm_image_conv_transpose(x, *channel, weight, backend="reference")
    assert seen == ["reference", "reference"]


def test_joined_a_weight_that_does_not_fit_leaves_the_statistics_alone():
    x, (weight, bias, mean, var) = torch.randn(4, 6, 3, 5), torch.rand(4, 6).unbind()
    before = mean.clone(), var.clone()
    with pytest.raises(ValueError, match="5 channels for this weight"):
        batch_norm_image_conv_transpose(x, weight, bias, mean, var, torch.randn(5, 3, 4, 4))
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


@pytest.mark.parametrize("kernels", [(True, False), (False, True)])
def test_joined_only_where_both_have_a_kernel(kernels, monkeypatch):
    """As for images of more than four channels."""
    module = sys.modules["fastdcgan.kernels.batch_norm_image_conv"]
    for name, has in zip(("norm_runs_triton", "conv_runs_triton"), kernels, strict=True):
        monkeypatch.setattr(module, name, lambda *_, has=has: has)
    x, channel, weight = torch.randn(4, 6, 3, 5), torch.rand(4, 6), torch.randn(6, 5, 4, 4) / 9
    expected = image_conv_transpose(batch_norm_act(x, *channel.clone(), training=True), weight)
    assert torch.equal(batch_norm_image_conv_transpose(x, *channel.clone(), weight), expected)
