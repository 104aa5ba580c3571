"""What the shipped kernels compile to, for five kinds of GPU and without any: no spills, 16 bytes at a time.

The launching code runs as it stands, on tensors without memory; each launch is compiled for the target and not run.
"""

from __future__ import annotations

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from fastdcgan.kernels.backend import INTERPRETING, TRITON_MISSING

if INTERPRETING or TRITON_MISSING:
    pytest.skip("needs a process that compiles kernels", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdcgan.kernels import (
    adam_step_triton,
    batch_norm_act_op,
    batch_norm_act_triton,
    image_conv_op,
    uint8_to_float_triton,
)

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

TARGETS = [80, 90, 100, 120]  # A100, H100 and H200, B200, GeForce 50
TURING = 75  # such as the T4: float32 alone, as it does not compute in bfloat16
CONSUMER = 99 * 1024  # bytes of shared memory that one program can have on a consumer GPU
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# 168 registers let three programs of 4 warps share a multiprocessor; the plan counts on two, for which there is room
# with Triton 3.6 and 3.7 too. 3.6 moves a single 16-bit value before the loop of `statistics`.
REGISTERS, SINGLES = 168 if TRITON >= (3, 8) else 208, 0 if TRITON >= (3, 7) else 1
LAYERS = [  # shape, groups
    ((64, 512, 4, 4), 1),
    ((256, 128, 16, 16), 2),
    ((4096, 64, 32, 32), 1),
]


@pytest.fixture
def compiled(monkeypatch):
    """compiled(capability): the list that every launch from now on appends its compiled kernel to."""
    launches = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        launches.append(run(self, *arguments, grid=grid, warmup=True, **options))

    def target(capability):
        described = GPUTarget("cuda", capability, 32)
        device = SimpleNamespace(
            get_current_target=lambda: described,
            get_current_device=lambda: capability,
            get_current_stream=lambda device=0: 0,
        )
        monkeypatch.setattr(driver, "_active", device)
        return launches

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return target


def check(kernel, capability, tmp_path, wide_loads, wide_stores, registers=168, single=False):
    ptx = kernel.asm["ptx"]
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    assembler = subprocess.run(
        [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(source), "-o", str(tmp_path / "cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    name = f"{kernel.src.name} for sm_{capability}"
    used = int(re.search(r"Used (\d+) registers", assembler.stderr).group(1))
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", assembler.stderr)]
    assert spills and not any(spills), f"{name} spills: {assembler.stderr}"
    assert used <= registers, f"{name} uses {used} registers"
    loads, stores = re.findall(r"ld\.global\S*", ptx), re.findall(r"st\.global\S*", ptx)
    for moves, wide in ((loads, wide_loads), (stores, wide_stores)):
        assert not wide or any(move.endswith(".v4.b32") for move in moves), f"{name} moves {moves}"
        singles = sum(move.endswith(".b16") for move in moves)
        assert single or singles <= SINGLES, f"{name} moves single 16-bit values: {moves}"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [*((target, torch.bfloat16) for target in TARGETS), (90, torch.float32), (TURING, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(("shape", "groups"), LAYERS, ids=str)
def test_batch_norm_act(compiled, tmp_path, capability, dtype, shape, groups):
    launches = compiled(capability)
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    weight, bias, running_mean, running_var = (torch.empty(shape[1], device="meta") for _ in range(4))
    cut = batch_norm_act_triton.plan(x.numel() // (shape[1] * groups), shape[1], groups)
    _, mean, inverse = batch_norm_act_op.launch_forward(
        x, weight, bias, running_mean, running_var, True, 0.1, 1e-5, 0.2, groups, cut
    )
    batch_norm_act_op.launch_backward(x, x, x, weight, bias, mean, inverse, True, 0.2, cut)
    assert [kernel.src.name for kernel in launches] == ["statistics", "normalize", "sums", "gradient"]
    for kernel in launches:
        writes = kernel.src.name in ("normalize", "gradient")
        # Turing loads into registers what others copy to shared memory; here too, two programs fit all the same.
        registers = 208 if capability in (TURING, 120) else REGISTERS
        check(kernel, capability, tmp_path, wide_loads=True, wide_stores=writes, registers=registers)
        assert kernel.metadata.shared <= CONSUMER, f"{kernel.src.name} takes {kernel.metadata.shared} bytes"


def test_batch_norm_act_in_float64_fits_a_consumer_gpu(compiled):
    launches = compiled(80)
    x = torch.empty((256, 128, 16, 16), dtype=torch.float64, device="meta", memory_format=torch.channels_last)
    channels = [torch.empty(128, dtype=torch.float64, device="meta") for _ in range(4)]
    cut = batch_norm_act_op.plan_for(x, 2)
    _, mean, inverse = batch_norm_act_op.launch_forward(x, *channels, True, 0.1, 1e-5, 0.2, 2, cut)
    batch_norm_act_op.launch_backward(x, x, x, *channels[:2], mean, inverse, True, 0.2, cut)
    assert len(launches) == 4 and max(kernel.metadata.shared for kernel in launches) <= CONSUMER


@pytest.mark.parametrize("capability", [TURING, *TARGETS])
def test_adam_step(compiled, tmp_path, capability):
    launches = compiled(capability)
    shapes = [(100, 512, 4, 4), (512,), (512,), (512, 256, 4, 4), (256,), (256,), (256, 128, 4, 4), (128,), (128,)]
    params, exp_avgs, exp_avg_sqs, emas = ([torch.empty(s) for s in shapes] for _ in range(4))
    grads = [torch.empty(s, dtype=torch.bfloat16 if len(s) == 4 else torch.float32) for s in shapes]
    copies = [torch.empty(s, dtype=torch.bfloat16) if len(s) == 4 else None for s in shapes]
    step, lr = torch.zeros(()), torch.zeros(())
    adam_step_triton.launch(
        params, grads, exp_avgs, exp_avg_sqs, step, lr, (0.5, 0.999), 1e-8, copies, emas, torch.zeros(())
    )
    assert [kernel.src.name for kernel in launches] == ["advance", "adam"]
    check(launches[0], capability, tmp_path, wide_loads=False, wide_stores=False)
    check(launches[1], capability, tmp_path, wide_loads=True, wide_stores=True, registers=96)


@pytest.mark.parametrize("which", range(6), ids=["param", "grad", "exp_avg", "exp_avg_sq", "copy", "ema"])
def test_adam_step_moves_16_bytes_at_once_only_where_they_lie_so(compiled, which):
    """Of a tensor that starts between them it would fault, and after the last ones it would write over a neighbour."""

    def wide_moves(start, size):
        tensors = [torch.zeros(size, dtype=torch.bfloat16 if i == 4 else torch.float32) for i in range(6)]
        tensors[which] = torch.zeros(start + size, dtype=tensors[which].dtype)[start:]
        param, grad, exp_avg, exp_avg_sq, copy, ema = ([tensor] for tensor in tensors)
        launches = compiled(90)
        adam_step_triton.launch(
            param, grad, exp_avg, exp_avg_sq, torch.zeros(()), 1e-3, (0.5, 0.999), 1e-8, copy, ema, torch.zeros(())
        )
        return launches[-1].asm["ptx"].count(".v4.")

    assert wide_moves(0, 64) > wide_moves(1, 64)
    assert wide_moves(0, 67) == 0


@pytest.mark.parametrize(
    ("capability", "dtype"), [(TURING, torch.float32), *((target, torch.bfloat16) for target in TARGETS)], ids=str
)
def test_uint8_to_float(compiled, tmp_path, capability, dtype):
    launches = compiled(capability)
    images = torch.empty((10, 64, 64, 3), dtype=torch.uint8)
    out = torch.empty((8, 3, 64, 64), dtype=dtype).contiguous(memory_format=torch.channels_last)
    uint8_to_float_triton.gather(images, torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.bool), out)
    check(launches[0], capability, tmp_path, wide_loads=False, wide_stores=True)


@pytest.mark.parametrize(
    ("capability", "dtype", "allow_tf32"),
    [*((target, torch.bfloat16, True) for target in TARGETS), (90, torch.float32, True), (90, torch.float32, False)],
    ids=str,
)
def test_image_conv(compiled, tmp_path, monkeypatch, capability, dtype, allow_tf32):
    """D's first layer and G's last one, forward and backward, at batch 256."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allow_tf32)
    launches = compiled(capability)
    images, weight, maps = (
        torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for shape in ((256, 3, 64, 64), (64, 3, 4, 4), (256, 64, 32, 32))
    )
    image_conv_op.launch_down(images, None, weight, 0.2)
    image_conv_op.launch_down(images, images, weight, 1.0)
    image_conv_op.launch_up(maps, None, weight, 1.0, True)
    image_conv_op.launch_up(maps, maps, weight, 0.2, False)
    image_conv_op.launch_outer(images, images, maps, None, 1.0)
    norm = tuple(torch.empty(64, device="meta") for _ in range(4))
    image_conv_op.launch_outer(images, images, maps, None, 0.0, norm)
    partial = image_conv_op.launch_outer(images, None, maps, maps, 0.2)
    image_conv_op.launch_add_splits(partial, images)
    assert [kernel.src.name for kernel in launches] == ["down"] * 2 + ["up"] * 2 + ["outer"] * 3 + ["add_splits"]
    multiply = {80: ["mma.sync"], 90: ["mma.sync", "wgmma"], 100: ["tcgen05.mma"], 120: ["mma.sync"]}[capability]
    pair = "v2.b32" if dtype == torch.float32 else "global.b32"  # two values of an image at once
    for kernel in launches[:-1]:
        name, ptx = kernel.src.name, kernel.asm["ptx"]
        # Only the weight comes value by value: once, or from the first cache.
        check(kernel, capability, tmp_path, wide_loads=False, wide_stores=name == "down", registers=192, single=True)
        assert len(re.findall(r"ld\.global\.b16", ptx)) <= 32, f"{name} loads single values"
        if name == "up":
            copied = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", ptx))
            assert "0x10" in copied, f"{name} copies {copied}"
        else:
            loads = set(re.findall(r"ld\.global\S*", ptx))
            assert any(load.endswith(pair) for load in loads), f"{name} loads {loads}"
        on_matrix_units = any(instruction in ptx for instruction in multiply)
        assert on_matrix_units == (dtype == torch.bfloat16 or allow_tf32), f"{name} multiplies elsewhere"
        # Two programs of `outer` share a data centre GPU's multiprocessor and its 227 KB.
        assert kernel.metadata.shared <= CONSUMER, f"{name} takes {kernel.metadata.shared} bytes of shared memory"
    check(launches[-1], capability, tmp_path, wide_loads=False, wide_stores=False, single=True)
