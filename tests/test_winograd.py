"""Winograd's convolutions against torch's: values, gradients of both orders, layouts, and where they are taken."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from fastdcgan import models, native, winograd

Convolution = Callable[[Tensor, Tensor], Tensor]
PAIRS: list[tuple[Convolution, Convolution, int]] = [  # ours, torch's, and how much larger its input is than the grid
    (winograd.conv2d, lambda x, w: F.conv2d(x, w, stride=2, padding=1), 2),
    (winograd.conv_transpose2d, lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), 1),
]
both = pytest.mark.parametrize(("ours", "torchs", "scale"), PAIRS, ids=["conv2d", "conv_transpose2d"])


def operands(scale: int, grid: tuple[int, int], n: int, c: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(n, c if scale == 2 else k, *(scale * side for side in grid), dtype=dtype)
    weight = torch.randn(k, c, 4, 4, dtype=dtype)
    return [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]


def with_gradients(convolution: Convolution, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = convolution(x, weight)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y)
    return y, *torch.autograd.grad(y, (x, weight), dy.contiguous(memory_format=torch.channels_last))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@both
@pytest.mark.parametrize("grid", [(4, 4), (8, 12), (16, 4)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_in_float64_they_are_torchs(
    ours: Convolution, torchs: Convolution, scale: int, grid: tuple[int, int], memory_format: torch.memory_format
) -> None:
    x, weight = (
        t.detach().contiguous(memory_format=memory_format).requires_grad_()
        for t in operands(scale, grid, 3, 5, 7, torch.float64)
    )
    for a, b in zip(with_gradients(ours, x, weight), with_gradients(torchs, x, weight), strict=True):
        assert a.shape == b.shape and a.is_contiguous(memory_format=torch.channels_last)
        assert distance(a, b) < 1e-14  # some 10 roundings; a wrong number in a matrix is above 1e-2


@both
@pytest.mark.parametrize("which", [0, 1], ids=["of the images", "of the weight"])
def test_a_gradient_is_the_same_where_it_is_the_only_one(
    ours: Convolution, torchs: Convolution, scale: int, which: int
) -> None:
    """As of the images where a network's weights are kept fixed."""
    given = operands(scale, (4, 8), 3, 5, 7, torch.float64)
    given[1 - which].requires_grad_(False)
    found, expected = (torch.autograd.grad(each(*given).square().sum(), given[which])[0] for each in (ours, torchs))
    assert distance(found, expected) < 1e-13


