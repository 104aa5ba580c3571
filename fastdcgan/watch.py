"""What looks at a run while it trains: figures, pictures and alarms, in the first of its processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from fastdcgan.alarms import ROLLBACK, Alarm, Alarms
from fastdcgan.config import TrainConfig
from fastdcgan.console import say
from fastdcgan.contention import Contention
from fastdcgan.grid import GRID
from fastdcgan.monitor import Monitor
from fastdcgan.pixels import to_floats
from fastdcgan.quality import Quality
from fastdcgan.step import TrainStep

# What reading a line of figures raises that somebody has edited.
CHANGED = (KeyError, TypeError, ValueError, OverflowError)


class Watch:
    """Looks at every log point and every sample grid, writes them down, and says when something goes wrong.

    Args:
        run: the run folder.
        config: of the run.
        real: some of its images, uint8 (N, H, W, C), on the CPU.
        device: where the networks are.
        done: the step the run begins with.
    """

    def __init__(self, run: Path, config: TrainConfig, real: Tensor, device: torch.device, done: int) -> None:
        self.run, self.config = run, config
        random = torch.Generator().manual_seed(config.seed)
        self.latents = torch.randn(GRID, config.latent_dim, generator=random).to(device)
        self.quality = Quality(real, config.latent_dim, config.seed, device)
        if not self.quality.varied:
            say("note: most images of the set are the same, so the samples are not watched for collapse or noise")
        self.contention = Contention() if device.type == "cpu" else None
        alarms = run / "alarms.jsonl"
        self.known_alarms = alarms.read_text(errors="replace") if alarms.exists() else ""
        self.status, self.silent = "", False
        self.monitor = Monitor(run, done, self.known_alarms)
        try:
            self._begin(done)
            if done == 0:
                with self.writing():
                    self.monitor.picture("real", to_floats(real[:GRID].permute(0, 3, 1, 2)), done)
        except BaseException:  # such as Ctrl-C: nobody has this object yet to close it
            self.close()
            raise

    def _begin(self, done: int) -> None:
        history = self.monitor.before
        start = 0 if history["metrics"] else done
        self.alarms = Alarms(self.config.loss, self.config.label_smoothing, start, self.quality.varied)
        # What the run has written up to here: a sign that lasts is not new because the run was stopped meanwhile.
        for figures in history["metrics"]:
            with suppress(*CHANGED):
                self.alarms.look_at_metrics(int(figures["step"]), figures)
        for figures in history["quality"]:
            with suppress(*CHANGED):
                self.alarms.look_at_samples(int(figures["step"]), figures["diversity"], figures["nearest"])
        if self.config.on_divergence != "warn":
            self.alarms.raised.clear()  # the run was to end or to go back at what lasts, and still is

    def begin_again(self, done: int, alarm: Alarm, count: int) -> None:
        """The run has gone back to step `done` for an alarm, for the `count`th time."""
        message = f"back to step {done:,} with other noise (rollback {count})"
        say(message)
        self.close()
        with self.writing():
            self.monitor.alarm(Alarm(ROLLBACK, alarm.step, done, message))
        with self.writing():
            self.monitor = Monitor(self.run, done, self.known_alarms)
            self._begin(done)

    def log(self, figures: dict[str, float]) -> list[Alarm]:
        """Write a log point down; the alarms that it raises.

        Args:
            figures: step, what `Alarms.look_at_metrics` takes, and what else is to be written; images_per_second where
                it is known.
        """
        with self.writing():
            self.monitor.log(figures)
        if self.contention and self.contention.found():
            say(f"note: {Contention.ADVICE}")
        rate = f"{figures['images_per_second']:,.0f} images/s  " if "images_per_second" in figures else ""
        self.status = (
            f"{rate}loss D {figures['loss_d']:.2f} G {figures['loss_g']:.2f}"
            f"  D(x) {figures['d_real']:.2f}  D(G(z)) {figures['d_fake']:.2f}"
        )
        return self.report(self.alarms.look_at_metrics(int(figures["step"]), figures))

    @torch.no_grad()
    def sample(self, done: int, step: TrainStep, last: bool = False) -> list[Alarm]:
        """Draw the grids, of the moving average and of the latest weights; the alarms that they raise.

        Args:
            last: these are the last ones of the run.
        """
        pictures = step.average(self.latents)
        varied = self.quality.diversity(pictures)
        with self.writing():
            self.monitor.picture(f"step-{done:06d}", pictures, done)
        with self.writing():
            self.monitor.picture(f"raw-step-{done:06d}", step.latest_pictures(self.latents), done)
            self.silent = False  # nothing is larger than a picture: there is room again
        with self.writing():
            self.monitor.log({"step": done, **varied}, "quality")
        return self.report(self.alarms.look_at_samples(done, **varied, last=last))

    def report(self, raised: list[Alarm]) -> list[Alarm]:
        """Write alarms down and say them; returns them."""
        for alarm in raised:
            with self.writing():
                self.monitor.alarm(alarm)
            say(f"warning: step {alarm.step:,}: {alarm.message}")
        return raised

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A disk that is full, or gone, costs figures and pictures, not the run; said once each time."""
        try:
            yield
        except OSError as error:
            if not self.silent:
                say(f"warning: {self.run}: figures and pictures cannot be written ({error}); training goes on without")
            self.silent = True

    def close(self) -> None:
        with self.writing():
            self.monitor.close()
