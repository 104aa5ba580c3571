"""The Triton kernels of image_conv and image_conv_transpose against float64, and as autograd and compile see them."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdcgan.kernels import image_conv, image_conv_op, image_conv_transpose
from fastdcgan.kernels.backend import INTERPRETING
from fastdcgan.kernels.image_conv_triton import plan
from fastdcgan.kernels.plan import Plan

# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16] if INTERPRETING else [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # of the images, and features
    ((3, 3, 10, 14), 64),  # an odd number of samples, not square, one tile that is not full
    ((1, 1, 34, 18), 64),  # two tiles, the second nearly empty
    ((3, 4, 6, 10), 70),  # more features than a block
    ((2, 3, 18, 18), 5),
    ((1, 3, 2, 2), 16),  # all border
    ((5, 2, 2, 6), 1),
]


def conv(images, weight, slope=0.2):
    return image_conv(images, weight, negative_slope=slope, backend="triton")


transposed_conv = functools.partial(image_conv_transpose, backend="triton")


def draw(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "features"), SHAPES, ids=str)
def test_against_float64(check_image_conv, shape, features, dtype):
    check_image_conv(conv, False, shape, features, dtype)
    check_image_conv(transposed_conv, True, shape, features, dtype)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    samples=st.integers(1, 5),
    channels=st.integers(1, 4),
    features=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    slope=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_drawn_shapes(check_image_conv, samples, channels, features, height, width, dtype, slope):
    shape = (samples, channels, 2 * height, 2 * width)
    # All of a handful of values may lie where the rounding is largest.
    tolerance = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    check_image_conv(conv, False, shape, features, dtype, slope, tolerance=tolerance)
    check_image_conv(transposed_conv, True, shape, features, dtype, tolerance=tolerance)


@pytest.mark.parametrize("cut", [Plan(16, 16, 3, 3), Plan(32, 32, 1, 4), Plan(16, 64, 7, 1)], ids=str)
def test_every_cut_gives_the_same(check_image_conv, monkeypatch, cut):
    """Several turns, several splits, a last one that is nearly empty: 105 rows, and 40 features."""
    one_turn = cut._replace(turns=1, splits=-(-105 // cut.block_rows))
    monkeypatch.setattr(image_conv_op.kernels, "plan", lambda *sizes: cut if sizes[-1] else one_turn)
    check_image_conv(conv, False, (3, 3, 10, 14), 40)
    check_image_conv(transposed_conv, True, (3, 3, 10, 14), 40)


def test_the_plan_covers_every_row_and_no_split_is_empty():
    for rows in [1, 127, 128, 129, 4096, 65537, 2**22 + 1]:
        for channels in [1, 5, 64, 70, 512]:
            for itemsize in [2, 4]:
                for programs in [256, None]:
                    cut = plan(rows, channels, itemsize, 64, programs)
                    each = cut.block_rows * cut.turns
                    assert (cut.splits - 1) * each < rows <= cut.splits * each, (rows, channels, cut)
                    if programs is None:
                        assert cut.turns == 1
                    else:
                        assert cut.splits * -(-channels // cut.block_cols) <= programs


def test_not_a_number_spoils_only_what_sees_it(device):
    """A window holds a value of the pixel beside its taps, and nothing may come of it."""
    for channels in (1, 3, 4):
        images, weight = draw(2, channels, 12, 12, device=device), draw(8, channels, 4, 4, device=device)
        images[0, channels - 1, 5, 6] = float("nan")
        expected = image_conv(images, weight, negative_slope=0.2, backend="reference")
        assert torch.equal(conv(images, weight).isnan(), expected.isnan())


def test_not_a_number_spoils_the_cells_around_it(device):
    """Six lines of four pixels, where torch spoils the middle four: a cell's two lines are one product."""
    x, weight = draw(2, 8, 6, 6, device=device), draw(8, 3, 4, 4, device=device) / 9
    x[1, 3, 2, 3] = float("nan")
    y, expected = transposed_conv(x, weight), image_conv_transpose(x, weight, backend="reference")
    bad = torch.zeros(2, 3, 12, 12, dtype=torch.bool, device=device)
    bad[1, :, 2:8, 5:9] = True
    assert torch.equal(y.isnan(), bad) and expected.isnan().sum() == 48
    torch.testing.assert_close(y[~bad], expected[~bad], rtol=1e-2, atol=1e-2)


