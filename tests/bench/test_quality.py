"""Whether fewer operations cost quality: the criterion, and (slow) the reference and the fast step held against it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from fastdcgan.bench import quality as quality_module
from fastdcgan.bench.contenders import Entry, Shape
from fastdcgan.bench.quality import MARGIN, Trainer, parity, quality


def curves(*differences: float) -> list[dict[str, object]]:
    """Two curves a seed that end 10 and 10 * (1 + difference) away from the data."""
    found: list[dict[str, object]] = []
    for seed, difference in enumerate(differences):
        for contender, end in (("example", 10.0), ("fast-eager", 10.0 * (1 + difference))):
            found.append({"contender": contender, "seed": seed, "distances": [99.0, end, end, end]})
    return found


def test_small_differences_that_point_both_ways_are_parity() -> None:
    found = parity(curves(0.05, -0.04, 0.02, -0.03))
    assert found["holds"] and found["difference"] == pytest.approx(0.0) and found["seeds"] == 4
    low, high = found["interval"]
    # By hand: deviation 0.0424, over the root of 4, times Student's 3.182.
    assert (low, high) == (pytest.approx(-0.0675, abs=1e-3), pytest.approx(0.0675, abs=1e-3))


@pytest.mark.parametrize("differences", [(0.3, 0.31, 0.29, 0.3), (0.5, -0.5, 0.4, -0.4), (0.01,)])
def test_worse_or_uncertain_or_a_single_seed_is_not(differences: tuple[float, ...]) -> None:
    assert not parity(curves(*differences))["holds"]


@pytest.mark.slow
def test_the_fast_step_reaches_the_references_quality(tmp_path: Path) -> None:
    """Real digits, 16x16, four seeds; what has trained is told from what has not by the same measure."""
    torch.set_num_threads(2)
    options = {"data": "digits", "device": torch.device("cpu"), "seeds": 4, "command": "", "json": tmp_path / "q.json"}
    shape = Shape(64, (16, 16), 1, latent_dim=32, width=16)
    content = quality(shape=shape, steps=300, **options)  # type: ignore[arg-type]
    assert content["parity"]["holds"], content["parity"]
    beginnings = [curve["distances"][0] for curve in content["curves"]]
    ends = [curve["distances"][-1] for curve in content["curves"]]
    assert min(beginnings) > (1 + MARGIN) * max(ends), "training must show in the measure"


def trainer(monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[Trainer, list[int]]:
    """One whose steps take so long, by a clock that only they move; and its steps, which are numbered."""
    found, taken = Trainer.__new__(Trainer), []
    monkeypatch.setattr(quality_module.time, "perf_counter", lambda: seconds * len(taken))
    found.step, found.begun, found.device = (lambda: taken.append(len(taken))), False, torch.device("cpu")
    return found, taken


def test_the_first_steps_are_stood_for_by_those_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found, taken = trainer(monkeypatch, 0.5)
    assert [found.train(5), len(taken), found.train(5), len(taken)] == [2.5, 5, 2.5, 10]


def test_samples_are_measured_against_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = trainer(monkeypatch, 1.0)
    found.shape = Shape(4, (16, 16), 1, latent_dim=8, width=4)
    found.generator, _ = found.shape.reference_networks()
    found.real, found.least = torch.zeros(6, 1, 16, 16), 0.5
    modes: list[bool] = []
    found.generator.register_forward_hook(lambda network, *_: modes.append(network.training))
    compared: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(
        quality_module, "mean_sliced_wasserstein", lambda *given: compared.append(given) or float(len(compared))
    )
    assert found.distances() == (1.0, 0.5)
    ((real, drawn),) = compared
    assert real is found.real and drawn.shape == (6, 1, 16, 16)
    assert modes == [False] and found.generator.training


def test_a_curve_is_over_the_seconds_since_its_beginning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, str, int]] = []

    class Fake:
        def __init__(self, entry: Entry, data: str, shape: Shape) -> None:
            made.append((entry.name, entry.precision, shape.seed))
            self.seconds, self.distance = 2.0 if entry.name == "example" else 0.5, shape.seed + 8.0

        def ask(self, method: str, *arguments: int) -> object:
            if method == "train":
                assert arguments == (4,)
                return self.seconds
            self.distance *= 0.9
            return self.distance, 0.25

    monkeypatch.setattr(quality_module, "Contestant", lambda _, *given: contextlib.nullcontext(Fake(*given[:3])))
    options = {"data": "digits", "device": torch.device("cpu"), "command": "", "json": tmp_path / "q.json"}
    content = quality(shape=Shape(4), steps=40, seeds=2, **options)  # type: ignore[arg-type]
    assert made == [
        ("example", "fp32", 0),
        ("fast-eager", "fp32", 0),
        ("example", "fp32", 1),
        ("fast-eager", "fp32", 1),
    ]
    slow, fast = content["curves"][2:]
    assert (slow["seed"], slow["least"], slow["steps"]) == (1, 0.25, list(range(0, 41, 4)))
    assert slow["seconds"] == [2.0 * i for i in range(11)] and fast["seconds"] == [0.5 * i for i in range(11)]
    assert slow["distances"] == pytest.approx([9.0 * 0.9**i for i in range(1, 12)])
    assert content["parity"]["seeds"] == 2
