"""Alarms: what is planted is found, a healthy run is left alone, and the run does what --on-divergence says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastdcgan import checkpoint, models
from fastdcgan.alarms import LASTING, PATIENCE, SETTLED, SLOW, Alarm, Alarms
from fastdcgan.config import TrainConfig
from fastdcgan.errors import UserError
from fastdcgan.monitor import Monitor
from fastdcgan.pixels import to_floats
from fastdcgan.quality import CHUNK, Quality
from fastdcgan.report import report
from fastdcgan.runs import load_run
from fastdcgan.step import TrainStep
from fastdcgan.trainer import ROLLBACKS, train
from fastdcgan.watch import Watch

HEALTHY = {"loss_d": 1.0, "loss_g": 0.9, "d_real": 0.7, "d_fake": 0.4, "grad_norm_d": 2.0, "grad_norm_g": 1.0}
SMALL = TrainConfig(
    image_size="16",
    gen_width=4,
    latent_dim=8,
    batch_size=16,
    steps=12,
    log_every=1,
    sample_every=6,
    checkpoint_every=3,
    device="cpu",
)


def small(run: Path, **changes: object) -> TrainConfig:
    return dataclasses.replace(SMALL, run_dir=run, **changes)  # type: ignore[arg-type]


def lines(run: Path, name: str) -> list[dict[str, float]]:
    path = run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def watch(points: list[dict[str, float]], **options: object) -> list[tuple[str, int, int]]:
    alarms = Alarms(**{"loss": "bce", "label_smoothing": 0.0, "step": 0, **options})  # type: ignore[arg-type]
    found = []
    for number, point in enumerate(points):
        for alarm in alarms.look_at_metrics(20 * (number + 1), {**HEALTHY, **point}):
            assert "--" in alarm.message and "\n" not in alarm.message
            found.append((alarm.kind, alarm.step, alarm.sound))
    return found


class Fixed(torch.nn.Module):
    """A generator of pictures (N, C, H, W), whatever the latents are."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures = pictures

    def forward(self, latents: Tensor) -> Tensor:
        return self.pictures[: len(latents)]


@pytest.fixture
def nearest_at_6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run's checkpoints at steps 3, 6, 9 and 12 the second is the nearest to the data."""
    distances = iter([0.5, 0.2, 0.3, 0.25])
    monkeypatch.setattr(Quality, "distance", lambda self, generator: next(distances))


WON = {"loss_d": 0.01, "d_real": 0.995, "d_fake": 0.004}


def test_what_is_not_finite_is_said_at_once() -> None:
    assert watch([{}, {"grad_norm_g": math.nan}, {"grad_norm_g": math.nan}, {}]) == [("not finite", 40, 20)]
    assert watch([{"grad_norm_d": math.inf}]) == [("not finite", 20, 0)]


def test_a_discriminator_that_wins_is_said_once_until_it_is_over() -> None:
    long = LASTING // 20
    assert watch([WON] * (long - 1) + [{}] + [WON] * (long - 1)) == []
    assert watch([{}, *[WON] * 2 * long]) == [("discriminator wins", 20 + LASTING, 20)]
    assert len(watch([*[WON] * 2 * long, {}, *[WON] * 2 * long])) == 2
    assert watch([WON] * 2 * long, loss="wgan-gp") == []  # whose loss has no lower end
    ahead = {"loss_d": 0.016, "d_real": 0.93, "d_fake": 0.13}  # of a run that came through
    assert watch([ahead] * 2 * long, loss="lsgan") == []
    assert len(watch([ahead | {"loss_d": 0.002}] * 2 * long, loss="lsgan")) == 1


def test_a_discriminator_that_leads_for_a_few_seldom_log_points_has_not_won() -> None:
    alarms = Alarms("bce", 0.0, 0)
    found = [alarms.look_at_metrics(step, {**HEALTHY, **WON}) for step in range(1000, 9000, 1000)]
    assert [len(each) for each in found] == [0] * (PATIENCE - 1) + [1] + [0] * (8 - PATIENCE)


def test_label_smoothing_raises_the_loss_of_a_perfect_discriminator() -> None:
    perfect = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    smoothed = {"loss_d": perfect + 0.01, "d_real": 0.9, "d_fake": 0.0}
    assert len(watch([smoothed] * 30, label_smoothing=0.1)) == 1
    assert watch([smoothed] * 30) == []


