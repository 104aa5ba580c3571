"""What looks at a run while it trains: figures, pictures and alarms, in the first of its processes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from fastdcgan.alarms import Alarm, Alarms
from fastdcgan.config import TrainConfig
from fastdcgan.console import say
from fastdcgan.monitor import GRID, Monitor
from fastdcgan.quality import Quality
from fastdcgan.step import TrainStep


class Watch:
    """Looks at every log point and every sample grid, writes them down, and says when something goes wrong.

    Args:
        run: the run folder.
        config: of the run.
        real: some of its images, uint8 (N, H, W, C), on the CPU.
        device: where the networks are.
        done: the step the run begins with.
        images: seen before that, over all processes.
    """

    def __init__(
        self, run: Path, config: TrainConfig, real: Tensor, device: torch.device, done: int, images: int
    ) -> None:
        self.run, self.config = run, config
        random = torch.Generator().manual_seed(config.seed)
        self.latents = torch.randn(GRID, config.latent_dim, generator=random).to(device)
        self.quality = Quality(real, config.latent_dim, config.seed, device)
        self._begin(done)
        self.monitor.picture("real", real[:GRID].permute(0, 3, 1, 2) / 127.5 - 1, done)
        self.status, self.last = "", (time.monotonic(), images)

    def _begin(self, done: int) -> None:
        self.monitor = Monitor(self.run, done)
        self.alarms = Alarms(self.config.loss, self.config.label_smoothing, done)

    def begin_again(self, done: int) -> None:
        """The run has gone back to step `done`."""
        self.monitor.close()
        self._begin(done)

    def compiled(self, images: int) -> None:
        """The first step is over, which took as long as compiling: rates are counted from here."""
        self.status, self.last = "first step done", (time.monotonic(), images)

    def log(self, done: int, images: int, epoch: float, metrics: dict[str, float], memory: int) -> list[Alarm]:
        """Write a log point down; the alarms that it raises.

        Args:
            metrics: as `Alarms.look_at_metrics` takes them.
            memory: peak, in bytes.
        """
        now = time.monotonic()
        rate = (images - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = now, images
        figures = {"step": done, "images": images, "epoch": epoch, **metrics}
        self.monitor.log(figures | {"images_per_second": rate, "peak_memory_bytes": memory})
        self.status = (
            f"{rate:,.0f} images/s  loss D {metrics['loss_d']:.2f} G {metrics['loss_g']:.2f}"
            f"  D(x) {metrics['d_real']:.2f}  D(G(z)) {metrics['d_fake']:.2f}"
        )
        return self.tell(self.alarms.look_at_metrics(done, metrics))

    @torch.no_grad()
    def sample(self, done: int, step: TrainStep) -> list[Alarm]:
        """Draw the grids, of the moving average and of the latest weights; the alarms that they raise."""
        pictures = step.average(self.latents)
        self.monitor.picture(f"step-{done:06d}", pictures, done)
        self.monitor.picture(f"raw-step-{done:06d}", step.latest_pictures(self.latents), done)
        varied = self.quality.diversity(pictures)
        self.monitor.log({"step": done, **varied}, "quality")
        return self.tell(self.alarms.look_at_samples(done, **varied))

    def tell(self, raised: list[Alarm]) -> list[Alarm]:
        """Write alarms down and say them; returns them."""
        for alarm in raised:
            self.monitor.alarm(alarm)
            say(f"warning: step {alarm.step:,}: {alarm.message}")
        return raised

    def close(self) -> None:
        self.monitor.close()
