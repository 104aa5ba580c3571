"""What a run writes for people to look at: metrics, quality and alarms as JSON lines, TensorBoard, sample grids."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdcgan.alarms import Alarm
from fastdcgan.files import replace_file
from fastdcgan.grid import save_grid

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Writes the metrics and pictures of one run; a resumed run first drops what came after its checkpoint."""

    def __init__(self, run: Path, resumed_step: int, known_alarms: str) -> None:
        """
        Args:
            known_alarms: alarms.jsonl as it was when this process began: a step that comes again raises the same alarm.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.known_alarms = run, known_alarms
        self.before = {name: _drop_after(run / f"{name}.jsonl", resumed_step) for name in ("metrics", "quality")}
        self.board = SummaryWriter(str(run), purge_step=resumed_step + 1)

    def log(self, values: dict[str, float], name: str = "metrics") -> None:
        """A line of <name>.jsonl, metrics or quality, and a point of each curve; `values` has at least `step`."""
        self._write(name, values)
        with self._board() as board:
            for key, value in values.items():
                if key != "step":
                    board.add_scalar(key, value, int(values["step"]))

    def alarm(self, alarm: Alarm) -> None:
        """A line of alarms.jsonl, unless the run that is resumed had written it before it was killed."""
        if _line(dataclasses.asdict(alarm)) not in self.known_alarms:
            self._write("alarms", dataclasses.asdict(alarm))

    def _write(self, name: str, values: dict[str, Any]) -> None:
        line = _line(values).encode()
        with open(self.run / f"{name}.jsonl", "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "no room for a whole line", file.name)
            except OSError:
                file.truncate(before)
                raise

    def picture(self, name: str, images: Tensor, step: int) -> None:
        """Save images (N, C, H, W) in -1..1 as the grid samples/<name>.png, and show it in TensorBoard."""
        grid = save_grid(images, self.run / "samples" / f"{name}.png")
        with self._board() as board:
            board.add_image(name.split("-")[0], grid, step)

    @contextmanager
    def _board(self) -> Iterator[SummaryWriter]:
        """TensorBoard's writer. What its thread could not write ended it, and is raised at every use: another follows,
        that what comes after a disk was full is shown again."""
        try:
            yield self.board
        except OSError:
            self.board = type(self.board)(str(self.run))
            raise

    def close(self) -> None:
        self.board.close()


def _line(values: dict[str, Any]) -> str:
    """As JSON, which has no number for what is not finite."""
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(known) + "\n"


def _drop_after(path: Path, step: int) -> list[dict[str, float]]:
    """Keep the whole lines up to `step`: the run will write the later ones again.

    Returns:
        what they say; what was not finite is NaN again. Nothing where there is no file.
    """
    found = path.read_text(errors="replace") if path.exists() else ""
    kept, lines = [], []
    for line in found.splitlines():
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int) or values["step"] > step:
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # torn by a kill
        kept.append({key: math.nan if value is None else value for key, value in values.items()})
        lines.append(line + "\n")
    if "".join(lines) != found:
        replace_file(path, "".join(lines).encode())
    return kept
