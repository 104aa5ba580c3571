"""The reference of adam_step against torch.optim.Adam, under replay, and its errors."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastdcgan.kernels import adam_step


def state(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 4, 3, 3), (8,), (5, 7)]
    params = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    params[0] = params[0].contiguous(memory_format=torch.channels_last)
    grads = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return params, grads, [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_numbers_of_torch(dtype):
    params, _, exp_avgs, exp_avg_sqs = state(dtype)
    twins = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Adam(twins, lr=1e-3, betas=(0.5, 0.999), fused=True)
    step, lr = torch.zeros(()), torch.zeros((), dtype=dtype)
    copies = [torch.empty_like(params[0], dtype=torch.bfloat16), None, None]
    emas = [None, params[1].clone(), params[2].clone()]
    true_ema = params[2].clone()
    for turn in range(5):
        _, grads, *_ = state(dtype, turn)  # contiguous, where the first parameter is channels_last
        optimizer.param_groups[0]["lr"] = 1e-3 / (turn + 1)
        lr.fill_(1e-3 / (turn + 1))
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = torch.empty_like(twin).copy_(grad)
        optimizer.step()
        adam_step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            step,
            lr=lr,
            betas=(0.5, 0.999),
            copies=copies,
            emas=emas,
            ema_decay=torch.tensor(0.9),
        )
        true_ema = 0.9 * true_ema + 0.1 * twins[2].detach()
    assert step == 5
    for p, twin, m, v in zip(params, twins, exp_avgs, exp_avg_sqs, strict=True):
        torch.testing.assert_close(p, twin.detach())
        torch.testing.assert_close(m, optimizer.state[twin]["exp_avg"])
        torch.testing.assert_close(v, optimizer.state[twin]["exp_avg_sq"])
    assert torch.equal(copies[0], params[0].bfloat16())
    torch.testing.assert_close(emas[2], true_ema, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_large_eps_a_copy_and_an_average_far_away(compiled):
    """The first update by its formula: both corrected moments are then the gradient and its square."""
    param, grad = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, -0.25, 0.0])
    expected = param - 0.1 * grad / (grad.abs() + 0.25)
    copy, ema, moments = torch.empty(3, dtype=torch.bfloat16), torch.full((3,), 100.0), torch.zeros(2, 3)

    def run():
        step, decay = torch.zeros(()), torch.tensor(0.9)
        adam_step(
            [param],
            [grad],
            [moments[0]],
            [moments[1]],
            step,
            lr=torch.tensor(0.1),
            eps=0.25,
            copies=[copy],
            emas=[ema],
            ema_decay=decay,
        )

    (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)()
    torch.testing.assert_close(param, expected)
    assert torch.equal(copy, param.bfloat16())
    torch.testing.assert_close(ema, 90 + 0.1 * expected)


def test_low_precision_gradients():
    params, grads, *moments = state(torch.float32)
    twins, _, *twin_moments = state(torch.float32)
    grads = [grad.bfloat16() for grad in grads]
    adam_step(params, grads, *moments, torch.zeros(()), lr=1e-3)
    adam_step(twins, [grad.float() for grad in grads], *twin_moments, torch.zeros(()), lr=1e-3)
    assert all(torch.equal(p, t) for p, t in zip(params, twins, strict=True))


def step_of(params, grads, moments, step, lr, emas, decay):
    def run():
        adam_step(params, grads, *moments, step, lr=lr, emas=emas, ema_decay=decay)
        return params[0]

    return run


def test_replay():
    """Traced once and replayed on refilled tensors, as a captured graph would: nothing is baked in."""
    results = []
    for replayed in (False, True):
        params, grads, *moments = state(torch.float32)
        step, lr, decay = torch.zeros(()), torch.tensor(1e-3), torch.tensor(0.5)
        emas = [p.clone() for p in params]

        run = step_of(params, grads, moments, step, lr, emas, decay)
        if replayed:
            before = [t.clone() for t in (*params, *moments[0], *moments[1], *emas, step)]
            run = make_fx(run, tracing_mode="real")()
            for t, b in zip((*params, *moments[0], *moments[1], *emas, step), before, strict=True):
                t.copy_(b)
        for turn in range(3):
            lr.fill_(1e-3 / (turn + 1)), decay.fill_(0.3 * turn)
            for grad, fresh in zip(grads, state(torch.float32, turn)[1], strict=True):
                grad.copy_(fresh)
            with torch.no_grad():
                run()
        results.append([*params, *moments[0], *moments[1], *emas, step])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile():
    """One graph, whose formulas are the fused operator's."""
    results = []
    for compiled in (False, True):
        params, grads, *moments = state(torch.float64)
        step, lr, decay, emas = torch.zeros(()), torch.tensor(1e-2), torch.tensor(0.5), [p.clone() for p in params]
        run = step_of(params, grads, moments, step, lr, emas, decay)
        run = torch.compile(run, fullgraph=True) if compiled else run
        for turn in range(3):
            lr.fill_(1e-2 / (turn + 1))
            run()
        results.append([*params, *moments[0], *moments[1], *emas, step])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_graph_that_holds_a_parameter_knows_that_it_has_moved():
    params, grads, *moments = state(torch.float32)
    parameter = params[1].requires_grad_()
    y = parameter.square().sum()  # whose gradient is twice what the parameter was
    adam_step([p.detach() for p in params], grads, *moments, torch.zeros(()), lr=1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_errors():
    params, grads, exp_avgs, exp_avg_sqs = state(torch.float32)
    moments, step = (exp_avgs, exp_avg_sqs), torch.zeros(())
    contiguous = [exp_avgs[0].contiguous(), *exp_avgs[1:]]
    for message, wrong in {
        "no parameters": lambda: adam_step([], [], [], [], step, lr=1e-3),
        "3 parameters, but 2 grads": lambda: adam_step(params, grads[:2], *moments, step, lr=1e-3),
        "exp_avg of parameter 0": lambda: adam_step(params, grads, contiguous, exp_avg_sqs, step, lr=1e-3),
        "gradient of parameter 0": lambda: adam_step(params, grads[::-1], *moments, step, lr=1e-3),
        "copy of parameter 1": lambda: adam_step(
            params, grads, *moments, step, lr=1e-3, copies=[None, torch.zeros(8), None]
        ),
        "emas need ema_decay": lambda: adam_step(
            params, grads, *moments, step, lr=1e-3, emas=[p.clone() for p in params]
        ),
        "betas are": lambda: adam_step(params, grads, *moments, step, lr=1e-3, betas=(0.5, 1.0)),
        "betas are at least 0": lambda: adam_step(params, grads, *moments, step, lr=1e-3, betas=(-0.1, 0.9)),
        "ema_decay is in": lambda: adam_step(
            params, grads, *moments, step, lr=1e-3, emas=[p.clone() for p in params], ema_decay=2.0
        ),
        "parameter 1 has no gradient": lambda: adam_step(params, [grads[0], None, grads[2]], *moments, step, lr=1e-3),
        "step is": lambda: adam_step(params, grads, *moments, torch.zeros(1), lr=1e-3),
        "lr is": lambda: adam_step(params, grads, *moments, step, lr=torch.ones(1)),
        "not dense": lambda: adam_step([params[2][:, ::2]], *([grads[2][:, ::2]] for _ in range(3)), step, lr=1e-3),
        "parameters are float32": lambda: adam_step(
            *([p.bfloat16() for p in ps] for ps in (params, grads, *moments)), step, lr=1e-3
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()
    assert step == 0


def test_what_is_usual_is_what_torch_takes_for_usual():
    params, _, *moments = state(torch.float32)
    twins, step = [p.clone().requires_grad_() for p in params], torch.zeros(())
    optimizer = torch.optim.Adam(twins, lr=0.1)
    for turn in range(3):
        grads = [1e-8 * grad for grad in state(torch.float32, turn)[1]]  # beside which eps counts
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = torch.empty_like(twin).copy_(grad)
        optimizer.step()
        adam_step(params, grads, *moments, step, lr=0.1)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin.detach())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_an_average_may_follow_at_once_or_never(decay):
    params, grads, *moments = state(torch.float32)
    emas = [torch.full_like(p, 7) for p in params]
    adam_step(params, grads, *moments, torch.zeros(()), lr=1e-3, emas=emas, ema_decay=decay)
    for p, ema in zip(params, emas, strict=True):
        torch.testing.assert_close(ema, torch.full_like(p, 7) if decay else p)


def test_what_has_another_layout_or_lies_elsewhere_is_refused():
    """A kernel would take its address for a place on the GPU, and its elements for those of the parameter."""
    params, grads, *moments = state(torch.float32)
    step, far = torch.zeros(()), torch.device("meta")
    flat, away = (
        [[make(t) for t in ts] for ts in (grads, *moments, params)]
        for make in (torch.Tensor.contiguous, lambda t: t.to(far))
    )
    half = [torch.empty_like(p, dtype=torch.bfloat16, device=far) for p in params]
    for message, wrong in {
        "exp_avg_sq of parameter 0": lambda: adam_step(params, grads, moments[0], flat[2], step, lr=1e-3),
        "ema of parameter 0": lambda: adam_step(params, grads, *moments, step, lr=1e-3, emas=flat[3], ema_decay=0.9),
        "gradient of parameter 0": lambda: adam_step(params, away[0], *moments, step, lr=1e-3),
        "exp_avg of parameter 0": lambda: adam_step(params, grads, away[1], moments[1], step, lr=1e-3),
        "copy of parameter 0": lambda: adam_step(params, grads, *moments, step, lr=1e-3, copies=half),
        "step is": lambda: adam_step(params, grads, *moments, step.to(far), lr=1e-3),
        "lr is": lambda: adam_step(params, grads, *moments, step, lr=torch.ones((), device=far)),
        "ema_decay is a": lambda: adam_step(
            params, grads, *moments, step, lr=1e-3, emas=params, ema_decay=torch.ones((), dtype=torch.float16)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()