def test_large_losses() -> None:
    assert watch([{"loss_g": 19.0}] * 9 + [{"loss_g": 60.0}] * 2) == []
    for loss in (60.0, math.inf, math.nan):
        assert watch([{}, *[{"loss_d": loss}] * 9]) == [("large losses", 80, 20)]
    assert watch([{"loss_d": -60.0}] * 9, loss="wgan-gp") == []


def test_steep_gradients() -> None:
    assert watch([{}] * 10 + [{"grad_norm_g": 99.0}] * 9) == []
    steep = [{"grad_norm_g": 150.0}] * 30
    assert watch([{}] * 10 + steep) == [("steep gradients", 260, 200)]
    assert len(watch([{}] * 10 + steep + [{}] + steep)) == 2  # which do not become the usual ones


@pytest.mark.parametrize("kinds", [1, 4, 63, 64])
def test_samples_alike(kinds: int) -> None:
    real = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8)
    quality = Quality(real, 8, 0, torch.device("cpu"))
    pictures = (torch.rand(64, 3, 16, 16) * 2 - 1)[torch.arange(64) % kinds]
    varied = quality.diversity(pictures)
    if kinds == 1:
        assert varied == {"diversity": 0.0, "nearest": 0.0}
    if kinds >= 63:  # uniform noise has the diversity of uniform noise
        assert varied["diversity"] == pytest.approx(1, abs=0.05) and varied["nearest"] == pytest.approx(1, abs=0.1)
    alarms = Alarms("bce", 0.0, 0)
    said = [a.kind for step in range(0, 1000, 100) for a in alarms.look_at_samples(step, **varied)]
    assert said == (["collapse"] if kinds < 63 else [])


def test_a_fall_of_diversity_is_a_collapse_and_the_grey_start_is_none() -> None:
    alarms = Alarms("bce", 0.0, 0)
    assert [alarms.look_at_samples(step, 0.01, 0.01) for step in range(0, SETTLED, 50)] == [[]] * 4
    assert alarms.look_at_samples(400, 0.9, 0.9) == [] == alarms.look_at_samples(500, 0.3, 0.3)
    (alarm,) = alarms.look_at_samples(600, 0.3, 0.3)
    assert alarm.kind == "collapse" and alarm.sound == 400


@pytest.mark.parametrize(
    ("growth", "said"),
    [(1.0, ["have stayed alike: the generator learns little"]), (1.03, [])],  # a tenth more over five grids
)
def test_samples_that_stay_alike(growth: float, said: list[str]) -> None:
    """Though they never were any better: grey with faint strokes, of a generator whose discriminator is too strong."""
    alarms = Alarms("bce", 0.0, 0)
    found = [
        (alarm.step, alarm.message)
        for step in range(100, 2000, 100)
        for alarm in alarms.look_at_samples(step, 0.16 * growth ** (step / 100), 0.5)
    ]
    assert [message[len("the samples ") :][: len(part)] for part, (_, message) in zip(said, found, strict=True)] == said
    assert [step for step, _ in found] == [SLOW + 100] * len(said)


def test_a_set_with_few_pictures_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of it a perfect generator's samples are alike."""
    noise, cpu = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8), torch.device("cpu")
    two, faint = noise[:2].repeat(32, 1, 1, 1), noise[:1] // 2 + noise % 2
    assert Quality(noise, 8, 0, cpu).varied and Quality(noise[:2], 8, 0, cpu).varied
    for images in (two, noise[:1].repeat(64, 1, 1, 1), torch.full_like(noise, 255), faint):
        quality = Quality(images, 8, 0, cpu)
        assert not quality.varied
        assert max(quality.diversity(to_floats(noise.permute(0, 3, 1, 2))).values()) < 1000, (
            "a figure that can be drawn"
        )
    (tmp_path / "samples").mkdir()
    watch = Watch(tmp_path, small(tmp_path), two, cpu, 0)
    step = SimpleNamespace(average=lambda z: torch.zeros(len(z), 1, 8, 8))
    step.latest_pictures = step.average
    assert watch.sample(900, step) == watch.sample(1000, step) == []  # type: ignore[arg-type]
    watch.close()
    assert "most images of the set are the same" in capsys.readouterr().err


@pytest.mark.parametrize(("diversity", "said"), [(0.01, ["collapse"]), (0.3, [])])  # the latter may be an accident
def test_the_last_grid_of_a_run_need_not_be_confirmed(diversity: float, said: list[str]) -> None:
    alarms = Alarms("bce", 0.0, 0)
    assert alarms.look_at_samples(400, 0.9, 0.9) == []
    assert [alarm.kind for alarm in alarms.look_at_samples(800, diversity, diversity, last=True)] == said


