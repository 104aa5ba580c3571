"""Line charts as SVG text."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 28, 8, 24  # margins
POINTS = 600  # in a line; of more, the means of neighbours
FAR = 1.5  # times the height that nearly all of a line's values need: what lies beyond is cut off
# Of the lines of a chart, in order: colour, dashes, width. Without colours they differ too; on white as on black.
STYLES = (
    ("#2563eb", "none", 1.5),
    ("#e8590c", "6 2", 1.5),
    ("#0f9960", "2 2", 2),
    ("#b5179e", "9 3 2 3", 1.5),
    ("#868e96", "none", 3),
    ("#0891b2", "4 4", 2.5),
    ("#e64980", "14 4", 2.5),
    ("#7f7f00", "8 3 2 3 2 3", 2),
)


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: what it is called.
        style: which of STYLES.
        steps, values: of its points, all finite.
        lost: the steps whose value is not.
    """

    label: str
    style: int
    steps: list[float]
    values: list[float]
    lost: list[float] = field(default_factory=list)


def key(style: int, label: str) -> str:
    """A piece of a line of a style, and what is drawn so."""
    return _key(_stroke(style), label)


def _key(look: str, label: str) -> str:
    """`key` for a line that looks as these attributes say."""
    piece = f'<svg viewBox="0 0 32 8"><path {look} d="M0 4H32"/></svg>'
    return f'<span class="key">{piece}{html.escape(label)}</span>'


def chart(title: str, series: list[Series], marks: list[float], last: float, legend: bool = True) -> str:
    """A figure with the lines over the steps up to `last`, and a dashed upright at each mark, an alarm's step.

    What cannot be seen in it is said below: values that are not finite, or cut off, and what is a mean of several.
    """
    drawn = [line for line in series if line.steps]
    keys = [key(line.style, line.label) for line in drawn if legend and line.label]
    if marks and drawn:
        keys.append(_key('class="alarm"', "alarm"))
    caption = f"<figcaption><h2>{html.escape(title)}</h2>{''.join(keys)}</figcaption>"
    low, high = _range([line.values for line in drawn])
    remarks = [remark for line in series for remark in _remarks(line, low, high)]
    if (size := max(map(_size, drawn), default=0)) > 1:
        remarks.append(f"lines are means of up to {size:,} points; the shade is their range")
    if not drawn:
        remarks = ["nothing recorded", *remarks]
    notes = "".join(f'<p class="faint">{html.escape(remark)}</p>' for remark in remarks)
    if not drawn:
        return f"<figure>{caption}{notes}</figure>"

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y(value: float) -> float:
        inside = min(max(value, low), high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (inside - low) / (high - low)

    def path(points: list[tuple[float, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    parts = []
    for value in ticks(low, high, 5):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.6g}</text>')
    for step in ticks(0, last, 6):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,.12g}</text>')
    parts.append(f'<text x="{LEFT - 14}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    for step in marks:
        place = f'x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line class="alarm" {place}><title>alarm at step {step:,}</title></line>')
    for line in drawn:
        colour = STYLES[line.style][0]
        means, lowest, highest = _thinned(line)
        if len(means) < len(line.steps):
            band = path(lowest + highest[::-1])
            parts.append(f'<polygon fill="{colour}" fill-opacity="0.15" points="{band}"/>')
        if len(means) == 1:  # of which no line can be seen
            parts.append(f'<circle fill="{colour}" r="3" cx="{x(means[0][0]):.1f}" cy="{y(means[0][1]):.1f}"/>')
        parts.append(f'<polyline {_stroke(line.style)} points="{path(means)}"/>')
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>{notes}</figure>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * times for times in (1, 2, 5, 10, 20) if power * times >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _stroke(style: int) -> str:
    colour, dashes, width = STYLES[style]
    return f'fill="none" stroke="{colour}" stroke-dasharray="{dashes}" stroke-width="{width}"'


def _range(lines: list[list[float]]) -> tuple[float, float]:
    """What the axis shows: 0 and the values of every line, with some room; but not those far beyond its others."""
    low = high = 0.0
    for values in lines:
        ordered = sorted(values)
        least = min(0.0, ordered[int(0.01 * (len(ordered) - 1))])
        most = max(0.0, ordered[math.ceil(0.99 * (len(ordered) - 1))])
        far = (FAR - 1) * (most - least)
        low = min(low, least if ordered[0] < least - far else ordered[0])
        high = max(high, most if ordered[-1] > most + far else ordered[-1])
    room = 0.05 * (high - low) or 1.0
    return low - (room if low < 0 else 0.0), high + room


def _remarks(line: Series, low: float, high: float) -> list[str]:
    """What of a line cannot be seen where values from low to high are."""
    name = f"{line.label}: " if line.label else ""
    remarks = []
    if line.lost:
        count, points = len(line.lost), len(line.lost) + len(line.steps)
        remarks.append(f"{name}not finite at {count:,} of {points:,} points, first at step {line.lost[0]:,}")
    if line.steps and max(line.values) > high:
        remarks.append(f"{name}goes up to {max(line.values):,.4g}, cut off")
    if line.steps and min(line.values) < low:
        remarks.append(f"{name}goes down to {min(line.values):,.4g}, cut off")
    return remarks


def _size(line: Series) -> int:
    return math.ceil(len(line.steps) / POINTS)


def _thinned(line: Series) -> list[list[tuple[float, float]]]:
    """Means, least and greatest values of each `_size(line)` points, at the last one's step: at most POINTS of each."""
    size = _size(line)
    parts = [(line.steps[i : i + size][-1], line.values[i : i + size]) for i in range(0, len(line.steps), size)]
    return [
        [(step, sum(values) / len(values)) for step, values in parts],
        [(step, min(values)) for step, values in parts],
        [(step, max(values)) for step, values in parts],
    ]
