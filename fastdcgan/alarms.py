"""What goes wrong in a GAN, seen in its metrics and samples: when it starts, what it means, which flag helps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

LOST = "not finite"  # the one that nothing comes back from
ROLLBACK = "rollback"  # none of KINDS: what was done about one
OF_SAMPLES = ("collapse", "noise")
KINDS = (LOST, "large losses", "steep gradients", "discriminator wins", *OF_SAMPLES)
PATIENCE, LASTING = 5, 400  # log points in a row, and steps, before the discriminator has won: early on it often leads
# D's loss above its lowest possible, which wgan-gp's has not. With bce where D(x) is 0.98 and D(G(z)) 0.02; lsgan's at
# 0.95 and 0.05: runs that recovered have been seen at 0.016.
WON = {"bce": 0.04, "hinge": 0.04, "lsgan": 0.0025, "wgan-gp": -math.inf}
LARGE = 20.0  # a loss no run that learns has: with bce a probability of 2e-9
STEEP = 100.0  # times the median gradient norm of the last HISTORY log points
HISTORY = 50
SETTLED = 200  # steps before samples are judged: an untrained generator draws the same grey for every latent
SAME = 0.05  # share of the data's diversity that is as good as none
FALLEN = 0.35  # share of the run's own best diversity
# Or alike from the beginning: after so many steps below that share of the data's diversity, and over so many grids not
# up by a tenth. Runs that are slow to begin, with batches of two say, rise by more.
SLOW, FAINT, FLAT = 1000, 0.3, 5
WIDE, WIDE_NEAREST = 1.2, 1.4  # shares of the data's that only noise has: good runs rise to 1.05 and 1.23


@dataclass(frozen=True)
class Alarm:
    """Something that has gone wrong.

    Attributes:
        kind: one of KINDS, or ROLLBACK.
        step: when it was noticed.
        sound: the last step at which there was no sign of it.
        message: one line: what is seen, what it means, what to try.
    """

    kind: str
    step: int
    sound: int
    message: str


class Alarms:
    """Looks at each log point and each sample grid, and reports what starts to go wrong, once until it is over.

    Args:
        loss: a key of `OBJECTIVES`.
        label_smoothing: raises the discriminator's lowest possible loss.
        step: where the run starts.
        of_samples: whether sample grids are judged: of a set that is mostly one picture they say nothing.
    """

    def __init__(self, loss: str, label_smoothing: float, step: int, of_samples: bool = True) -> None:
        self.start, self.of_samples = step, of_samples
        self.loss = loss
        self.floor = _entropy(label_smoothing) if loss == "bce" else 0.0
        self.norms: dict[str, deque[float]] = {
            "grad_norm_d": deque(maxlen=HISTORY),
            "grad_norm_g": deque(maxlen=HISTORY),
        }
        self.signs: dict[str, int] = {}  # kind -> points in a row that showed it
        self.raised: set[str] = set()  # kinds that are not over yet
        watched = [kind for kind in KINDS if of_samples or kind not in OF_SAMPLES]
        self.sound = dict.fromkeys(watched, step)  # kind -> the last step that did not
        self.best_diversity = 0.0
        self.latest: deque[float] = deque(maxlen=FLAT + 1)  # diversities

    def look_at_metrics(self, step: int, metrics: dict[str, float]) -> list[Alarm]:
        """The alarms that a log point starts; `metrics` has losses, d_real, d_fake, grad_norm_d and grad_norm_g."""
        lost = not all(math.isfinite(metrics[name]) for name in self.norms)  # which are Adam's, and stay so
        raised = self._judge(
            LOST,
            step,
            lost,
            1,
            "gradients are no longer finite: nothing after this can be used. Try --on-divergence rollback, a smaller"
            " --lr, or --precision fp32",
        )
        if lost:
            return raised
        loss_d, loss_g = metrics["loss_d"], metrics["loss_g"]
        raised += self._judge(
            "large losses",
            step,
            self.loss != "wgan-gp" and not (abs(loss_d) <= LARGE and abs(loss_g) <= LARGE),
            3,
            f"losses of {loss_d:,.0f} (D) and {loss_g:,.0f} (G) are beyond what learning looks like: updates are too"
            " large. Try a smaller --lr (0.0002 is usual)",
        )
        steepest, times = "", 0.0
        for name, norms in self.norms.items():
            usual = median(norms) if len(norms) >= 10 else math.inf
            if usual > 0 and metrics[name] / usual > times:
                steepest, times = name, metrics[name] / usual
        network = "discriminator" if steepest == "grad_norm_d" else "generator"
        raised += self._judge(
            "steep gradients",
            step,
            times > STEEP,
            3,
            f"the {network}'s gradients are {times:,.0f} times as large as usual: the run is about to diverge. Try a"
            " smaller --lr, or --r1 5",
        )
        if times <= STEEP:
            for name, norms in self.norms.items():
                norms.append(metrics[name])
        raised += self._judge(
            "discriminator wins",
            step,
            metrics["loss_d"] - self.floor < WON[self.loss],
            PATIENCE,
            f"the discriminator tells all images apart (D(x) {metrics['d_real']:.2f}, D(G(z)) {metrics['d_fake']:.2f},"
            f" loss {metrics['loss_d']:.3f}): the generator learns little from it. Try --instance-noise 0.1, --r1 5, a"
            " smaller --lr or --lr-d, or with few images --diffaugment",
            LASTING,
        )
        return raised

    def look_at_samples(self, step: int, diversity: float, nearest: float, last: bool = False) -> list[Alarm]:
        """The alarms that a sample grid starts; both figures as `Quality.diversity` gives them.

        Args:
            last: of the run: no other one will come to confirm it.
        """
        if not self.of_samples:
            return []
        self.best_diversity = max(self.best_diversity, min(diversity, 1.0))
        self.latest.append(diversity)
        settled, late = step - self.start >= SETTLED, step - self.start >= SLOW
        alike = min(diversity, nearest) < SAME
        fallen = diversity < FALLEN * self.best_diversity
        flat = len(self.latest) > FLAT and diversity < 1.1 * self.latest[0]
        stuck = late and diversity < FAINT and flat
        if alike:
            what = "are nearly the same picture: the generator has collapsed"
        elif fallen:
            what = "have become alike: the generator collapses"
        else:
            what = "have stayed alike: the generator learns little"
        figures = f"two are {diversity:.0%} as far apart as real images, at best {self.best_diversity:.0%}"
        raised = self._judge(
            "collapse",
            step,
            settled and (alike or fallen or stuck),
            1 if last and alike else 2,
            f"the samples {what} ({figures}; each and its nearest {nearest:.0%}). Try --diffaugment, --r1 5,"
            " --spectral-norm, or a smaller --lr-d or --lr",
        )
        return raised + self._judge(
            "noise",
            step,
            late and diversity > WIDE and nearest > WIDE_NEAREST,
            3,
            "the samples lie further apart than the data does: noise, or more contrast than it has (two are"
            f" {diversity:.0%} as far apart as real images; each and its nearest {nearest:.0%}). Try a smaller --lr or"
            " --beta1 (0.0002 and 0.5 are usual)",
        )

    def no_sign_before(self) -> int:
        """How far back a later alarm may go: the last step without any sign that is there now, or that has not been
        looked for since."""
        return min(self.sound.values())

    def _judge(self, kind: str, step: int, seen: bool, patience: int, message: str, lasting: int = 0) -> list[Alarm]:
        """The alarm, once, when the sign has been there `patience` times in a row and for `lasting` steps."""
        if not seen:
            self.signs[kind], self.sound[kind] = 0, step
            self.raised.discard(kind)
            return []
        self.signs[kind] = self.signs.get(kind, 0) + 1
        sound = self.sound[kind]
        if kind in self.raised or self.signs[kind] < patience or step - sound < lasting:
            return []
        self.raised.add(kind)
        return [Alarm(kind, step, sound, message)]


def _entropy(share: float) -> float:
    """Entropy of a coin that falls on one side with probability `share`, in nats."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
