"""A run, or several over one another, as one HTML file that needs nothing else: curves, samples, alarms, settings."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastdcgan.alarms import ROLLBACK
from fastdcgan.console import say
from fastdcgan.errors import UserError
from fastdcgan.files import check_name, check_out, printable, replace_file, target
from fastdcgan.plot import STYLES, Series, chart, key

PAGE = (".html", ".htm")
LARGEST = 1e300  # of the numbers that a chart can show
FRAMES = 60  # sample grids in the timeline, evenly chosen
TIMELINES = {"step": "moving average", "raw-step": "latest weights"}  # samples/<prefix>-<number>.png

# Chart title -> the lines in it: (file, key, label).
CHARTS: dict[str, list[tuple[str, str, str]]] = {
    "Loss": [("metrics", "loss_d", "discriminator"), ("metrics", "loss_g", "generator")],
    "Discriminator's output": [("metrics", "d_real", "D(x), real"), ("metrics", "d_fake", "D(G(z)), generated")],
    "Gradient norm": [("metrics", "grad_norm_d", "discriminator"), ("metrics", "grad_norm_g", "generator")],
    "Diversity of the samples (the data's is 1)": [
        ("quality", "diversity", "two samples"),
        ("quality", "nearest", "nearest other"),
    ],
    "Images a second": [("metrics", "images_per_second", "")],
}

# Nothing may be loaded from anywhere: the file shows what is in it.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; --faint: color-mix(in srgb, currentColor 18%, transparent) }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.05rem; margin: 0 0 .3rem }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1.5rem }}
section {{ margin: 1.5rem 0 }} svg {{ width: 100%; height: auto; font: 11px system-ui, sans-serif }}
@media print, (max-width: 500px) {{ svg {{ font-size: 14px }} }}
svg text {{ fill: currentColor }} svg .rule {{ stroke: var(--faint) }}
svg .alarm {{ stroke: #d97706; stroke-dasharray: 4 3 }} img {{ max-width: 100%; image-rendering: pixelated }}
figure {{ margin: 0 }} figure p {{ margin: 0; font-size: .85rem }}
input[type=range] {{ width: 100% }} .samples img {{ width: 100% }}
.samples {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }}
div.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .15rem .7rem .15rem 0; border-bottom: 1px solid var(--faint); vertical-align: top;
 min-width: 5rem; max-width: 22rem; overflow-wrap: break-word }} tr > :first-child {{ white-space: nowrap }}
.key {{ display: inline-block; margin-right: 1.2em }} .key svg {{ width: 2.1em; margin-right: .4em }}
.keys {{ position: sticky; top: 0; padding: .4rem 0; background: Canvas }}
.warn {{ border-left: 4px solid #d97706; padding: .2rem .8rem; margin: .5rem 0 }} .faint {{ opacity: .7 }}
@media print {{ .grid {{ grid-template-columns: 1fr 1fr }} figure, tr, .warn {{ break-inside: avoid }}
 h2 {{ break-after: avoid }} input {{ display: none }} }}
</style></head><body>
"""

SLIDER = """<script>
for (const box of document.querySelectorAll("[data-frames]")) {
  const frames = JSON.parse(box.dataset.frames), slider = box.querySelector("input");
  const show = () => {
    const frame = frames[slider.value];
    const step = box.querySelector("output").value = "step " + frame.step.toLocaleString("en");
    slider.setAttribute("aria-valuetext", step);
    box.querySelectorAll("img.frame").forEach((img, i) => { img.src = frame.images[i] || "data:,"; });
  };
  slider.addEventListener("input", show);
  show();
}
</script>
"""


@dataclass(frozen=True)
class Record:
    """What a run folder says of itself: the lines of its .jsonl files and the content of config.json."""

    path: Path
    lines: dict[str, list[dict[str, Any]]]
    about: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last(self) -> float:
        """The last step of which any line says something."""
        steps = (line["step"] for lines in self.lines.values() for line in lines if _number(line.get("step")))
        return max(steps, default=0)

    def series(self, file: str, key: str) -> tuple[list[float], list[float], list[float]]:
        """Steps and values of one figure, where it is a finite number, and the steps where it is none."""
        lines = [line for line in self.lines[file] if _number(line.get("step")) and key in line]
        finite = [line for line in lines if _number(line[key])]
        lost = [line["step"] for line in lines if not _number(line[key])]
        return [line["step"] for line in finite], [line[key] for line in finite], lost


