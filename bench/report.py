"""The README's table and the plots, from the JSON files in bench/results.

    python -m fastdcgan.bench.report

Every figure comes from a file there, which names device, versions, date, commit and command; a device without a file
is "not yet measured". What `headline` and `readme` make of them goes between markers in README.md, the plots into
bench/results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdcgan.bench.roofline import median_and_spread
from fastdcgan.bench.throughput import median_ratio

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent.parent / "README.md"
MISSING = "not yet measured"
FIGURE = (5.5, 4)  # inches: shown 400 pixels wide, so that a point of a letter is about a pixel
KINDS = {"cuda": "GPU", "cpu": "CPU"}
KEPT = {"device": "GPU memory", "host": "host memory", "disk": "a file"}
LOOKS = {  # colour and marker, the same in all plots and told apart in grey too
    "example": ("C0", "o"),
    "example-fp32": ("C9", "P"),
    "skilled": ("C2", "s"),
    "fast-eager": ("C3", "^"),
    "fast-compiled": ("C1", "v"),
    "fast-captured": ("C4", "D"),
}
Results = dict[str, dict[str, Any]]  # file stem -> content


def results(folder: Path) -> Results:
    """The files by stem, those that say what was measured."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {stem: content for stem, content in found.items() if "measured" in content}


def readme(found: Results) -> str:
    """Markdown: the table, the plots, and the other measurements in a line each."""
    plots = "\n".join(
        f'<img src="bench/results/{stem}.svg" width="400" alt="{alt}">'
        for stem, content in found.items()
        if (alt := plotted(content))
    )
    lines = [
        *end_to_end_lines(found),
        *data_lines(found),
        *feeding_lines(found),
        *start_lines(found),
        *other_lines(found),
    ]
    return "\n\n".join(part for part in (table(found), plots, "\n".join(lines)) if part)


def plotted(content: dict[str, Any]) -> str | None:
    """What a plot of the file shows, and of what; None for a file that has none."""
    if is_comparison(content) and len({row["batch_size"] for row in content["rows"]}) > 1:
        return f"images a second against batch size, with the floor, {size(content)} on {machine(content)}"
    if content["measured"] == "quality":
        return f"sample quality against seconds of training, {content['data']} at {size(content)} on {machine(content)}"
    return None


def size(content: dict[str, Any]) -> str:
    height, width = content["network"]["image_size"]
    return f"{height}x{width}"


def cited(stem: str) -> str:
    return f"[{stem}.json](bench/results/{stem}.json)"


def end_to_end_lines(found: Results) -> list[str]:
    """From image files to weights: the fastest of ours against the plain example."""
    lines = []
    for stem, content in of_kind(found, "end to end"):
        if all(row["contender"] != "example" for row in content["rows"]):
            continue
        ours = max(
            (row for row in content["rows"] if row["contender"].startswith("fast")), key=lambda row: row["later_epochs"]
        )
        lines.append(
            f"- From the files of {content['data']} ({ours['images']:,} an epoch) to weights,"
            f" batch {ours['batch_size']}, {ours['precision']}, on {machine(content)}:"
            f" {ours['first_ratio']:.2f} times as fast as the plain example with its loader in the first epoch,"
            f" {ours['later_ratio']:.2f} times in later ones ({cited(stem)})."
        )
    return lines


def data_lines(found: Results) -> list[str]:
    """The data path alone."""
    lines = []
    for stem, content in of_kind(found, "data path"):
        ratios = {row["way"]: row for row in content["ways"]}
        first = [row for way, row in ratios.items() if way.endswith("first epoch")]
        usual, best = first[0], max(first, key=lambda row: row["ratio"])  # the default comes first
        at_hand = ratios.get(f"{usual['way']}, memory at hand", usual)
        others = []
        if best is not usual:
            others.append(f"{best['ratio']:.1f} with {best['way'].removesuffix(', first epoch')}")
        if at_hand["ratio"] > 1.1 * usual["ratio"]:
            others.append(f"{at_hand['ratio']:.1f} where the host has its memory at hand")
        also = f" ({', '.join(others)})" if others else ""
        lines.append(
            f"- Loading {content['data']} ({content['images']:,} images) at {content['image_size']} pixels"
            f" on {machine(content)}, first epoch: {usual['ratio']:.1f} times as fast as ImageFolder and a DataLoader"
            f" with two workers{also}; from the cache {ratios['cache']['images_per_second']:,} images/s"
            f" ({cited(stem)})."
        )
    return lines


