from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastdcgan.bench import contenders, report

ROOT = Path(__file__).resolve().parents[2]


def throughput(kind: str = "cpu", **changes):
    rows = [
        {"contender": name, "precision": precision, "batch_size": 64, "images_per_second": speed, "spread": 1.0,
         "ratio": speed / 50, "cpu_ratio": 1.25, "floor": 100.0, "rounds": [speed], "remark": "",
         "cpu_rounds": [speed if name == "example" else 62.5]}
        for name, precision, speed in (
            ("example", "fp32", 50.0), ("skilled", "fp32", 55.0), ("fast-eager", "fp32", 60.0),
            ("fast-compiled", "fp32", 65.0), ("fast-compiled", "bf16", 120.0),
        )
    ]  # fmt: skip
    device = {"kind": kind, "name": "Some Processor", "capability": "AVX2", "threads": 2}
    return {
        "measured": "throughput", "device": device, "date": "2026-01-02", "command": "fastdcgan bench",
        "network": {"image_size": [64, 64]}, "rows": rows,
    } | changes  # fmt: skip


def test_a_device_without_a_file_is_not_yet_measured():
    lines = report.table({"cpu-64": throughput()}).splitlines()
    assert lines[2].startswith("| GPU") and lines[2].count(report.MISSING) == 5
    assert "Some Processor (AVX2), 2 threads" in lines[3]


def test_the_row_shows_the_best_of_ours_per_precision_and_its_file():
    text = report.table({"cpu-64": throughput()})
    assert "65.0 ± 1.0 (compiled, fp32) | x1.30 | 65% | [2026-01-02](bench/results/cpu-64.json)" in text
    assert "120.0 ± 1.0 (compiled, bf16)" in text


def test_the_headline_is_the_range_over_all_rows_of_a_kind_of_device():
    gpu = throughput("cuda", device={"kind": "cuda", "name": "Some GPU"})
    assert report.headline({"cpu-64": throughput(), "gpu": gpu, "scaling": {"measured": "scaling"}}) == (
        "A training step, against the plain PyTorch example's: **1.3 to 2.4 times** as fast on Some GPU,"
        " **1.3 to 2.4 times** as fast on Some Processor (AVX2) ([how fast](#how-fast))."
    )


def test_the_tuned_example_beside_ours_is_of_the_same_precision():
    content = throughput()
    content["rows"].append(content["rows"][1] | {"precision": "bf16", "images_per_second": 90.0})
    fp32, bf16 = report.table({"cpu-64": content}).splitlines()[3:5]
    assert "55.0 ± 1.0 (fp32) | 65.0" in fp32 and "90.0 ± 1.0 (bf16) | 120.0" in bf16
    content["rows"].pop()
    assert f"{report.MISSING} | 120.0" in report.table({"cpu-64": content})


def test_ratios_are_to_the_plain_example_whatever_ran_first():
    content = throughput()
    content["rows"] = content["rows"][::-1]
    for row in content["rows"]:
        row["ratio"] = row["cpu_ratio"] = 0.5
    assert "x1.30 | 65%" in report.table({"cpu-64": content})
    assert "**1.3 to 2.4 times**" in report.headline({"cpu-64": content})
    content["rows"][-1]["rounds"] = []
    assert report.comparisons({"cpu-64": content}, "cpu") == [], "nothing was measured that ours could be compared with"


def test_example_fp32_does_not_stand_in_for_the_example():
    content = throughput("cuda")
    content["rows"][0]["contender"] = "example-fp32"
    assert "Some Processor" not in report.table({"gpu": content})


def test_a_failed_contender_is_not_in_the_table():
    content = throughput()
    content["rows"][1] |= {"rounds": [], "images_per_second": 0.0}
    assert f"| {report.MISSING} | 65.0" in report.table({"cpu-64": content})