def report(run: Path, out: Path | None) -> Path:
    """Write the report of a run; returns its path, `report.html` in the run folder if `out` is None.

    Raises:
        UserError: not a run folder, or the file has another suffix or cannot be written.
    """
    if out is not None:
        check_name(out, PAGE)
    record = read(run)
    if out is not None:
        check_out(out, PAGE)
    out = run / "report.html" if out is None else target(out)
    alarms = [alarm for alarm in record.lines["alarms"] if _number(alarm.get("step"))]
    marks = [alarm["step"] for alarm in alarms]
    parts = [f"<h1>{html.escape(record.name)}</h1>", _summary(record)]
    parts += [
        f'<div class="warn"><b>Step {alarm["step"]:,}, {html.escape(str(alarm.get("kind")))}.</b>'
        f" {html.escape(str(alarm.get('message')))}</div>"
        for alarm in alarms
    ]
    charts = []
    for title, lines in CHARTS.items():
        drawn = [Series(label, i, *record.series(file, name)) for i, (file, name, label) in enumerate(lines)]
        charts.append(chart(title, drawn, marks, record.last))
    parts += [f'<section class="grid">{"".join(charts)}</section>', _timeline(record)]
    settings = {f"{kind}: {key}" if kind != "config" else key: value for kind, key, value in _settings(record)}
    parts.append("<h2>Configuration</h2>" + _table([[key, value] for key, value in settings.items()], ["", ""]))
    return _write(out, record.name, parts)


def compare(runs: list[Path], out: Path) -> Path:
    """Write a page with the same curves of several runs over one another and what is set differently in them.

    Raises:
        UserError: fewer than two runs or more than eight, something that is not a run folder, or the file has another
            suffix or cannot be written.
    """
    if not 2 <= len(runs) <= len(STYLES):
        raise UserError(f"compare takes 2 to {len(STYLES)} run folders, not {len(runs)}")
    check_name(out, PAGE)
    records = [read(run) for run in runs]
    check_out(out, PAGE)
    out = target(out)
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = [str(record.path) for record in records]
    keys = "".join(key(i, name) for i, name in enumerate(names))
    parts = [f"<h1>{len(runs)} runs</h1>", f'<div class="keys">{keys}</div>']
    charts, last = [], max(record.last for record in records)
    for title, lines in CHARTS.items():
        for file, figure, label in lines:
            drawn = [
                Series(name, i, *record.series(file, figure))
                for i, (name, record) in enumerate(zip(names, records, strict=True))
            ]
            charts.append(chart(f"{title}: {label}" if label else title, drawn, [], last, legend=False))
    parts.append(f'<section class="grid">{"".join(charts)}</section>')
    settings = [{(kind, key): value for kind, key, value in _settings(record)} for record in records]
    rows = []
    for kind, setting in dict.fromkeys(entry for each in settings for entry in each):
        values = [each.get((kind, setting), "") for each in settings]
        if len(set(values)) > 1 and setting != "run_dir":
            rows.append([setting if kind == "config" else f"{kind}: {setting}", *values])
    parts.append("<h2>What differs</h2>" + (_table(rows, ["", *names]) if rows else "<p>Nothing.</p>"))
    figures = []
    for name, record in zip(names, records, strict=True):
        newest = _grids(record, "step")[-1:]
        images = "".join(f'<img alt="samples" src="{_embedded(path)}">' for _, path in newest)
        step = f", step {newest[0][0]:,}" if newest else ""
        figures.append(f"<figure><figcaption>{html.escape(name)}{step}</figcaption>{images}</figure>")
    parts.append(f'<section class="grid samples">{"".join(figures)}</section>')
    return _write(out, " and ".join(names), parts)