def feeding_lines(found: Results) -> list[str]:
    """What the step waits for its images once they are decoded."""
    lines = []
    for stem, content in of_kind(found, "feeding"):
        shares = ", ".join(
            f"{share:.1%} ± {spread:.1%} from {KEPT[row['kept']]}"
            for row in content["rows"]
            for share, spread in [median_and_spread(row["shares"])]
        )
        beside = [row["copies_beside_kernels"] for row in content["rows"] if "copies_beside_kernels" in row]
        lines.append(
            f"- From the second epoch on a step of {content['batch_size']} on {machine(content)} waits for its"
            f" images, as a share of its time: {shares}"
            + (f"; kernels run during {beside[0]:.0%} of the time that copies from the host take" if beside else "")
            + f" ({cited(stem)})."
        )
    return lines


def machine(content: dict[str, Any]) -> str:
    """The device's name, and of a processor, whose name says little, what its vector units can do."""
    device = content["device"]
    return device["name"] if device["kind"] == "cuda" else f"{device['name']} ({device['capability']})"


def start_lines(found: Results) -> list[str]:
    """How long the first step takes with --compile, with an empty cache and with a full one."""
    lines = []
    for stem, content in of_kind(found, "throughput"):
        warm = found.get(stem.removesuffix("-cold") + "-warm") if stem.endswith("-cold") else None
        if warm:
            seconds = [each["rows"][0]["first_step_seconds"] for each in (content, warm)]
            lines.append(
                f"- The first compiled step takes {seconds[0]:.0f} s on {machine(content)}, in later runs, from the"
                f" compiler's cache, {seconds[1]:.0f} s ({cited(stem)}, {cited(stem.removesuffix('-cold') + '-warm')})."
            )
    return lines


def other_lines(found: Results) -> list[str]:
    """Quality parity, the cost of following a run, scaling."""
    lines = []
    for stem, content in of_kind(found, "quality"):
        parity = content["parity"]
        low, high = parity["interval"]
        verdict = "within" if parity["holds"] else "not shown to be within"
        verdict += f" the margin of {parity['margin']:.0%}"
        fast = next(curve for curve in content["curves"] if curve["contender"] != "example")
        executor = fast["contender"].removeprefix("fast-")
        lines.append(
            f"- The same steps give the same quality: over {parity['seeds']} seeds of {fast['steps'][-1]:,} steps on"
            f" {content['data']} at {size(content)}, width {content['network']['width']}, the {executor} step's"
            f" ({content['precision'][fast['contender']]}) sliced Wasserstein distance differs from the reference's by"
            f" {parity['difference']:+.1%} (95% interval {low:+.1%} to {high:+.1%}), {verdict}"
            f" ({cited(stem)})."
        )
    for stem, content in found.items():
        if "overhead" in content:
            share = f"{content['overhead']['share']:.2%} of a run's time on {machine(content)}"
            lines.append(f"- Logs, samples and checkpoints take {share} ({cited(stem)}).")
    for stem, content in of_kind(found, "scaling"):
        most = max(row["processes"] for row in content["rows"])
        weak, strong = (
            next(r["efficiency"] for r in content["rows"] if r["processes"] == most and r["scaling"] == kind)
            for kind in ("weak", "strong")
        )
        lines.append(
            f"- {most} processes, one {'core' if content['device']['kind'] == 'cpu' else 'GPU'} each, on"
            f" {machine(content)}:"
            f" weak scaling {weak:.0%}, strong scaling {strong:.0%} ({cited(stem)})."
        )
    return lines