def test_tanh_far_out(device):
    weight = torch.zeros(1, 1, 4, 4, device=device)
    weight[0, 0, 1, 1] = 1.0  # the even pixels' only tap
    x = torch.tensor([0.0, 30.0, -30.0, 1e4, -1e4, 3e38, -3e38], device=device).view(1, 1, 1, 7)
    y = transposed_conv(x, weight)[0, 0, 0, ::2]
    assert torch.equal(y, torch.tensor([0.0, 1, -1, 1, -1, 1, -1], device=device))


def test_other_layouts_are_copied(device):
    """Of the input, the weight and the gradient, which also arrives expanded from a sum."""
    for operation, x, weight in (
        (conv, draw(2, 3, 8, 6, device=device), draw(5, 3, 4, 4, device=device)),
        (transposed_conv, draw(2, 5, 4, 3, device=device), draw(5, 3, 4, 4, device=device)),
    ):

        def run(x, weight, dy, operation=operation):
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = operation(*leaves)
            return [
                y,
                *torch.autograd.grad(
                    y, leaves, dy if dy is not None else torch.ones((), device=device).expand(y.shape)
                ),
            ]

        dy = draw(*operation(x, weight).shape, device=device)
        expected = run(x, weight, dy)
        for found in (run(x.contiguous(), weight.contiguous(), dy.contiguous()), run(x, weight, dy.contiguous())):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for found, right in zip(run(x, weight, None), run(x, weight, torch.ones_like(dy)), strict=True):
            assert torch.equal(found, right)


@pytest.fixture
def launches(monkeypatch):
    """The names of all launches, as they happen; none multiplies in TF32."""
    names = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name in ("down", "up", "outer", "add_splits"):
        launch = getattr(image_conv_op, f"launch_{name}")
        monkeypatch.setattr(
            image_conv_op,
            f"launch_{name}",
            lambda *arguments, name=name, launch=launch: (names.append(name), launch(*arguments))[1],
        )
    return names


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("needed", ["dx", "dw", "both"])
def test_only_what_is_needed(device, launches, assert_close, needed, compiled):
    """One graph where compiled, and no launch for a gradient that nobody asks for."""
    images, first, last = (draw(*shape, device=device) for shape in ((2, 3, 8, 6), (5, 3, 4, 4), (5, 3, 4, 4)))
    tensors = images, first / 7, last / 9
    wanted = {"dx": (True, False, False), "dw": (False, True, True), "both": (True, True, True)}[needed]

    def network(images, first, last, backend="triton"):
        y = image_conv(images * 1, first, negative_slope=0.2, backend=backend)
        return image_conv_transpose(y * 2, last, backend=backend).square().sum()

    def run(network, dtype):
        leaves = [tensor.to(dtype).requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
        loss = network(*leaves)
        return [loss, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])]

    torch._dynamo.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    found = run(torch.compile(network, fullgraph=True, backend=backend) if compiled else network, torch.float32)
    backward = {"dx": ["down", "up"], "dw": ["add_splits", "add_splits", "down", "outer", "outer"]}
    backward["both"] = [*backward["dw"], "up"]
    assert launches[:2] == ["down", "up"] and sorted(launches[2:]) == backward[needed]
    expected = run(functools.partial(network, backend="reference"), torch.float64)
    for actual, right in zip(found, expected, strict=True):
        assert_close("loss or gradient", actual, right)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_gradient_penalty(device, launches, assert_close, slope):
    """With create_graph=True the gradients are torch's own operations, and so are those of them."""
    images, first, last = (draw(*shape, device=device) for shape in ((2, 3, 8, 6), (5, 3, 4, 4), (5, 3, 4, 4)))
    first, last = first / 7, last / 9

    def gradients(dtype, backend):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (images, first, last)]
        y = image_conv(leaves[0], leaves[1], negative_slope=slope, backend=backend)
        y = image_conv_transpose(y, leaves[2], backend=backend)
        once = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        assert backend == "reference" or launches == ["down", "up"]
        return [*once, *torch.autograd.grad(sum(g.square().sum() for g in once), leaves)]

    found = gradients(torch.float32, "triton")
    names = ["dx", "dfirst", "dlast", "ddx", "ddfirst", "ddlast"]
    for name, actual, expected in zip(names, found, gradients(torch.float64, "reference"), strict=True):
        assert_close(name, actual, expected)