def test_what_the_results_give_replaces_what_is_between_the_markers():
    found = {"cpu-64": throughput()}
    parts = [f"<!-- {name}:{end} -->" for name in ("headline", "bench") for end in ("begin", "end")]
    page = report.filled("a\n{}\nold\n{}\nb\n{}\nold\n{}\nc\n".format(*parts), found)
    assert page == "a\n{}\n{}\n{}\nb\n{}\n{}\n{}\nc\n".format(
        *parts[:1], report.headline(found), *parts[1:3], report.readme(found), parts[3]
    )
    assert report.filled(page, found) == page
    with pytest.raises(ValueError, match="headline:begin"):
        report.filled("no markers", found)


def test_every_published_result_says_where_it_comes_from():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        content = json.loads(path.read_text())
        if "measured" in content:
            assert {"device", "versions", "date", "commit", "command"} <= content.keys(), path.name


def test_the_readmes_table_is_the_one_made_from_the_results():
    readme = (ROOT / "README.md").read_text()
    assert report.filled(readme, report.results(report.RESULTS)) == readme, "run python -m fastdcgan.bench.report"


def test_the_other_measurements_are_a_line_each_with_their_file():
    both = {"first_ratio": 2.0, "later_ratio": 3.5, "precision": "fp32", "batch_size": 64, "later_epochs": 100.0}
    both["images"] = 1_920
    device = {"kind": "cpu", "name": "Some Processor", "capability": "AVX2"}
    found = {
        "end": {"measured": "end to end", "data": "photos", "device": device, "rows": [
            {"contender": "example", **both, "later_epochs": 30.0}, {"contender": "fast-eager", **both},
        ]},
        "data": {
            "measured": "data path", "data": "photos", "image_size": 64, "images": 4_000, "device": device,
            "ways": [
                {"way": "--loader dali --cache host, first epoch", "ratio": 2.5, "images_per_second": 300},
                {"way": "--loader dali --cache host, first epoch, memory at hand", "ratio": 2.8},
                {"way": "--loader dali --cache off, first epoch", "ratio": 3.1, "images_per_second": 372},
                {"way": "--loader torch --cache host, first epoch, memory at hand", "ratio": 3.3},
                {"way": "cache", "ratio": 1000.0, "images_per_second": 123_456},
            ],
        },
        "feeding": {
            "measured": "feeding", "batch_size": 128, "device": {"kind": "cuda", "name": "Some GPU"},
            "rows": [
                {"kept": "device", "shares": [-0.002, -0.001, 0.002]},
                {"kept": "host", "shares": [0.0123], "copies_beside_kernels": 0.98},
            ],
        },
        "start-cold": throughput(rows=[{"contender": "fast-compiled", "first_step_seconds": 41.2, "rounds": [1.0]}]),
        "start-warm": throughput(rows=[{"contender": "fast-compiled", "first_step_seconds": 9.7, "rounds": [1.0]}]),
        "quality": {
            "measured": "quality", "data": "digits", "device": device, "network": {"image_size": [16, 16], "width": 8},
            "precision": {"example": "fp32", "fast-eager": "fp32"},
            "curves": [{"contender": "example"}, {"contender": "fast-eager", "steps": [0, 150, 300]}],
            "parity": {"difference": 0.01, "interval": [-0.05, 0.07], "margin": 0.2, "seeds": 5, "holds": True},
        },
        "follow": throughput(rows=[], overhead={"share": 0.0123}),
        "scaling": {
            "measured": "scaling", "device": device,
            "rows": [
                {"scaling": kind, "processes": count, "efficiency": efficiency}
                for kind, count, efficiency in (("weak", 1, 1), ("weak", 2, 0.8), ("strong", 1, 1), ("strong", 2, 0.7))
            ],
        },
    }  # fmt: skip
    gpus = found["scaling"] | {"device": {"kind": "cuda", "name": "Some GPU"}}
    (line,) = report.other_lines({"scaling": gpus})
    assert line.startswith("- 2 processes, one GPU each, on Some GPU: weak scaling 80%")
    found["end"]["rows"].insert(1, {"contender": "fast-eager", **both, "later_epochs": 70.0, "later_ratio": 2.3})
    text = report.readme(found)
    alone = found["end"] | {"rows": found["end"]["rows"][1:]}
    assert report.end_to_end_lines({"end": alone}) == [], "not against the plain example"
    for stem, words in (
        (
            "end",
            "photos (1,920 an epoch) to weights, batch 64, fp32, on Some Processor (AVX2): 2.00 times as fast as the"
            " plain example with its loader in the first epoch, 3.50 times in later ones",
        ),
        (
            "data",
            "2.5 times as fast as ImageFolder and a DataLoader with two workers"
            " (3.1 with --loader dali --cache off, 2.8 where the host has its memory at hand); from",
        ),
        (
            "feeding",
            "a step of 128 on Some GPU waits for its images, as a share of its time: -0.1% ± 0.1% from GPU memory,"
            " 1.2% ± 0.0% from host memory; kernels run during 98% of the time that copies from the host take",
        ),
        ("start-cold", "takes 41 s on Some Processor (AVX2), in later runs, from the compiler's cache, 10 s"),
        (
            "quality",
            "over 5 seeds of 300 steps on digits at 16x16, width 8, the eager step's (fp32) sliced Wasserstein",
        ),
        ("quality", "+1.0% (95% interval -5.0% to +7.0%), within the margin of 20%"),
        ("follow", "take 1.23% of a run's time on Some Processor (AVX2)"),
        ("scaling", "2 processes, one core each, on Some Processor (AVX2): weak scaling 80%, strong scaling 70%"),
    ):
        (line,) = [line for line in text.splitlines() if words in line]
        assert f"bench/results/{stem}.json" in line
    assert text.count(report.MISSING) == 10, "start times and the like are no comparison"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(plot, content): the axes that the plot function has drawn, its file written."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    def draw(plot, content):
        with monkeypatch.context() as patch:
            patch.setattr(plt, "close", lambda figure: None)
            plot(content, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").stat().st_size > 0
        (axes,) = plt.gcf().axes
        return axes

    yield draw
    plt.close("all")


def test_the_plot_of_rates_and_floors(drawn):
    content = throughput(network={"image_size": [64, 96]})
    failed = content["rows"][1] | {"rounds": [], "contender": "skilled"}
    content["rows"] = [
        row
        | {"batch_size": batch, "images_per_second": times * row["images_per_second"], "floor": times * row["floor"]}
        for batch, times in ((128, 2), (64, 1))
        for row in (content["rows"][0], content["rows"][4])
    ] + [failed]
    axes = drawn(report.plot_throughput, content)
    shown = {bars.get_label(): [line.tolist() for line in bars[0].get_data()] for bars in axes.containers}
    assert shown == {"example fp32": [[128, 64], [100, 50]], "fast-compiled bf16": [[128, 64], [240, 120]]}
    reach = [segment.tolist() for bars in axes.containers for segment in bars[2][0].get_segments()]
    assert reach == [[[x, y - 1], [x, y + 1]] for x, y in ((128, 100), (64, 50), (128, 240), (64, 120))]
    floors = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [[list(each) for each in line.get_data()] for line in floors] == [[[64, 128], [100, 200]]] * 2
    assert [text.get_text() for text in axes.texts] == ["floor bf16", "floor fp32"]
    assert all(text.xyann[1] > 0 for text in axes.texts), "above its line, not on it"
    assert axes.get_title() == "Some Processor (AVX2), 64x96, 2026-01-02"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size", "images/s of a training step")


def test_the_plot_of_quality_is_over_seconds(drawn):
    curves = [
        {"contender": name, "seed": seed, "steps": [0, 50], "seconds": [0.0, speed], "distances": [0.5, 0.1 + seed],
         "least": 0.05}
        for seed in (0, 1)
        for name, speed in (("example", 8.0), ("fast-eager", 4.0))
    ]  # fmt: skip
    content = throughput() | {"data": "digits", "curves": curves}
    axes = drawn(report.plot_quality, content)
    *lines, least = axes.lines
    assert [[list(each) for each in line.get_data()] for line in lines] == [
        [[0.0, 8.0], [0.5, 0.1]], [[0.0, 4.0], [0.5, 0.1]], [[0.0, 8.0], [0.5, 1.1]], [[0.0, 4.0], [0.5, 1.1]],
    ]  # fmt: skip
    assert list(least.get_ydata()) == [0.05, 0.05]
    legend = {text.get_text(): line.get_color() for text, line in zip(
        axes.get_legend().get_texts(), axes.get_legend().get_lines(), strict=True
    )}  # fmt: skip
    assert legend == {
        "example": lines[0].get_color(), "fast-eager": lines[1].get_color(), "real images to real images": "grey",
    }  # fmt: skip
    assert lines[0].get_color() == lines[2].get_color() != lines[1].get_color() == lines[3].get_color()
    assert lines[0].get_linestyle() == lines[2].get_linestyle() != lines[1].get_linestyle() == lines[3].get_linestyle()
    assert axes.get_xlabel() == "seconds of training"
    assert axes.get_title() == "digits at 64x64, Some Processor (AVX2), 2026-01-02"
    assert {"0.05", "0.1", "0.2", "0.5", "1"} <= labels(axes)


def labels(axes) -> set[str]:
    """Of the ticks at the side, large and small, that are seen."""
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    return {tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high} - {""}


def test_rates_have_labels_at_one_two_and_five(drawn):
    content = throughput()
    for row in content["rows"]:
        row |= {"images_per_second": 10 * row["images_per_second"], "spread": 1.0, "floor": 2100.0}
    assert labels(drawn(report.plot_throughput, content)) == {"500", "1000", "2000"}


def test_a_contender_looks_the_same_in_all_plots_and_like_no_other(drawn):
    """In colour and in grey, whichever others are there."""
    rows, seen = throughput()["rows"], []
    for shown in (rows, rows[::-1], rows[1:]):
        axes = drawn(report.plot_throughput, throughput(rows=shown))
        looks = {
            bars.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor())
            for bars in axes.containers
            for line in bars[:1]
        }
        assert len({look[1:] for look in looks.values()}) == len(shown)
        seen.append(looks)
    assert seen[1] == seen[0] and seen[0].items() > seen[2].items()
    fp32, bf16 = seen[0]["fast-compiled fp32"], seen[0]["fast-compiled bf16"]
    assert fp32[:2] == bf16[:2] and fp32[2:] != bf16[2:]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_contender_has_a_look_of_its_own(kind):
    named = {entry.name for entry in contenders.entries(contenders.NAMES, "auto", torch.device(kind))}
    assert named <= report.LOOKS.keys()
    for each in zip(*report.LOOKS.values(), strict=True):
        assert len(set(each)) == len(report.LOOKS)


def test_plots_say_in_words_what_they_are_of():
    rows = [row | {"batch_size": batch} for row in throughput()["rows"] for batch in (64, 128)]
    avx2, avx512 = throughput(rows=rows), throughput(rows=rows, network={"image_size": [32, 48]})
    avx512["device"] = avx512["device"] | {"capability": "AVX512"}
    quality = throughput(measured="quality", data="digits")
    words = "images a second against batch size, with the floor"
    assert report.plotted(avx2) == f"{words}, 64x64 on Some Processor (AVX2)"
    assert report.plotted(avx512) == f"{words}, 32x48 on Some Processor (AVX512)"
    assert report.plotted(quality) == (
        "sample quality against seconds of training, digits at 64x64 on Some Processor (AVX2)"
    )
    assert report.plotted(throughput()) is None, "a single batch size"