def of_kind(found: Results, measured: str) -> list[tuple[str, dict[str, Any]]]:
    return [(stem, content) for stem, content in found.items() if content["measured"] == measured]


def table(found: Results) -> str:
    """Markdown: a row for each `Comparison`; for a kind of device without a file, one row that says so."""
    lines = [
        "| device | pixels, batch | plain example | tuned example | fastdcgan"
        " | against plain | of the floor | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in KINDS.items():
        rows = [each.row() for each in comparisons(found, kind)]
        lines += rows or [f"| {name} | 64x64 | {' | '.join([MISSING] * 5)} | |"]
    lines += [
        "",
        "Images a second of one training step: the median of rounds in which all take turns, ± half the distance",
        "between the quartiles. Ratios are taken within a round. Each file names the command that repeats it.",
    ]
    return "\n".join(lines)


def headline(found: Results) -> str:
    """How many times as fast as the plain example, from the smallest ratio to the largest of each kind of device."""
    parts = []
    for kind in KINDS:
        measured = comparisons(found, kind)
        ratios = sorted(each.ratio() for each in measured)
        names = " and ".join(dict.fromkeys(machine(each.content) for each in measured))
        if ratios:
            parts.append(f"**{ratios[0]:.1f} to {ratios[-1]:.1f} times** as fast on {names}")
    return f"A training step, against the plain PyTorch example's: {', '.join(parts)} ([how fast](#how-fast))."


def is_comparison(content: dict[str, Any]) -> bool:
    """Whether the plain example was measured in the same run; a file without it holds start times, say."""
    return content["measured"] == "throughput" and best(content["rows"], "example") is not None


@dataclass
class Comparison:
    """What one run measured at one batch size in one precision of ours: rows of its file."""

    stem: str
    content: dict[str, Any]
    plain: dict[str, Any]
    tuned: dict[str, Any] | None  # the fastest whose precision is a rival of ours
    ours: dict[str, Any]  # the fastest

    def ratio(self) -> float:
        """How many times as fast as the plain example: the median over rounds, which both were in."""
        return median_ratio(self.ours["rounds"], self.plain["rounds"])

    def row(self) -> str:
        """This result's row of the table."""
        device = self.content["device"]
        cells = [
            machine(self.content) + (f", {device['threads']} threads" if device["kind"] == "cpu" else ""),
            f"{size(self.content)}, {self.ours['batch_size']}",
            *(rate(row) for row in (self.plain, self.tuned, self.ours)),
            f"x{self.ratio():.2f}",
            f"{self.ours['images_per_second'] / self.ours['floor']:.0%}",
            f"[{self.content['date']}](bench/results/{self.stem}.json)",
        ]
        return f"| {' | '.join(cells)} |"


def comparisons(found: Results, kind: str) -> list[Comparison]:
    """Those of all files of a kind of device, by batch size, then precision."""
    made = []
    for stem, content in found.items():
        if not is_comparison(content) or content["device"]["kind"] != kind:
            continue
        measured = [row for row in content["rows"] if row["rounds"]]
        for batch in sorted({row["batch_size"] for row in measured}):
            rows = [row for row in measured if row["batch_size"] == batch]
            plain = best(rows, "example")
            precisions = {row["precision"] for row in rows if row["contender"].startswith("fast")}
            for precision in sorted(precisions, reverse=True):
                ours = best([row for row in rows if row["precision"] == precision], "fast")
                tuned = best([row for row in rows if same_kind(row["precision"], precision)], "skilled")
                if plain and ours:
                    made.append(Comparison(stem, content, plain, tuned, ours))
    return made


def best(rows: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The fastest of the rows whose contender begins with `name`; `example` is that one alone, not example-fp32."""
    matching = [
        row for row in rows if row["contender"] == name or (name != "example" and row["contender"].startswith(name))
    ]
    return max(matching, key=lambda row: row["images_per_second"], default=None)


def same_kind(one: str, other: str) -> bool:
    """Whether two precisions are rivals: the same, or both of 16 bits."""
    return one == other or {one, other} <= {"bf16", "fp16"}


def rate(row: dict[str, Any] | None) -> str:
    if row is None:
        return MISSING
    how = row["precision"]
    if row["contender"].startswith("fast-"):
        how = f"{row['contender'].removeprefix('fast-')}, {how}"
    digits = 0 if row["images_per_second"] >= 1000 else 1
    return f"{row['images_per_second']:,.{digits}f} ± {row['spread']:,.{digits}f} ({how})"


def plot_throughput(content: dict[str, Any], out: Path) -> None:
    """images/s against batch size, and the floor of each precision."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    rows = [row for row in content["rows"] if row["rounds"]]
    figure, axes = plt.subplots(figsize=FIGURE)
    for contender, precision in dict.fromkeys((row["contender"], row["precision"]) for row in rows):
        points = [row for row in rows if (row["contender"], row["precision"]) == (contender, precision)]
        batches, rates = [p["batch_size"] for p in points], [p["images_per_second"] for p in points]
        spreads = [p["spread"] for p in points]
        label = f"{contender} {precision}"
        axes.errorbar(batches, rates, spreads, capsize=3, label=label, **style(contender, precision))
    for precision in sorted({row["precision"] for row in rows}):
        floors = sorted({(row["batch_size"], row["floor"]) for row in rows if row["precision"] == precision})
        axes.plot(*zip(*floors, strict=True), linestyle="--", color="grey")
        above: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(f"floor {precision}", floors[-1], ha="right", va="bottom", color="grey", **above)
    axes.margins(y=0.12)  # room for the topmost floor's name
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images/s of a training step")
    batches = sorted({row["batch_size"] for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    plain_ticks(axes.yaxis)
    axes.set_title(f"{machine(content)}, {size(content)}, {content['date']}", fontsize=11)
    axes.legend(fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.15), frameon=False)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def style(contender: str, precision: str) -> dict[str, Any]:
    """How a contender's line looks: dashes and an empty marker for 16 bits."""
    colour, marker = LOOKS[contender]
    dashes = {"linestyle": "-.", "markerfacecolor": "white"} if precision in ("bf16", "fp16") else {"linestyle": "-"}
    return {"color": colour, "marker": marker, **dashes}


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each power of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_quality(content: dict[str, Any], out: Path) -> None:
    """Sliced Wasserstein distance against seconds of training, a line for each seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=FIGURE)
    lines = dict(zip(dict.fromkeys(c["contender"] for c in content["curves"]), ("-", "-."), strict=True))
    for curve in content["curves"]:
        contender = curve["contender"]
        look = {"color": LOOKS[contender][0], "linestyle": lines[contender]}
        label = contender if curve["seed"] == 0 else None
        axes.plot(curve["seconds"], curve["distances"], label=label, alpha=0.7, **look)
    axes.axhline(content["curves"][0]["least"], linestyle="--", color="grey", label="real images to real images")
    axes.set(yscale="log", xlabel="seconds of training", ylabel="sliced Wasserstein distance to real images")
    plain_ticks(axes.yaxis)
    axes.set_title(f"{content['data']} at {size(content)}, {machine(content)}, {content['date']}", fontsize=11)
    axes.legend(fontsize=10)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def filled(page: str, found: Results) -> str:
    """The README's text with what the results give between its markers.

    Raises:
        ValueError: it has no markers.
    """
    for name, text in (("headline", headline(found)), ("bench", readme(found))):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"no {begin} and {end}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastdcgan"  # the same figures give the same file
    found = results(RESULTS)
    for stem, content in found.items():
        if plotted(content):
            plot = plot_quality if content["measured"] == "quality" else plot_throughput
            plot(content, RESULTS / f"{stem}.svg")
    print(headline(found), readme(found), sep="\n\n")
    try:
        README.write_text(filled(README.read_text(), found))
    except ValueError as error:
        raise SystemExit(f"{README} was left alone: {error}") from None


if __name__ == "__main__":
    main()