def test_opcheck(device):
    images, weight, y = (draw(*shape, device=device) for shape in ((2, 3, 8, 6), (5, 3, 4, 4), (2, 5, 4, 3)))
    for out_fine, out_coarse in ((None, None), (images.tanh(), y - 1)):
        torch.library.opcheck(image_conv_op.down, (images, out_fine, weight, 0.2))
        torch.library.opcheck(image_conv_op.up, (y, out_coarse, weight, 0.2, out_coarse is None))
        torch.library.opcheck(image_conv_op.outer, (images, out_fine, y, out_coarse, 0.2))


def test_same_bits_every_time(device):
    shape, features, repeats = ((3, 3, 18, 14), 19, 2) if device == "cpu" else ((256, 3, 64, 64), 64, 50)
    images = draw(*shape, device=device).requires_grad_()
    first, last = (draw(features, 3, 4, 4, device=device).requires_grad_() for _ in range(2))

    def run():
        y = transposed_conv(conv(images, first), last)
        return [y, *torch.autograd.grad(y, (images, first, last), y.detach())]

    once = run()
    for _ in range(repeats - 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), once, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "features"), [((128, 3, 64, 64), 64), ((1024, 3, 64, 64), 64), ((256, 1, 128, 128), 32)], ids=str
)
def test_full_layers(check_image_conv, device, shape, features, dtype):
    if device == "cpu":
        pytest.skip("the interpreter would take minutes")
    check_image_conv(conv, False, shape, features, dtype)
    check_image_conv(transposed_conv, True, shape, features, dtype)


def test_tf32(check_image_conv, device, monkeypatch):
    if device == "cpu":
        pytest.skip("the interpreter knows no TF32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    shape, slope = (16, 3, 64, 64), 1.0  # no kink, which so coarse a z may miss
    with pytest.raises(AssertionError):  # so that it is known to be on
        check_image_conv(conv, False, shape, 64, slope=slope)
    tolerance = 2**-9  # two factors cut off after 11 bits
    check_image_conv(conv, False, shape, 64, slope=slope, tolerance=tolerance)
    check_image_conv(transposed_conv, True, shape, 64, tolerance=tolerance)


@pytest.mark.parametrize(
    ("samples", "features"), [(2**15 + 2, 64), (2**31 // (3 * 64 * 64) + 2, 5)], ids=["coarse", "fine"]
)
def test_more_than_two_to_the_31_elements(device, samples, features):
    if device == "cpu" or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GB free")
    images = torch.empty((samples, 64, 64, 3), dtype=torch.bfloat16, device=device).normal_().permute(0, 3, 1, 2)
    weight = draw(features, 3, 4, 4, device=device, dtype=torch.bfloat16) / 7

    def run(images):
        leaves = images.detach().requires_grad_(), weight.detach().requires_grad_()
        y = conv(*leaves)
        gradients = torch.autograd.grad(y, leaves, y.detach())
        restored = transposed_conv(y.detach(), weight)
        return y.detach()[-2:].clone(), gradients[0][-2:].clone(), restored[-2:].clone(), gradients[1].double()

    whole, last = run(images), run(images[-2:])
    for a, b in zip(whole[:3], last[:3], strict=True):
        torch.testing.assert_close(a, b)
    halves = [run(half)[3] for half in images.chunk(2)]
    torch.testing.assert_close(whole[3], halves[0] + halves[1], rtol=2e-2, atol=whole[3].abs().max().item() * 2e-3)
