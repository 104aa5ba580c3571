"""Line charts as SVG text."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 24  # margins
POINTS = 600  # in a line; of more, the means of neighbours


@dataclass(frozen=True)
class Series:
    """One line: its label, a CSS colour, steps and as many values, all finite."""

    label: str
    colour: str
    steps: list[float]
    values: list[float]


def chart(title: str, series: list[Series], marks: list[float], legend: bool = True) -> str:
    """A figure with the lines over the step and a dashed upright at each mark; what shoots far beyond is cut off."""
    series = [_thinned(line) for line in series if line.steps]
    keys = "".join(
        f'<span class="key" style="background:{line.colour}"></span>{html.escape(line.label)}'
        for line in series
        if legend and line.label
    )
    caption = f"<figcaption><h2>{html.escape(title)}</h2>{keys}</figcaption>"
    if not series:
        return f'<figure>{caption}<p class="faint">nothing recorded</p></figure>'
    last = max(line.steps[-1] for line in series)
    low, high = _range([value for line in series for value in line.values])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = []
    for value in ticks(low, high, 5):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.6g}</text>')
    for step in ticks(0, last, 6):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,.6g}</text>')
    for step in marks:
        parts.append(f'<line class="alarm" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in series:
        points = " ".join(
            f"{x(s):.1f},{min(max(y(v), TOP), HEIGHT - BOTTOM):.1f}"
            for s, v in zip(line.steps, line.values, strict=True)
        )
        if len(line.steps) == 1:  # of which no line can be seen
            points += f" {points}"
        style = f'fill="none" stroke="{line.colour}" stroke-width="1.5" stroke-linecap="round"'
        parts.append(f'<polyline {style} points="{points}"/>')
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * times for times in (1, 2, 5, 10, 20) if power * times >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: list[float]) -> tuple[float, float]:
    """What the axis shows: 0 and nearly all values, with some room."""
    ordered = sorted(values)
    low = min(0.0, ordered[int(0.01 * (len(ordered) - 1))])
    high = max(0.0, ordered[math.ceil(0.99 * (len(ordered) - 1))])
    room = 0.05 * (high - low) or 1.0
    return low - (room if low < 0 else 0.0), high + room


def _thinned(line: Series) -> Series:
    size = math.ceil(len(line.steps) / POINTS)
    parts = [(line.steps[i : i + size], line.values[i : i + size]) for i in range(0, len(line.steps), size)]
    return Series(
        line.label, line.colour, [s[-1] for s, _ in parts], [sum(values) / len(values) for _, values in parts]
    )