def read(run: Path) -> Record:
    """A run folder's figures and configuration; damaged lines are left out.

    Raises:
        UserError: it is not a run folder, or has no figures yet.
    """
    lines = {name: _lines(run / f"{name}.jsonl") for name in ("metrics", "quality", "alarms")}
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.json")
    if not lines["metrics"]:
        raise UserError(f"{run} has no figures yet: metrics.jsonl is missing or empty")
    try:
        about = json.loads((run / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run / 'config.json'} cannot be read: {error}") from error
    return Record(run, lines, about if isinstance(about, dict) else {})


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn by a kill
        if isinstance(value, dict):
            found.append(value)
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _settings(record: Record) -> list[tuple[str, str, str]]:
    """(part of config.json, key, value as text)."""
    settings = [
        (kind, str(name), "not set" if value is None else str(value))
        for kind, part in record.about.items()
        if isinstance(part, dict)
        for name, value in part.items()
    ]
    return [*settings, ("data", "machine", str(record.about.get("device")))]


LAST = (("step", "step", 0), ("images", "images", 0), ("epoch", "epoch", 1))


def _summary(record: Record) -> str:
    last = record.lines["metrics"][-1]
    rates = sorted(record.series("metrics", "images_per_second")[1])
    words = [f"{label} {last[key]:,.{digits}f}" for label, key, digits in LAST if _number(last.get(key))]
    if rates:
        words.append(f"{rates[len(rates) // 2]:,.0f} images/s (median)")
    kinds = [alarm.get("kind") for alarm in record.lines["alarms"]]
    back = kinds.count(ROLLBACK)
    words.append(_count(len(kinds) - back, "alarm") + (f", {_count(back, ROLLBACK)}" if back else ""))
    return f"<p>{', '.join(words)}</p>"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}" + ("" if number == 1 else "s")


def _grids(record: Record, prefix: str) -> list[tuple[int, Path]]:
    """The steps and files of samples/<prefix>-<number>.png, in order; what points out of the run folder is left out."""
    found = []
    for path in (record.path / "samples").glob(f"{prefix}-*.png"):
        number = path.stem.removeprefix(f"{prefix}-")
        if not number.isdigit():
            continue
        if not path.resolve().is_relative_to(record.path.resolve()):
            say(f"warning: {printable(path)} points out of the run folder: it is left out")
            continue
        found.append((int(number), path))
    return sorted(found)


def _timeline(record: Record) -> str:
    grids = {prefix: dict(_grids(record, prefix)) for prefix in TIMELINES}
    steps = sorted(grids["step"])
    if not steps:
        return ""
    count = min(FRAMES, len(steps))
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})
    shown = [prefix for prefix in TIMELINES if grids[prefix]]
    frames: list[dict[str, Any]] = [
        {"step": step, "images": [_embedded(grids[p][step]) if step in grids[p] else "" for p in shown]}
        for step in chosen
    ]
    last = len(frames) - 1
    figures = "".join(  # the last frame, which is seen where scripts do not run
        f"<figure><figcaption>{TIMELINES[p]}</figcaption>"
        f'<img class="frame" alt="samples, {TIMELINES[p]}" src="{frames[last]["images"][i] or "data:,"}"></figure>'
        for i, p in enumerate(shown)
    )
    real = record.path / "samples" / "real.png"
    if real.is_file() and real.resolve().is_relative_to(record.path.resolve()):
        figures += f'<figure><figcaption>real</figcaption><img alt="real images" src="{_embedded(real)}"></figure>'
    return (
        f'<section data-frames="{html.escape(json.dumps(frames))}">'
        f"<h2>Samples: <output>step {chosen[last]:,}</output></h2>"
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step">'
        f'<div class="grid samples">{figures}</div></section>'
    )


def _embedded(path: Path) -> str:
    """A picture as a data: address; nothing for a file that is none."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.save(buffer, "WEBP", quality=90)
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins raise almost anything on damaged files
        return "data:,"
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(rows: list[list[str]], head: list[str]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{row(head, "th") if any(head) else ""}{body}</table></div>'


def _write(out: Path, title: str, parts: list[str]) -> Path:
    page = HEAD.format(title=html.escape(title)) + "\n".join(parts) + "\n" + SLIDER + "</body></html>\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    say(f"{printable(out)} ({out.stat().st_size / 2**20:.1f} MiB): open it in a browser")
    return out