def test_diversity_against_the_formula() -> None:
    pictures = torch.randn(9, 1, 4, 4)
    quality = Quality(torch.randint(0, 256, (9, 4, 4, 1), dtype=torch.uint8), 2, 0, torch.device("cpu"))
    found = quality.diversity(pictures)
    for name, figure in (("diversity", lambda row: sum(row) / 8), ("nearest", min)):
        means = []
        for images in (pictures, quality.real):
            rows = [[(a - b).pow(2).sum().sqrt().item() for b in images if b is not a] for a in images]
            rows = [sorted(row)[-8:] for row in rows]  # without the picture itself
            means.append(sum(figure(row) for row in rows) / 9)
        assert found[name] == pytest.approx(means[0] / means[1], rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing(tmp_path: Path, seed: int) -> None:
    run = train(small(tmp_path / "run", steps=300, log_every=10, sample_every=50, checkpoint_every=300, seed=seed))
    assert lines(run, "alarms") == []
    assert [line["step"] for line in lines(run, "quality")] == list(range(50, 301, 50))


def test_a_planted_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = models.Generator.forward
    monkeypatch.setattr(models.Generator, "forward", lambda self, x: whole(self, x)[:1].expand(len(x), -1, -1, -1))
    run = train(small(tmp_path / "run", steps=300, log_every=10, sample_every=50, checkpoint_every=100))
    assert "collapse" in {line["kind"] for line in lines(run, "alarms")}


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    run = train(small(tmp_path / "warn", steps=60, lr=1.0, seed=seed))
    found = lines(run, "alarms")
    assert found and "Try" in found[0]["message"]  # type: ignore[operator]
    assert found[0]["message"] in capsys.readouterr().err  # type: ignore[operator]
    with pytest.raises(UserError, match=r"the run ended at step .*alarms\.jsonl says what to try"):
        train(small(tmp_path / "stop", steps=60, lr=1.0, seed=seed, on_divergence="stop"))


class Poison:
    """TrainStep.update that now and then leaves a weight that is not a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: set[int]) -> None:
        self.calls, self.when, self.whole = 0, when, TrainStep.update
        self.noise: list[Tensor] = []
        poison = self

        def update(step: TrainStep) -> None:
            poison.whole(step)
            poison.calls += 1
            poison.noise.append(step.noise.clone())
            if poison.calls in poison.when:
                with torch.no_grad():
                    next(iter(step.adam_g.masters.values()))[0] = torch.nan

        monkeypatch.setattr(TrainStep, "update", update)


def test_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 1..8, poisoned after 8; step 9 shows it: back to step 6 and on to 12, with other noise."""
    poison = Poison(monkeypatch, {8})
    run = train(small(tmp_path / "run", on_divergence="rollback"))
    assert poison.calls == 9 + 6
    said = capsys.readouterr().err
    assert "no longer finite" in said and "no checkpoint at step 9" in said and "back to step 6" in said
    assert [line["step"] for line in lines(run, "metrics")] == list(range(1, 13))
    alarms = [(a["kind"], a["step"], a["sound"]) for a in lines(run, "alarms")]
    assert alarms == [("not finite", 9, 8), ("rollback", 9, 6)]
    page = report(run, None).read_text()
    assert "1 alarm, 1 rollback</p>" in page and "back to step 6 with other noise (rollback 1)" in page
    assert not torch.equal(poison.noise[6], poison.noise[9])  # step 7, the first and the second time
    assert all(v.isfinite().all() for v in load_run(run).generator.state_dict().values())
    assert [f.name for f in checkpoint.complete(run)] == ["step-000006", "step-000009", "step-000012"]
    Poison(
        monkeypatch, {2}
    )  # and once more, after the run was stopped and resumed: not with the noise of the first time
    train(small(run, on_divergence="rollback", resume=True, steps=16))
    said = capsys.readouterr().err
    assert "back to step 12 with other noise (rollback 2)" in said


def test_weights_that_are_lost_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisoned after step 8: step 9 shows it, and nothing but a warning was asked for; resumed, it goes on from 6.
    A loss that was infinite before that makes no difference."""
    with monkeypatch.context() as patched:
        poison, whole, calls = Poison(patched, {8}), TrainStep.read_metrics, itertools.count(1)
        patched.setattr(
            TrainStep, "read_metrics", lambda step: whole(step) | ({"loss_g": math.inf} if next(calls) == 7 else {})
        )
        with pytest.raises(UserError, match="ended at step 9: not finite; the last sound step is 8"):
            train(small(tmp_path / "run"))
    assert poison.calls == 9
    assert [folder.name for folder in checkpoint.complete(tmp_path / "run")] == ["step-000003", "step-000006"]
    train(small(tmp_path / "run", resume=True))
    assert [line["step"] for line in lines(tmp_path / "run", "metrics")] == list(range(1, 13))


def test_one_loss_that_is_no_number_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = TrainStep.read_metrics, itertools.count(1)
    monkeypatch.setattr(
        TrainStep, "read_metrics", lambda step: whole(step) | ({"loss_g": math.inf} if next(calls) == 8 else {})
    )
    run = train(small(tmp_path / "run"))
    assert lines(run, "alarms") == [] and [line["step"] for line in lines(run, "metrics")] == list(range(1, 13))


def test_rollback_ends_the_run_when_it_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        poison = Poison(patched, set(range(4, 10_000)))
        with pytest.raises(UserError, match="not finite"):
            train(small(tmp_path / "run", on_divergence="rollback", checkpoint_every=1))
    draws = [tuple(noise.flatten().tolist()) for noise in poison.noise]
    assert len(set(draws)) == len(draws), "other noise each time"
    kinds = [alarm["kind"] for alarm in lines(tmp_path / "run", "alarms")]
    assert kinds == ["not finite", "rollback"] * ROLLBACKS + ["not finite"]
    Poison(monkeypatch, {1})
    with pytest.raises(UserError, match="no checkpoint from before it to go back to; the last sound step is 1"):
        train(small(tmp_path / "early", on_divergence="rollback"))


def test_a_run_goes_back_though_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    Poison(monkeypatch, {8})
    monkeypatch.setattr("fastdcgan.grid.replace_file", full)
    run = train(small(tmp_path / "run", on_divergence="rollback"))
    assert checkpoint.complete(run)[-1].name == "step-000012"
    said = capsys.readouterr().err
    assert "back to step 6" in said and said.count("figures and pictures cannot be written") == 1


def test_a_resumed_run_does_not_write_an_alarm_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisoned after step 5, both times, which ends it at step 6: the last sound checkpoint is that of step 3."""
    Poison(monkeypatch, {5, 6 + 2})
    run = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(UserError, match="ended at step 6"):
            train(small(run, steps=8, checkpoint_every=3, resume=resume))
        assert [(alarm["kind"], alarm["step"]) for alarm in lines(run, "alarms")] == [("not finite", 6)]


@pytest.mark.usefixtures("nearest_at_6")
def test_the_best_checkpoint_is_the_last_resort(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(small(tmp_path / "run", keep=2))
    for folder in checkpoint.complete(run):
        (folder / "state.json").write_text("{}")
    assert load_run(run).step == 6
    (run / "checkpoints" / "best" / "state.json").unlink()
    with pytest.raises(UserError, match="not one checkpoint"):
        load_run(run)


@pytest.mark.usefixtures("nearest_at_6")
def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    run = train(small(tmp_path / "run", keep=1))
    assert [f.name for f in checkpoint.complete(run)] == ["step-000012"]
    best = load_run(run / "checkpoints" / "best")
    assert best.step == 6 and best.config is not None and load_run(run).step == 12
    state = json.loads((run / "checkpoints" / "best" / "state.json").read_text())
    assert state["distance_to_data"] == 0.2
    (run / "checkpoints" / "best" / "state.safetensors").write_bytes(b"damaged")
    assert checkpoint.keep_best(run, checkpoint.complete(run)[-1], 0.9)  # better than none
    assert load_run(run / "checkpoints" / "best").step == 12


@pytest.mark.usefixtures("nearest_at_6")
def test_a_best_checkpoint_of_another_measure_is_replaced_and_one_without_a_distance_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(small(tmp_path / "run", keep=1))
    newest, best = checkpoint.complete(run)[-1], run / "checkpoints" / "best"
    assert not checkpoint.keep_best(run, newest, math.nan) and load_run(best).step == 6
    kept = checkpoint.load(best)
    earlier = {name: value for name, value in kept.progress.items() if name != "distance_to_data"}
    checkpoint.save(run, 6, dataclasses.replace(kept, progress=earlier | {"distance": 0.01}), 9)
    shutil.rmtree(best)
    (run / "checkpoints" / "step-000006").rename(best)
    assert checkpoint.keep_best(run, newest, 0.9) and load_run(best).step == 12
    assert "was measured otherwise" in capsys.readouterr().err


def test_a_nearer_set_has_the_smaller_distance() -> None:
    real = torch.randint(0, 100, (32, 16, 16, 1), dtype=torch.uint8)
    quality = Quality(real, 8, 0, torch.device("cpu"))

    near, far = Fixed(quality.real), Fixed(quality.real.sign() * torch.linspace(-1, 1, 16))
    assert quality.distance(near) < 0.5 * quality.distance(far)


def test_washed_out_pictures_are_not_the_nearest() -> None:
    """Normalised each set over itself, a tenth of the contrast and another brightness would be no distance at all."""
    real = torch.randint(0, 256, (64, 16, 16, 1), dtype=torch.uint8)
    quality = Quality(real, 8, 0, torch.device("cpu"))

    itself = quality.distance(Fixed(quality.real))
    assert quality.distance(Fixed(0.1 * quality.real)) > 5 * itself
    assert quality.distance(Fixed(quality.real - 1)) > 5 * itself


def test_a_run_goes_back_to_before_the_first_of_all_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two alarms at once: large losses since step 7 and no numbers since step 9."""
    alarms = [Alarm("not finite", 9, 8, "-"), Alarm("large losses", 9, 6, "-")]
    monkeypatch.setattr(Alarms, "look_at_metrics", lambda _, step, __: alarms if step == 9 and not gone_back else [])
    gone_back: list[int] = []
    monkeypatch.setattr(Watch, "begin_again", lambda _, done, *__: gone_back.append(done))
    train(small(tmp_path / "run", on_divergence="rollback", checkpoint_every=2))
    assert gone_back == [6]


def test_what_a_run_may_have_to_go_back_to_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large losses since step 5, of which the alarm is raised at step 12."""
    alarms = [Alarm("large losses", 12, 4, "-")]
    monkeypatch.setattr(Alarms, "look_at_metrics", lambda _, step, __: alarms if step == 12 and not gone_back else [])
    monkeypatch.setattr(Alarms, "no_sign_before", lambda _: 4)
    gone_back: list[int] = []
    monkeypatch.setattr(Watch, "begin_again", lambda _, done, *__: gone_back.append(done))
    run = train(small(tmp_path / "run", on_divergence="rollback", checkpoint_every=1, keep=1))
    assert gone_back == [4]
    assert [f.name for f in checkpoint.complete(run)] == ["step-000004", "step-000012"]
    run = train(small(tmp_path / "warn", checkpoint_every=1, keep=1))
    assert [f.name for f in checkpoint.complete(run)] == ["step-000012"]


def test_how_far_back_a_later_alarm_may_go() -> None:
    alarms = Alarms("bce", 0.0, 0)
    assert alarms.no_sign_before() == 0
    for step in range(100, 500, 100):
        alarms.look_at_metrics(step, HEALTHY)
        alarms.look_at_samples(step, 0.9, 0.9)
    assert alarms.no_sign_before() == 400
    alarms.look_at_metrics(500, HEALTHY | {"loss_d": 0.001})
    alarms.look_at_samples(500, 0.9, 0.9)
    alarms.look_at_metrics(600, HEALTHY | {"loss_d": 0.001})
    assert alarms.no_sign_before() == 400, "the discriminator's victory would date from there"
    alarms.look_at_metrics(700, HEALTHY)
    assert alarms.no_sign_before() == 500, "samples were not looked at since"


@pytest.mark.usefixtures("nearest_at_6")
def test_the_best_checkpoint_can_be_old_enough_to_go_back_to(tmp_path: Path) -> None:
    run = train(small(tmp_path / "run", keep=2))  # 9, 12 and the best, 6
    assert checkpoint.load_sound(run, 5) is None and len(checkpoint.complete(run)) == 2
    found = checkpoint.load_sound(run, 8)
    assert found is not None and found.progress["step"] == 6 and not checkpoint.complete(run)


def test_a_grid_more_varied_than_the_data_sets_no_higher_bar() -> None:
    """As early noise is."""
    alarms = Alarms("bce", 0.0, 0)
    grids = [(300, 9.0), (400, 0.5), (500, 0.5), (600, 0.5)]
    assert [alarms.look_at_samples(step, varied, varied) for step, varied in grids] == [[]] * 4


def test_the_grey_start_of_a_resumed_run_without_figures_is_no_collapse() -> None:
    alarms = Alarms("bce", 0.0, 1000)
    assert [alarms.look_at_samples(step, 0.01, 0.01) for step in (1050, 1100, 1150)] == [[]] * 3
    assert [len(alarms.look_at_samples(step, 0.01, 0.01)) for step in (1200, 1250)] == [0, 1]


def test_samples_that_stay_noise() -> None:
    """Further apart than the data, each from its nearest too, in three grids in a row, after the noisy beginning."""

    def said(grids: list[tuple[float, float]], first: int = SLOW) -> list[tuple[str, int, int]]:
        alarms = Alarms("bce", 0.0, 0)
        found = [alarms.look_at_samples(first + 100 * i, *grid) for i, grid in enumerate(grids)]
        return [(alarm.kind, alarm.step, alarm.sound) for each in found for alarm in each]

    noisy, good = (1.25, 1.7), (1.05, 1.23)
    assert said([good, noisy, noisy, noisy, noisy]) == [("noise", SLOW + 300, SLOW)]
    assert said([noisy, noisy, good, noisy, noisy]) == []
    assert said([(1.25, 1.3), (1.15, 1.7)] * 3) == []
    assert said([noisy] * 5, first=SLOW - 500) == []


def test_a_set_whose_samples_are_not_judged_holds_no_older_checkpoint_back(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    real = torch.randint(0, 256, (1, 16, 16, 1), dtype=torch.uint8).repeat(64, 1, 1, 1)
    watch = Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 0)
    for step in (100, 200):
        watch.log({**HEALTHY, "step": step})
        assert watch.alarms.look_at_samples(step, 0.0, 0.0) == []
    watch.close()
    assert watch.alarms.no_sign_before() == 200


def test_the_watch_knows_of_label_smoothing(tmp_path: Path) -> None:
    """With it a perfect discriminator still has a loss."""
    (tmp_path / "samples").mkdir()
    real = torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8)
    watch = Watch(tmp_path, small(tmp_path, label_smoothing=0.1), real, torch.device("cpu"), 0)
    perfect = {**HEALTHY, "loss_d": 0.33, "d_real": 0.9, "d_fake": 0.0, "images_per_second": 1.0}
    said = [alarm.kind for step in range(100, 900, 100) for alarm in watch.log({**perfect, "step": step})]
    watch.close()
    assert said == ["discriminator wins"]


def test_figures_are_of_as_many_pictures_as_there_are_real_ones_each_once() -> None:
    real = torch.randint(0, 256, (10, 16, 16, 1), dtype=torch.uint8)
    cpu = torch.device("cpu")
    alike = to_floats(real.permute(0, 3, 1, 2)).repeat(7, 1, 1, 1)  # a perfect generator's, of a set so small
    for given in (real, real.repeat(5, 1, 1, 1)):
        found = Quality(given, 8, 0, cpu).diversity(alike)
        assert found == pytest.approx({"diversity": 1.0, "nearest": 1.0})
    of_one = Quality(real[:1].repeat(4, 1, 1, 1), 8, 0, cpu).diversity(alike[:1].repeat(4, 1, 1, 1))
    assert of_one == {"diversity": 0.0, "nearest": 0.0}


def test_whose_gradients_are_steep_is_said() -> None:
    for norm, network in (("grad_norm_d", "discriminator"), ("grad_norm_g", "generator")):
        alarms = Alarms("bce", 0.0, 0)
        points = [HEALTHY] * 10 + [{**HEALTHY, norm: 300.0}] * 3
        said = [a.message for i, point in enumerate(points) for a in alarms.look_at_metrics(20 * (i + 1), point)]
        assert len(said) == 1 and f"the {network}'s gradients" in said[0]


def test_the_first_few_gradients_are_no_measure_of_the_rest() -> None:
    assert watch([{"grad_norm_g": 0.001}] * 4 + [{}] * 20) == []


def test_a_discriminator_that_only_leads_under_hinge_has_not_won() -> None:
    assert watch([{"loss_d": 0.2}] * 40, loss="hinge") == []
    assert len(watch([{"loss_d": 0.03}] * 40, loss="hinge")) == 1


def test_a_run_knows_its_last_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdcgan.alarms.SETTLED", 0)
    monkeypatch.setattr(Quality, "diversity", lambda *_: {"diversity": 0.01, "nearest": 0.01})
    run = train(small(tmp_path / "run", steps=6))
    assert [(alarm["kind"], alarm["step"]) for alarm in lines(run, "alarms")] == [("collapse", 6)]


def test_a_resumed_run_may_go_back_three_times_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it did before it was stopped. A poisoned step is one behind that of its alarm."""
    Poison(monkeypatch, {5})
    run = train(small(tmp_path / "run", steps=6, on_divergence="rollback"))
    assert checkpoint.load(checkpoint.complete(run)[-1]).progress["rollbacks"] == 1
    poison = Poison(monkeypatch, set(range(1, 10_000)))
    with pytest.raises(UserError, match=f"not finite after {ROLLBACKS} rollbacks; "):
        train(small(run, on_divergence="rollback", resume=True))
    assert poison.calls == 2 * (ROLLBACKS + 1)


def test_the_latents_of_the_distance_are_the_seeds_and_no_others() -> None:
    """Or a resumed run would compare its distances with those of other pictures."""
    real = torch.randint(0, 256, (70, 8, 8, 1), dtype=torch.uint8)
    first, again, other = (Quality(real, 8, seed, torch.device("cpu")).latents for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (70, 8)


def test_a_discriminator_that_leads_under_bce_has_not_won() -> None:
    """D(x) 0.97 and D(G(z)) 0.03: a loss of 0.061, beyond 0.98 and 0.02."""
    assert watch([{"loss_d": 0.061, "d_real": 0.97, "d_fake": 0.03}] * 40) == []


def test_gradients_that_are_all_zero_are_nothing_to_divide_by() -> None:
    assert watch([{"grad_norm_g": 0.0}] * 20) == []


def test_the_distance_is_of_as_many_pictures_as_there_are_real_ones() -> None:
    """Drawn a few at a time."""
    quality = Quality(torch.randint(0, 256, (150, 16, 16, 1), dtype=torch.uint8), 8, 0, torch.device("cpu"))
    drawn: list[Tensor] = []

    class Noted(torch.nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            drawn.append(latents)
            return torch.zeros(len(latents), 1, 16, 16)

    quality.distance(Noted())
    assert torch.equal(torch.cat(drawn), quality.latents) and len(quality.latents) == 150
    assert max(map(len, drawn)) == CHUNK


def test_gradients_that_grow_slowly_are_measured_by_the_latest() -> None:
    assert watch([{"grad_norm_g": norm} for norm in (0.02, 1.2, 72.0) for _ in range(60)]) == []


def test_a_resumed_run_is_sound_up_to_where_it_starts() -> None:
    assert Alarms("bce", 0.0, 1000).no_sign_before() == 1000


def test_where_the_thresholds_are() -> None:
    assert len(watch([{"loss_g": 21.0}] * 3)) == 1 and watch([{"loss_g": 19.0}] * 3) == []
    for nearest, said in ((0.04, 1), (0.06, 0)):
        alarms = Alarms("bce", 0.0, 0)
        assert sum(len(alarms.look_at_samples(step, 0.9, nearest)) for step in (400, 500)) == said


def test_a_set_of_which_half_is_one_picture_is_not_judged() -> None:
    noise, cpu = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8), torch.device("cpu")
    images = torch.cat((noise[:1].repeat(33, 1, 1, 1), noise[:31]))  # of which 31 differ
    assert not Quality(images, 8, 0, cpu).varied
    assert not Quality(noise[:32].repeat(2, 1, 1, 1), 8, 0, cpu).varied
    assert Quality(noise[:33].repeat(2, 1, 1, 1)[:64], 8, 0, cpu).varied


def test_three_pictures_of_which_two_are_one() -> None:
    one, other = torch.randint(0, 256, (2, 16, 16, 1), dtype=torch.uint8)
    quality = Quality(torch.stack((one, one, other)), 8, 0, torch.device("cpu"))
    apart = to_floats(torch.stack((one, other)).permute(0, 3, 1, 2))
    assert quality.varied and quality.diversity(apart) == pytest.approx({"diversity": 1.0, "nearest": 1.0})


def test_the_distance_keeps_nothing_for_a_gradient() -> None:
    """Which would be a chunk's activations, for every chunk."""
    quality = Quality(torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8), 8, 0, torch.device("cpu"))
    modes: list[bool] = []

    class Noted(torch.nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return torch.zeros(len(latents), 1, 16, 16)

    quality.distance(Noted())
    assert modes == [False]


@pytest.mark.parametrize(("diversity", "said"), [(0.28, 1), (0.32, 0), (0.8, 0)])
def test_samples_that_stay_as_they_are_need_only_be_varied_enough(diversity: float, said: int) -> None:
    alarms = Alarms("bce", 0.0, 0)
    assert sum(len(alarms.look_at_samples(step, diversity, 0.5)) for step in range(100, 3000, 100)) == said


@pytest.mark.parametrize(("now", "said"), [(0.33, 1), (0.37, 0)])
def test_how_far_diversity_has_to_fall(now: float, said: int) -> None:
    alarms = Alarms("bce", 0.0, 0)
    grids = [(300, 1.0), (400, now), (500, now), (600, now)]
    assert sum(len(alarms.look_at_samples(step, varied, varied)) for step, varied in grids) == said


def test_a_slow_start_is_counted_from_where_a_run_without_figures_goes_on() -> None:
    alarms = Alarms("bce", 0.0, 5000)
    found = [step for step in range(5050, 6300, 50) if alarms.look_at_samples(step, 0.16, 0.5)]
    assert found == [5000 + SLOW + 50]


@pytest.mark.parametrize(
    ("grids", "what"),
    [
        ([(0.9, 0.9), (0.01, 0.01), (0.01, 0.01)], "are nearly the same picture"),
        ([(0.9, 0.9), (0.9, 0.01), (0.9, 0.01)], "are nearly the same picture"),
        ([(0.9, 0.9), (0.2, 0.5), (0.2, 0.5)], "have become alike"),
    ],
)
def test_which_collapse_it_is_is_said(grids: list[tuple[float, float]], what: str) -> None:
    alarms = Alarms("bce", 0.0, 0)
    (alarm,) = [a for i, each in enumerate(grids) for a in alarms.look_at_samples(300 + 100 * i, *each)]
    assert f"the samples {what}" in alarm.message


def test_gradients_that_are_no_numbers_are_not_what_is_usual() -> None:
    alarms = Alarms("bce", 0.0, 0)
    for step in range(20, 420, 20):
        alarms.look_at_metrics(step, HEALTHY | {"grad_norm_g": math.nan if step > 200 else 1.0})
    assert alarms.sound["large losses"] == 200 and math.isfinite(sum(alarms.norms["grad_norm_g"]))


def test_smoothed_labels_of_lsgan_leave_its_lowest_loss_at_zero() -> None:
    assert watch([{"loss_d": 0.2}] * 40, loss="lsgan", label_smoothing=0.1) == []


@pytest.mark.parametrize(("growth", "said"), [(1.017, 1), (1.021, 0)])
def test_growth_is_measured_over_five_grids(growth: float, said: int) -> None:
    """A tenth is 1.0192 a grid."""
    alarms = Alarms("bce", 0.0, 0)
    assert sum(len(alarms.look_at_samples(100 * i, 0.16 * growth**i, 0.5)) for i in range(1, 20)) == said


def test_what_was_lost_and_comes_back_is_no_growth() -> None:
    alarms = Alarms("bce", 0.0, 0)
    grids = [0.16] * 9 + [0.12, 0.14]
    assert [a.step for i, each in enumerate(grids, 1) for a in alarms.look_at_samples(100 * i, each, 0.5)] == [1100]


@pytest.mark.parametrize("call", ["alarm", "close", "__init__"])
def test_a_full_disk_keeps_no_run_from_going_back(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "samples").mkdir()
    real = torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8)
    watch = Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 0)
    monkeypatch.setattr(Monitor, call, full)
    (alarm,) = watch.log(HEALTHY | {"step": 20, "grad_norm_d": math.nan})
    watch.begin_again(0, alarm, 1)
    watch.close()
    said = capsys.readouterr().err
    assert f"step 20: {alarm.message}" in said and "back to step 0" in said
    assert said.count("figures and pictures cannot be written") == 1


def test_alarms_that_somebody_has_changed_do_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "alarms.jsonl").write_bytes(b"\xff\n")
    real = torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8)
    Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 0).close()


def test_the_figures_are_of_the_averages_pictures(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    real = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8)
    watch = Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 0)
    step = SimpleNamespace(average=lambda z: torch.rand(len(z), 1, 8, 8))
    step.latest_pictures = lambda z: torch.zeros(len(z), 1, 8, 8)
    watch.sample(6, step)  # type: ignore[arg-type]
    watch.close()
    assert lines(tmp_path, "quality")[0]["diversity"] > 0


@pytest.mark.parametrize(("figures", "start"), [(True, 0), (False, 300)])
def test_where_the_watch_of_a_resumed_run_begins(figures: bool, start: int, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    if figures:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(HEALTHY | {"step": 280}) + "\n")
    real = torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8)
    watch = Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 300)
    watch.close()
    assert watch.alarms.start == start
