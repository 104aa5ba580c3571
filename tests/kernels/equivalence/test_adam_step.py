"""The Triton kernels of adam_step against float64 and against torch.optim.Adam."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdcgan.kernels import adam_step, adam_step_triton

fused = functools.partial(adam_step, backend="triton")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_grads", [(), (0, 3), (0, 1, 2, 3)])
def test_a_network(check_adam, low, low_grads):
    check_adam(fused, [(8, 4, 4, 4), (8,), (1,), (70, 67)], low, low_grads, copied=(0, 3), averaged=(0, 1, 2))


def test_one_tensor(check_adam):
    check_adam(fused, [(1,)])
    check_adam(fused, [(4096,)], low_grads=(0,), copied=(0,), averaged=(0,))


def test_beta_zero(check_adam):
    check_adam(fused, [(33,)], betas=(0.0, 0.9))


def test_more_tensors_than_a_launch_takes(check_adam, monkeypatch):
    monkeypatch.setattr(adam_step_triton, "TENSORS", 4)
    count = 11
    check_adam(fused, [(i % 5 + 1,) for i in range(count)], copied=range(0, count, 2), averaged=range(0, count, 3))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_drawn_sizes(check_adam, sizes):
    check_adam(fused, [(size,) for size in sizes], copied=range(0, len(sizes), 2), averaged=range(0, len(sizes), 3))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_against_torch(device, as_tensor):
    """Scalars as numbers and as tensors; one update from zero state, where the bias correction is largest."""
    param = torch.randn(1000, device=device)
    twin = param.clone().requires_grad_()
    twin.grad = torch.randn(1000, device=device)
    state = [torch.zeros_like(param) for _ in range(2)]
    lr = torch.tensor(2e-4, device=device, dtype=torch.float64) if as_tensor else 2e-4
    fused([param], [twin.grad], [state[0]], [state[1]], torch.zeros((), device=device), lr=lr, betas=(0.5, 0.999))
    torch.optim.Adam([twin], lr=2e-4, betas=(0.5, 0.999)).step()
    torch.testing.assert_close(param, twin.detach(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_large_eps_and_an_average_far_away(device, as_tensor):
    """The first update by its formula: both corrected moments are then the gradient and its square."""
    param, grad = torch.randn(100, device=device), torch.randn(100, device=device)
    expected = param - 0.1 * grad / (grad.abs() + 0.25)
    ema, state = torch.full_like(param, 100), [[torch.zeros_like(param)] for _ in range(2)]
    lr, decay = (torch.tensor(value, device=device) if as_tensor else value for value in (0.1, 0.9))
    fused([param], [grad], *state, torch.zeros((), device=device), lr=lr, eps=0.25, emas=[ema], ema_decay=decay)
    torch.testing.assert_close(param, expected)
    torch.testing.assert_close(ema, 90 + 0.1 * expected)


def test_misaligned_views(device):
    """Tensors that start in the middle of a buffer, where 16-byte loads would fault or read a neighbour."""
    flat = [torch.randn(101, device=device).abs() for _ in range(4)]
    views = [buffer[1:65] for buffer in flat]
    expected = [v.clone() for v in views]
    outside = [torch.cat([b[:1], b[65:]]) for b in flat]
    for tensors, backend in ((views, "triton"), (expected, "reference")):
        p, g, m, v = tensors
        adam_step([p], [g], [m], [v], torch.ones((), device=device), lr=1e-3, backend=backend)
    for a, e in zip(views, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert all(torch.equal(torch.cat([b[:1], b[65:]]), o) for b, o in zip(flat, outside, strict=True))


def test_what_it_refuses(device):
    p = [torch.zeros(4, dtype=torch.float64, device=device)]
    step = torch.zeros((), device=device)
    with pytest.raises(ValueError, match="float32 parameters"):
        fused(p, p, p, p, step, lr=1e-3)
    q = [torch.zeros(4, device=device) for _ in range(2)]
    with pytest.raises(ValueError, match="not both"):
        fused(q, [q[0].bfloat16(), q[1].half()], q, q, step, lr=1e-3)
    with pytest.raises(ValueError, match="not both"):
        fused(q, [each.bfloat16() for each in q], q, q, step, lr=1e-3, copies=[each.half() for each in q])


def test_replay(device):
    """Traced once and replayed with new values in the same tensors, as a CUDA graph would."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def state():
        torch.manual_seed(5)
        return [torch.randn(40, device=device) for _ in range(2)] + [torch.zeros(40, device=device) for _ in range(2)]

    def step_of(tensors, step, lr):
        def run():
            p, g, m, v = tensors
            fused([p], [g], [m], [v], step, lr=lr)
            return p

        return run

    results = []
    for replayed in (False, True):
        tensors, step, lr = state(), torch.zeros((), device=device), torch.tensor(0.1, device=device)
        run = step_of(tensors, step, lr)
        if replayed:
            before = [t.clone() for t in tensors]
            run = make_fx(run, tracing_mode="real")()
            for t, b in zip(tensors, before, strict=True):
                t.copy_(b)
            step.zero_()
        for turn in range(3):
            lr.fill_(0.1 / (turn + 1)), tensors[1].copy_(torch.arange(40.0) * (turn - 1))
            with torch.no_grad():
                run()
        assert step.item() == 3
        results.append([t.clone() for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's log(0)
def test_without_momentum_the_first_moment_is_the_gradient(device):
    """Not what is left of it beside a much larger one before."""
    state = [[torch.zeros(3, device=device)] for _ in range(2)]
    params, step = [torch.zeros(3, device=device)], torch.zeros((), device=device)
    for gradient in (1000.0, 1e-3):
        fused(params, [torch.full((3,), gradient, device=device)], *state, step, lr=0.1, betas=(0.0, 0.9))
    torch.testing.assert_close(state[0][0], torch.full((3,), 1e-3, device=device), rtol=1e-6, atol=0)


def test_opcheck(device):
    """Among others that it changes what it says it changes, and nothing else."""
    lists = [[torch.rand(5, device=device), torch.rand(4, 3, device=device)] for _ in range(4)]
    copies, emas = [torch.zeros(5, dtype=torch.bfloat16, device=device)], [torch.zeros(4, 3, device=device)]
    step, lr = torch.zeros((), device=device), torch.tensor(0.1, device=device)
    torch.library.opcheck(
        adam_step_triton.update, (*lists, step, lr, 0.0, 0.5, 0.999, 1e-8, copies, [0], emas, [1], None, 0.9)
    )


def test_compile(device):
    params = [torch.randn(5, device=device, requires_grad=True), torch.randn(4, 3, device=device, requires_grad=True)]
    grads = [torch.randn_like(p) for p in params]
    twins = [p.detach().clone().requires_grad_() for p in params]
    lr = torch.tensor(0.1, device=device)

    def step_of(params):
        state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        step, copies = torch.zeros((), device=device), [None, torch.empty_like(params[1], dtype=torch.bfloat16)]
        return lambda: fused(params, grads, *state, step, lr=lr, copies=copies)

    eager, compiled = step_of(params), step_of(twins)
    compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for _ in range(2):
        eager(), compiled()
    assert all(torch.equal(p, t) for p, t in zip(params, twins, strict=True))


@pytest.mark.gpu
def test_cuda_graph(device):
    if device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    shapes = [(512, 256, 4, 4), (512,), (3, 64, 4, 4)]
    params = [torch.randn(s, device=device) for s in shapes]
    grads = [torch.randn_like(p) for p in params]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    step, lr = torch.zeros((), device=device), torch.tensor(1e-3, device=device)
    twins = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(twins, lr=1e-3)
    fused(params, grads, *state, step, lr=lr)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(params, grads, *state, step, lr=lr)
    for turn in range(5):
        if turn:
            graph.replay()
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        optimizer.step()
        for grad in grads:
            grad.normal_()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin.detach(), rtol=1e-5, atol=1e-6)


def test_each_launch_knows_the_types_of_its_own_gradients(check_adam, monkeypatch):
    monkeypatch.setattr(adam_step_triton, "TENSORS", 2)
    check_adam(fused, [(5,), (4, 3), (7,), (6,), (3,)], low_grads=(0, 3, 4))


def test_one_float64_among_the_parameters_is_refused(device):
    dtypes = (torch.float32, torch.float64)
    p, g, m, v = ([torch.zeros(4, dtype=dtype, device=device) for dtype in dtypes] for _ in range(4))
    with pytest.raises(ValueError, match="float32 parameters"):
        fused(p, g, m, v, torch.zeros((), device=device), lr=1e-3)
