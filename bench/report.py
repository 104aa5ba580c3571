"""The README's table and the plots, from the JSON files in bench/results.

    python -m fastdcgan.bench.report

Every figure comes from a file there, which names device, versions, date, commit and command; a device without a file
is "not yet measured". The table goes between two markers in README.md, the plots into bench/results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MISSING = "not yet measured"
KINDS = {"cuda": "GPU", "cpu": "CPU"}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The files by stem, those that `throughput`, `end_to_end` and `quality` wrote."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {stem: content for stem, content in found.items() if "measured" in content}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each file, batch size and precision of ours; for a kind of device without a file, one row."""
    lines = [
        "| device | pixels, batch | plain example | tuned example | fastdcgan | floor"
        " | against plain | the same, processor time | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    throughput = {stem: content for stem, content in found.items() if is_comparison(content)}
    for kind, name in KINDS.items():
        of_kind = {stem: content for stem, content in throughput.items() if content["device"]["kind"] == kind}
        if not of_kind:
            lines.append(f"| {name} | 64x64 | {' | '.join([MISSING] * 4)} | | | |")
        for stem, content in of_kind.items():
            lines += table_rows(stem, content)
    commands = {f"`{content['command']}`" for content in throughput.values()}
    lines += ["", "Images a second of one training step, median of rounds in which all take turns, ± half the distance"]
    lines += (
        ["between the quartiles; ratios are taken within a round. Repeat with " + " or ".join(sorted(commands)) + "."]
        if commands
        else [""]
    )
    return "\n".join(lines).rstrip()


def is_comparison(content: dict[str, Any]) -> bool:
    """Whether the plain example was measured in the same run; a file without it holds start times, say."""
    return content["measured"] == "throughput" and best(content["rows"], "example") is not None


def table_rows(stem: str, content: dict[str, Any]) -> list[str]:
    device, (height, width) = content["device"], content["network"]["image_size"]
    name = device["name"] + (f", {device['threads']} threads" if device["kind"] == "cpu" else "")
    measured = [row for row in content["rows"] if row["rounds"]]
    lines = []
    for batch in sorted({row["batch_size"] for row in measured}):
        rows = [row for row in measured if row["batch_size"] == batch]
        plain, tuned = best(rows, "example"), best(rows, "skilled")
        for precision in sorted(
            {row["precision"] for row in rows if row["contender"].startswith("fast")}, reverse=True
        ):
            ours = best([row for row in rows if row["precision"] == precision], "fast")
            if ours is None:
                continue
            cells = [name, f"{height}x{width}, {batch}", *(rate(row) for row in (plain, tuned, ours))]
            cells += [f"{ours['floor']:,.0f}", f"x{ours['ratio']:.2f}", f"x{ours['cpu_ratio']:.2f}"]
            lines.append(f"| {' | '.join(cells)} | [{content['date']}](bench/results/{stem}.json) |")
    return lines


def best(rows: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The fastest of the rows whose contender begins with `name`; `example` is that one alone, not example-fp32."""
    matching = [
        row for row in rows if row["contender"] == name or (name != "example" and row["contender"].startswith(name))
    ]
    return max(matching, key=lambda row: row["images_per_second"], default=None)


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

    rows = [row for row in content["rows"] if row["rounds"]]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for contender, precision in dict.fromkeys((row["contender"], row["precision"]) for row in rows):
        points = [row for row in rows if (row["contender"], row["precision"]) == (contender, precision)]
        batches, rates = [p["batch_size"] for p in points], [p["images_per_second"] for p in points]
        spreads = [p["spread"] for p in points]
        axes.errorbar(batches, rates, spreads, marker="o", capsize=3, label=f"{contender} {precision}")
    for precision in sorted({row["precision"] for row in rows}):
        floors = sorted({(row["batch_size"], row["floor"]) for row in rows if row["precision"] == precision})
        axes.plot(*zip(*floors, strict=True), linestyle="--", color="grey")
        axes.annotate(f"floor {precision}", floors[-1], ha="right", va="bottom", color="grey")
    height, width = content["network"]["image_size"]
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images/s of a training step")
    batches = sorted({row["batch_size"] for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_title(f"{content['device']['name']}, {height}x{width}, {content['date']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def plot_quality(content: dict[str, Any], out: Path) -> None:
    """Sliced Wasserstein distance against seconds of training, a line for each seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    colours = dict(zip(dict.fromkeys(c["contender"] for c in content["curves"]), ("C0", "C1"), strict=True))
    for curve in content["curves"]:
        label = curve["contender"] if curve["seed"] == 0 else None
        axes.plot(curve["seconds"], curve["distances"], color=colours[curve["contender"]], label=label, alpha=0.7)
    axes.axhline(content["curves"][0]["least"], linestyle="--", color="grey", label="real images to real images")
    axes.set(yscale="log", xlabel="seconds of training", ylabel="sliced Wasserstein distance to real images")
    axes.set_title(f"{content['data']}, {content['device']['name']}, {content['date']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def insert(text: str, readme: str) -> str:
    """The README with `text` between the markers.

    Raises:
        ValueError: no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastdcgan"  # the same figures give the same file
    found = results(RESULTS)
    for stem, content in found.items():
        if is_comparison(content):
            plot_throughput(content, RESULTS / f"{stem}.svg")
        elif content["measured"] == "quality":
            plot_quality(content, RESULTS / f"{stem}.svg")
    print(table(found))
    try:
        README.write_text(insert(table(found), README.read_text()))
    except ValueError as error:
        raise SystemExit(f"{README} was left alone: {error}") from None


if __name__ == "__main__":
    main()