@both
def test_in_float32_rounding_stays_within_what_is_stated(ours: Convolution, torchs: Convolution, scale: int) -> None:
    x, weight = operands(scale, (8, 8), 32, 64, 128, torch.float32)
    exact = with_gradients(torchs, x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    for a, b in zip(with_gradients(ours, x, weight), exact, strict=True):
        assert distance(a.double(), b) < 3e-6


@pytest.mark.parametrize("matrix", ["B", "G_2D", "A_T_2D"])
def test_a_wrong_number_in_a_matrix_is_far_outside(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = winograd._rows(8) if matrix == "B" else getattr(winograd, matrix)
    wrong = right.clone()
    row, column = right.nonzero()[len(right)].tolist()
    wrong[row, column] *= 1.5
    if matrix == "B":
        monkeypatch.setattr(winograd, "_rows", lambda side: wrong)
    else:
        monkeypatch.setattr(winograd, matrix, wrong)
    for ours, torchs, scale in PAIRS:
        x, weight = operands(scale, (8, 8), 3, 5, 7, torch.float64)
        assert distance(ours(x, weight), torchs(x, weight)) > 1e-2


@both
def test_they_differentiate_twice(ours: Convolution, torchs: Convolution, scale: int) -> None:
    given = operands(scale, (4, 4), 1, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(ours, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, given, fast_mode=True)


def test_the_operators_are_what_the_compiler_is_told() -> None:
    n, c, k, h, w = 2, 3, 5, 8, 4
    shapes = {"pixels": (n, c, 2 * h, 2 * w), "kernel": (k, c, 4, 4), "grid": (4, 25, k)}
    for name, shape in shapes.items():
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = winograd.transform(x, name, False, h, w).detach().requires_grad_()
        for given, transposed in ((x, False), (y, True)):
            torch.library.opcheck(winograd.transform, (given, name, transposed, h, w))
        # Of a linear map and its transpose: <y, T x> = <T' y, x>.
        left = (winograd.transform(x, name, False, h, w) * y).sum()
        right = (winograd.transform(y, name, True, h, w) * x).sum()
        torch.testing.assert_close(left, right)
    rows, weight = (torch.randn(m, 25, 4 * c, dtype=torch.float64, requires_grad=True) for m in (4, k))
    torch.library.opcheck(winograd.products, (rows, weight))


@both
@pytest.mark.parametrize(("dtype", "c", "k", "tolerance"), [(torch.float64, 5, 7, 1e-14), (torch.float32, 8, 16, 3e-6)])
def test_compiled_they_are_the_same(
    ours: Convolution, torchs: Convolution, scale: int, dtype: torch.dtype, c: int, k: int, tolerance: float
) -> None:
    given = operands(scale, (4, 8), 2, c, k, dtype)
    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    for a, b in zip(with_gradients(compiled, *given), with_gradients(torchs, *given), strict=True):
        assert distance(a, b) < tolerance
        assert a.is_contiguous(memory_format=torch.channels_last)


compiles_c = pytest.mark.skipif(native.load(winograd.SOURCE) is None, reason="needs gcc for this processor")


def each_map(n: int, c: int, h: int, w: int) -> list[tuple[Tensor, str, bool, int, int]]:
    """Arguments of `transform`, float32, for every map and its transpose; the tiles of the latter as products lie."""
    tiles, m = lambda m, c: torch.randn(25, m, c).transpose(0, 1), n * h * w // 16
    images = [torch.randn(shape) for shape in ((n, c, 2 * h, 2 * w), (n, c, 4, 4), (n, c, h, w))]
    pixels, kernel, grid = (x.contiguous(memory_format=torch.channels_last) for x in images)
    return [
        (pixels, "pixels", False, h, w),
        (tiles(m, 4 * c), "pixels", True, h, w),
        (kernel, "kernel", False, h, w),
        (tiles(n, 4 * c), "kernel", True, h, w),
        (tiles(m, c), "grid", False, h, w),
        (grid, "grid", True, h, w),
    ]


def surrounded(x: Tensor) -> Tensor:
    """The same where all memory around it is NaN: whoever reads there shows it."""
    around = x.new_full((x.numel() + 8192,), torch.nan)
    return around.as_strided(x.shape, x.stride(), 4096).copy_(x)


def in_torch(x: Tensor, name: str, transposed: bool, h: int, w: int) -> Tensor:
    return winograd.MAPS[name][transposed](x, h, w)


@compiles_c
@pytest.mark.parametrize(("n", "c", "h", "w"), [(3, 8, 4, 4), (1, 40, 8, 4), (2, 16, 4, 12), (5, 24, 20, 16)])
def test_in_c_they_are_the_same_maps(n: int, c: int, h: int, w: int) -> None:
    for x, *which in each_map(n, c, h, w):
        expected = in_torch(x.double(), *which)
        plain = x.contiguous()  # images not channels-last, tiles one after another
        apart = torch.stack((x, x), -1)[..., 0]  # channels not side by side
        for given in (surrounded(x), plain, apart):
            found = winograd.transform(given, *which)
            assert distance(found.double(), expected) < 3e-7, which  # 10 additions and roundings of 6e-8
            last = torch.contiguous_format if found.dim() == 3 else torch.channels_last
            assert found.shape == expected.shape and found.is_contiguous(memory_format=last)


@compiles_c
def test_in_c_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    given = each_map(7, 16, 8, 12)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append([winograd.transform(*arguments) for arguments in given])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@compiles_c
@pytest.mark.parametrize("function", ["B_T", "B", "G", "G_T", "A_T", "A"])
def test_a_wrong_number_in_c_is_far_outside(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = winograd.SOURCE.read_text()
    changed = re.sub(rf"(MAP {function}\(.*?d\[step\] = x\d)", r"\1 * 1.5f", text, count=1, flags=re.DOTALL)
    assert changed != text
    (tmp_path / "winograd.c").write_text(changed)
    monkeypatch.setattr(winograd, "SOURCE", tmp_path / "winograd.c")
    far = [distance(winograd.transform(*given), in_torch(*given)) for given in each_map(2, 8, 4, 8)]
    assert max(far) > 1e-2


@compiles_c
@pytest.mark.parametrize(("c", "dtype"), [(5, torch.float32), (36, torch.float32), (8, torch.bfloat16)], ids=str)
def test_what_c_cannot_do_is_left_to_torch(c: int, dtype: torch.dtype) -> None:
    for x, *which in each_map(3, c, 4, 8):
        assert torch.equal(winograd.transform(x.to(dtype), *which), in_torch(x.to(dtype), *which))


@compiles_c
def test_limits_are_those_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [winograd._limits(channels) for channels in (32, 36)] == [winograd.IN_C, winograd.IN_TORCH]
    monkeypatch.setattr(native, "load", lambda source: None)
    assert winograd._limits(32) == winograd.IN_TORCH


@compiles_c
def test_the_c_file_is_compiled_before_the_compiler_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "PAYS_HERE", True)
    layer = models.Discriminator(32, 3, 32).main[2]
    x = torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    native.load.cache_clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    assert distance(compiled(x), F.conv2d(x, layer.weight, stride=2, padding=1)) < 3e-6


def test_without_a_compiler_they_are_torchs_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)  # which remembers nothing
    for given in each_map(2, 8, 4, 8):
        assert torch.equal(winograd.transform(*given), in_torch(*given))
    assert "winograd.c cannot be compiled" in caplog.text and "gcc" in caplog.text


@pytest.mark.parametrize(
    ("gcc", "says"),
    [
        ("printf 'wrong.c:1: error: \\377\\n' >&2; exit 1", "wrong.c:1: error: \N{REPLACEMENT CHARACTER}"),
        ("kill $$", "died with"),
        ("echo >&2; exit 1", "non-zero exit status"),
        ("exit 0", "cannot open shared object file"),
    ],
)
def test_whatever_gcc_does_a_run_goes_on(
    gcc: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gcc").write_text(f"#!/bin/sh\n{gcc}\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert native.load(tmp_path / "wrong.c") is None
    assert "wrong.c cannot be compiled" in caplog.text and says in caplog.text and "\n" not in caplog.messages[0]


def test_without_a_folder_for_it_a_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert native.load(Path("right.c")) is None and "/nowhere" in caplog.text


def test_ctrl_c_is_not_for_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, or a notebook, sends it to the whole group of this process; its compiler has another."""
    (tmp_path / "gcc").write_text(f'#!/bin/sh\ncut -d" " -f5 /proc/$$/stat > "{tmp_path}/group"\nexit 1\n')
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    native.load.__wrapped__(Path("right.c"))
    assert int((tmp_path / "group").read_text()) != os.getpgrp()


def taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Take it on this processor too, whichever it is; returns the grids, as they come."""
    monkeypatch.setattr(winograd, "PAYS_HERE", True)
    grids: list[tuple[int, int]] = []
    for name, scale in (("conv2d", 2), ("conv_transpose2d", 1)):
        operation = getattr(winograd, name)

        def noted(x: Tensor, weight: Tensor, operation: Convolution = operation, scale: int = scale) -> Tensor:
            grids.append((x.shape[2] // scale, x.shape[3] // scale))
            return operation(x, weight)

        monkeypatch.setattr(winograd, name, noted)
    return grids


@pytest.mark.parametrize(
    ("limits", "size", "width", "batch", "expected"),
    [
        ("IN_C", (64, 64), 32, 16, [(4, 4), (8, 8), (16, 16)]),
        ("IN_C", (64, 64), 32, 15, [(8, 8), (16, 16)]),  # one tile an image: too few for its weights' transform
        ("IN_C", (32, 32), 24, 32, [(4, 4)]),  # of the larger grid's channels there must be 32
        ("IN_C", (128, 128), 32, 16, [(4, 4), (8, 8), (16, 16), (32, 32)]),
        ("IN_C", (64, 96), 32, 16, [(8, 12), (16, 24)]),  # not 4x6
        ("IN_C", (56, 56), 32, 16, []),  # 7, 14, 28
        ("IN_TORCH", (64, 64), 64, 32, [(4, 4), (8, 8), (16, 16)]),
        ("IN_TORCH", (64, 64), 64, 31, [(8, 8), (16, 16)]),
        ("IN_TORCH", (32, 32), 32, 32, [(4, 4)]),
        ("IN_TORCH", (128, 128), 64, 32, [(4, 4), (8, 8), (16, 16)]),  # and not 32
        ("IN_TORCH", (64, 96), 64, 32, [(8, 12)]),  # not 16x24
    ],
    ids=str,
)
def test_layers_take_them_where_they_are_faster(
    limits: str,
    size: tuple[int, int],
    width: int,
    batch: int,
    expected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids = taken_where_it_fits(monkeypatch)
    monkeypatch.setattr(winograd, "_limits", lambda channels: getattr(winograd, limits))
    generator, discriminator = models.Generator(size, 3, 10, width), models.Discriminator(size, 3, width)
    with torch.no_grad():
        images = generator(torch.randn(batch, 10))
        assert grids == expected
        grids.clear()
        discriminator(images)
        assert grids == expected[::-1]
        grids.clear()
        with torch.autocast("cpu"):  # products would be in bfloat16
            discriminator.main[2](torch.randn(batch, width, size[0] // 2, size[1] // 2))
        generator.eval()(torch.randn(batch, 10))
        monkeypatch.setattr(winograd, "PAYS_HERE", False)
        generator.train()(torch.randn(batch, 10))
        assert grids == []


@pytest.mark.parametrize(("sides", "kernel"), [((12, 12), 4), ((17, 16), 4), ((16, 16), 3)])
def test_shapes_that_do_not_fit_are_refused(sides: tuple[int, int], kernel: int) -> None:
    """Where they were taken, parts of the result would never be written, or what lies beyond the tensors read."""
    x, weight = torch.randn(2, 32, *sides), torch.randn(32, 32, kernel, kernel)
    with pytest.raises(ValueError, match="kernels are 4x4 and the smaller grid's sides multiples of 4"):
        winograd.conv2d(x, weight)
    with pytest.raises(ValueError, match="kernels are 4x4 and the smaller grid's sides multiples of 4"):
        winograd.conv_transpose2d(x[:, :, :6, :6] if kernel == 4 else x, weight)


@pytest.mark.parametrize("training", [False, True])
def test_networks_have_derivatives_of_every_kind(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators have none in forward mode, and torch says nothing of it."""
    grids = taken_where_it_fits(monkeypatch)
    generator, discriminator = models.Generator(32, 3, 10, 64), models.Discriminator(32, 3, 64)
    for network, x in ((generator, torch.randn(32, 10)), (discriminator, torch.randn(32, 3, 32, 32))):
        network.train(training)(x)
        assert bool(grids) == training
        tangent = torch.randn_like(x)
        grids.clear()
        _, along = torch.func.jvp(network, (x,), (tangent,))
        _, pull = torch.func.vjp(network, x)
        with torch.no_grad(), forward_ad.dual_level():
            again = forward_ad.unpack_dual(network(forward_ad.make_dual(x, tangent))).tangent
        assert not grids
        torch.testing.assert_close(again, along)
        torch.testing.assert_close((along * along).sum(), (pull(along)[0] * tangent).sum(), rtol=1e-3, atol=0)
        assert along.norm() > 0.1


def test_no_mask_of_an_activation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled discriminator keeps each activation's output that such a convolution takes, and no mask."""
    grids = taken_where_it_fits(monkeypatch)
    discriminator = models.Discriminator(64, 3, 64)
    compiled = torch.compile(lambda images: discriminator(images, groups=2), fullgraph=True, dynamic=False)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        compiled(torch.randn(32, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert grids == [(16, 16), (8, 8), (4, 4)]
    masks = [tuple(tensor.shape) for tensor in kept if tensor.dtype == torch.bool]
    assert masks == [(32, 512, 4, 4)]  # of the last activation, which a matrix product follows
