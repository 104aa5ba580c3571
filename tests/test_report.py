"""The HTML report: complete in itself, right in its numbers, and safe with what a run folder may hold."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fastdcgan.cli import main
from fastdcgan.errors import UserError
from fastdcgan.plot import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, STYLES, TOP, WIDTH, Series, _thinned, chart, ticks
from fastdcgan.report import FRAMES, _embedded, compare, report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements of a page, and whether every one is closed."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.found if name == tag]


def make_run(path: Path, points: int = 30, grids: int = 4, **config: object) -> Path:
    (path / "samples").mkdir(parents=True)
    about = {"config": {"lr": 2e-4, "loss": "bce", **config}, "versions": {"torch": "2"}, "device": "a CPU"}
    (path / "config.json").write_text(json.dumps(about))
    with open(path / "metrics.jsonl", "w") as file:
        for i in range(1, points + 1):
            values = {"step": 20 * i, "images": 1280 * i, "epoch": i / 10, "loss_d": 1 / i, "loss_g": 1 + i / points}
            values |= {"d_real": 0.6, "d_fake": None if i == 3 else 0.4, "images_per_second": 1000.0}
            file.write(json.dumps(values) + "\n")
        file.write('{"step": 9')  # torn
    with open(path / "quality.jsonl", "w") as file:
        for i in range(1, grids + 1):
            file.write(json.dumps({"step": 100 * i, "diversity": i / grids, "nearest": 0.5}) + "\n")
            for prefix in ("step", "raw-step"):
                shade = 255 * i // grids
                Image.new("RGB", (66, 66), (shade, 128, 255 - shade)).save(
                    path / "samples" / f"{prefix}-{100 * i:06d}.png"
                )
    Image.new("L", (66, 66), 90).save(path / "samples" / "real.png")
    return path


def alarm(run: Path, message: str) -> None:
    with open(run / "alarms.jsonl", "a") as file:
        file.write(json.dumps({"kind": "collapse", "step": 200, "sound": 100, "message": message}) + "\n")


def assert_alone(path: Path) -> Page:
    """Nothing in the page is loaded from anywhere."""
    page = Page(path)
    assert not any(attrs.get("src") == "" or (tag == "img" and "src" not in attrs) for tag, attrs in page.found)
    for _, attrs in page.found:
        for name in ("src", "href", "action", "srcset"):
            assert attrs.get(name, "data:,").startswith("data:")
        assert not any(name.startswith("on") for name in attrs)
    assert "http://" not in path.read_text() and "https://" not in path.read_text() and "url(" not in path.read_text()
    return page


def test_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    alarm(run, "Try --r1 5")
    assert report(run, None) == run / "report.html"
    page = assert_alone(run / "report.html")
    lines = page.all("polyline")
    counts = [len(line["points"].split()) for line in lines]
    assert counts == [30, 30, 30, 29, 4, 4, 30]  # losses, outputs (one not finite), diversity, speed; no norms
    assert "nothing recorded" in page.text and "step 600, images 38,400, epoch 3.0" in page.text
    assert "Try --r1 5" in page.text and "1 alarm" in page.text and "0.0002" in page.text
    assert len([line for line in page.all("line") if line["class"] == "alarm"]) == 5 - 1
    (slider,) = page.all("input")
    assert slider["max"] == slider["value"] == "3"
    (box,) = (each for each in page.all("section") if "data-frames" in each)
    frames = json.loads(box["data-frames"])
    assert [frame["step"] for frame in frames] == [100, 200, 300, 400]
    shown = [image["src"] for image in page.all("img") if image.get("class") == "frame"]
    assert shown == frames[-1]["images"] and "Samples: step 400" in page.text, "without scripts too"
    assert len({image for frame in frames for image in frame["images"]}) == 4  # two the same in each
    assert len(page.all("img")) == 3


def curves(page: str) -> dict[str, dict[str, list[float]]]:
    """Heights above the bottom of each line's points, by chart and by the label in its key."""
    found: dict[str, dict[str, list[float]]] = {}
    for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        if title := re.search(r"<h2>(.*?)</h2>", figure):
            labels = dict(re.findall(r'<path fill="none" stroke="(.*?)"[^>]*/></svg>([^<]*)', figure))
            lines = re.findall(r'<polyline fill="none" stroke="(.*?)".*?points="(.*?)"', figure)
            found[html.unescape(title[1])] = {
                html.unescape(labels.get(colour, colour)): [
                    HEIGHT - BOTTOM - float(point.split(",")[1]) for point in points.split()
                ]
                for colour, points in lines
            }
    return found


def test_every_line_has_its_own_name(tmp_path: Path) -> None:
    found = curves(report(make_run(tmp_path / "run"), None).read_text())
    loss, output, quality = (found[title] for title in list(found)[:4] if found[title])
    assert loss["discriminator"] == sorted(loss["discriminator"], reverse=True)  # 1 / i
    assert loss["generator"] == sorted(loss["generator"])
    assert min(output["D(x), real"]) > max(output["D(G(z)), generated"])  # 0.6 and 0.4
    assert quality["two samples"] == sorted(quality["two samples"]) and len(set(quality["nearest other"])) == 1
    assert "Images a second" in found


def test_averaged_pictures_and_those_of_the_latest_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", grids=1)
    Image.new("RGB", (9, 9), "red").save(run / "samples" / "raw-step-000100.png")
    page = assert_alone(report(run, None))
    captions = re.findall(r"<figcaption>([^<]+)</figcaption>", (run / "report.html").read_text())
    assert captions == ["moving average", "latest weights", "real"]
    (frame,) = json.loads(next(each["data-frames"] for each in page.all("section") if "data-frames" in each))
    names = ("step-000100", "raw-step-000100")
    assert frame["images"] == [_embedded(run / "samples" / f"{name}.png") for name in names]


def test_the_summary_has_the_median_rate(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [
        {"step": i, "images": 64 * i, "epoch": i, "images_per_second": rate} for i, rate in ((1, 9), (2, 5), (3, 7))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = assert_alone(report(run, None))
    assert "step 3, images 192, epoch 3.0, 7 images/s (median), no alarms" in page.text


def test_the_summary_counts_the_alarms(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for words in ("1 alarm", "2 alarms"):
        alarm(run, "Try --r1 5")
        assert f"images/s (median), {words}</p>" in report(run, None).read_text()


def test_what_no_chart_can_show_is_left_out_of_it(tmp_path: Path) -> None:
    """Figures that are not finite or as good as that, in lines of another program or of an older version."""
    run = make_run(tmp_path / "run", points=3)
    with open(run / "metrics.jsonl", "a") as file:
        for number in ("NaN", "Infinity", "1e305", "true"):
            file.write(f'\n{{"step": 80, "loss_d": {number}, "loss_g": 1.0}}\n')
    lines = assert_alone(report(run, None)).all("polyline")
    assert [len(line["points"].split()) for line in lines[:2]] == [3, 7]
    assert "nan" not in lines[0]["points"] and "inf" not in lines[0]["points"]


def test_settings_and_the_machine_are_listed(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", channels=None), None).read_text()
    assert "<tr><td>channels</td><td>not set</td></tr>" in page
    assert "<tr><td>data: machine</td><td>a CPU</td></tr>" in page


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", points=5000, grids=150)
    page = assert_alone(report(run, tmp_path / "new" / "page.html"))
    assert all(len(line["points"].split()) <= POINTS for line in page.all("polyline"))
    frames = json.loads(next(each["data-frames"] for each in page.all("section") if "data-frames" in each))
    assert len(frames) == FRAMES and frames[0]["step"] == 100 and frames[-1]["step"] == 15000


def test_what_a_run_folder_says_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", data="<script>alert(1)</script>")
    alarm(run, "</div><script>alert(2)</script>")
    page = assert_alone(report(run, None))
    assert len(page.all("script")) == 1 and "alert(1)" in page.text and "alert(2)" in page.text


def test_a_symlink_out_of_the_folder_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (run / "samples" / "step-000900.png").symlink_to(tmp_path / "secret.png")
    (run / "samples" / "step-000901.png").write_text("no picture")
    page = assert_alone(report(run, None))
    frames = json.loads(next(each["data-frames"] for each in page.all("section") if "data-frames" in each))
    assert [frame["step"] for frame in frames] == [100, 200, 300, 400, 901]
    assert "points out of the run folder" in capsys.readouterr().err


def test_what_is_damaged_is_left_out(tmp_path: Path) -> None:
    """A picture in a way that Pillow's plugin did not expect; lines nested deeper than anyone writes them."""
    run = make_run(tmp_path / "run")
    damaged = run / "samples" / "step-000400.png"
    content = bytearray(damaged.read_bytes())
    content[11] = 0  # the length of its first chunk
    damaged.write_bytes(content)
    assert _embedded(damaged) == "data:,"
    for name in ("metrics", "quality", "alarms"):
        with open(run / f"{name}.jsonl", "a") as file:
            file.write("\n" + "[" * 100_000 + "\n")
    assert_alone(report(run, None))
    assert_alone(compare([run, make_run(tmp_path / "other")], tmp_path / "both.html"))
    (run / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        report(run, None)


def test_a_page_takes_the_place_of_pages_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    metrics = runs[0] / "metrics.jsonl"
    before = metrics.read_bytes()
    for write in (partial(report, runs[0]), partial(compare, runs)):
        with pytest.raises(UserError, match=r"--out .*metrics\.jsonl is not possible: end it in \.html or \.htm"):
            write(metrics)
    assert metrics.read_bytes() == before
    with pytest.raises(UserError, match="is not a run folder"):
        report(tmp_path / "nowhere", tmp_path / "new" / "page.html")
    assert not (tmp_path / "new").exists()
    (runs[1] / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written: it is a folder"):
        report(runs[1], None)


def test_a_page_is_written_to_where_a_link_points(tmp_path: Path) -> None:
    run, page = make_run(tmp_path / "run"), tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    (tmp_path / "link.html").symlink_to(page)
    assert report(run, tmp_path / "link.html") == page
    assert_alone(page)
    (run / "report.html").symlink_to(tmp_path / "mine.txt")
    report(run, None)  # a link in a run folder was made by who made the run, and may point anywhere
    assert not (run / "report.html").is_symlink() and not (tmp_path / "mine.txt").exists()


def test_compare(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", points=20, lr=1e-3)]
    page = assert_alone(compare(runs, tmp_path / "compare.html"))
    assert [len(line["points"].split()) for line in page.all("polyline")][:4] == [30, 20, 30, 20]
    assert "0.001" in page.text and "bce" not in page.text  # only what differs
    assert [each["src"] for each in page.all("img")] == [_embedded(run / "samples" / "step-000400.png") for run in runs]
    assert "one, step 400" in page.text and "two, step 400" in page.text
    keys = re.findall(r'stroke="([^"]*)"[^>]*/></svg>(one|two)', (tmp_path / "compare.html").read_text())
    assert [name for _, name in keys] == ["one", "two"]
    assert [line["stroke"] for line in page.all("polyline")][:4] == 2 * [colour for colour, _ in keys]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """Which alone is no difference between them."""
    runs = [make_run(tmp_path / place / "run", run_dir=f"{place}/run") for place in ("one", "two")]
    page = assert_alone(compare(runs, tmp_path / "compare.html"))
    assert all(page.text.count(str(run)) == 4 for run in runs), "in title, key, table and under a picture"
    assert "run_dir" not in page.text


def test_user_mistakes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, complaint in ((empty, "is not a run folder"), (tmp_path / "nowhere", "is not a run folder")):
        with pytest.raises(UserError, match=complaint):
            report(path, None)
    (empty / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no figures yet"):
        report(empty, None)
    with pytest.raises(UserError, match="2 to 8 run folders, not 1"):
        compare([run], tmp_path / "out.html")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        report(run, None)
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "nowhere")])
    assert end.value.code == 2


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    main(["report", str(one)])
    main(["compare", str(one), str(two), "--out", str(tmp_path / "both.html")])
    assert (one / "report.html").exists() and (tmp_path / "both.html").exists()
    assert "open it in a browser" in capsys.readouterr().err


def test_ticks() -> None:
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 3, 5) == pytest.approx([-2, 0, 2])
    assert ticks(0, 1e6, 6) == pytest.approx([0, 2e5, 4e5, 6e5, 8e5, 1e6])


def test_a_constant_line_and_an_outlier_can_be_drawn() -> None:
    for values in ([0.0, 0.0], [5.0] * 300 + [1e9]):
        text = chart("x", [Series("", 0, list(range(1, len(values) + 1)), values)], [], len(values))
        (points,) = re.findall(r'points="([^"]*)"', text)
        ys = [float(point.split(",")[1]) for point in points.split()]
        assert all(0 <= y <= 240 for y in ys)
        if len(values) > 2:
            assert ys[0] < 120  # the ordinary values have most of the height


def test_points_marks_and_labels_share_their_axes() -> None:
    steps = [0.0, 50.0, 100.0]
    text = chart("x", [Series("", 0, steps, [-1.0, 0.0, 1.0])], [50.0], 100)
    (points,) = re.findall(r'points="([^"]*)"', text)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert (xs[0], xs[2]) == (LEFT, WIDTH - RIGHT) and xs[1] == (xs[0] + xs[2]) / 2
    assert TOP < ys[2] < ys[1] < ys[0] < HEIGHT - BOTTOM and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert re.findall(r'class="alarm" x1="(.*?)" x2="(.*?)"', text) == [(f"{xs[1]:.1f}",) * 2]
    marked = {
        label: (float(x), float(y)) for x, y, label in re.findall(r'<text x="(.*?)" y="(.*?)".*?>(.*?)</text>', text)
    }
    assert [marked[label][1] - 4 for label in ("-1", "1")] == pytest.approx([ys[0], ys[2]], abs=0.11)
    assert [marked[label][0] for label in ("20", "100")] == pytest.approx(
        [LEFT + 0.2 * (xs[2] - LEFT), xs[2]], abs=0.11
    )


def test_a_thinned_line_is_the_means_up_to_its_last_step() -> None:
    steps = [float(step) for step in range(1, 2 * POINTS + 1)]
    series = Series("", 0, steps, [step % 2 for step in steps])
    assert _thinned(series) == [[(step, value) for step in steps[1::2]] for value in (0.5, 0, 1)]
    text = chart("x", [series], [], steps[-1])
    assert "lines are means of up to 2 points; the shade is their range" in text
    heights = {
        name: {p.split(",")[1] for p in points.split()}
        for name, points in re.findall(r"<(polygon|polyline).*?points=\"(.*?)\"", text)
    }
    assert len(heights["polyline"]) == 1 and len(heights["polygon"]) == 2


def test_all_charts_of_a_page_end_at_its_last_step(tmp_path: Path) -> None:
    """Also where losses were lost before that, which is said, and an alarm's mark stands where they were."""
    run = make_run(tmp_path / "run", points=9, grids=1)
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(f'\n{{"step": {step}, "loss_d": null, "loss_g": null, "d_real": 0.5}}' for step in (200, 220))
    alarm(run, "It is lost")
    page = assert_alone(report(run, None))
    loss, output = page.all("polyline")[0], page.all("polyline")[2]
    xs = [[float(point.split(",")[0]) for point in line["points"].split()] for line in (loss, output)]
    assert xs[0] == xs[1][:9] and xs[1][-1] == WIDTH - RIGHT
    marks = {line["x1"] for line in page.all("line") if line["class"] == "alarm"}
    assert marks == {f"{xs[1][9]:.1f}"}, "in every chart in the same place, within it"
    assert "generator: not finite at 2 of 11 points, first at step 200" in page.text


def test_a_short_run_is_compared_at_its_own_values(tmp_path: Path) -> None:
    """Beside a long one its few values are no outliers."""
    runs = [make_run(tmp_path / "long", points=500), make_run(tmp_path / "short", points=2)]
    lines = (runs[1] / "metrics.jsonl").read_text().replace("1000.0", "1900.0")
    (runs[1] / "metrics.jsonl").write_text(lines)
    page = assert_alone(compare(runs, tmp_path / "compare.html"))
    long, short = (line["points"].split() for line in page.all("polyline")[-2:])
    heights = [HEIGHT - BOTTOM - float(points[-1].split(",")[1]) for points in (long, short)]
    assert heights[1] / heights[0] == pytest.approx(1.9, rel=0.01)


def test_what_is_cut_off_is_said() -> None:
    steps = [float(step) for step in range(1, 301)]
    far = chart("x", [Series("loss", 0, steps, [*[5.0] * 299, 1e9])], [], 300)
    assert "loss: goes up to 1e+09, cut off" in far
    below = chart("x", [Series("loss", 0, steps, [*[5.0] * 299, -50.0])], [], 300)
    assert "loss: goes down to -50, cut off" in below
    near = chart("x", [Series("loss", 0, steps, [7.0, *[5.0] * 299])], [], 300)
    assert "cut off" not in near and float(re.findall(r'points="[\d.]+,([\d.]+)', near)[0]) > TOP


def test_lines_differ_without_their_colours_too() -> None:
    assert len({(dashes, width) for _, dashes, width in STYLES}) == len(STYLES)


def test_a_single_point_can_be_seen() -> None:
    (dot,) = re.findall(r'<circle .*?cx="(.*?)"', chart("x", [Series("", 0, [20.0], [1.0])], [], 20))
    assert float(dot) == WIDTH - RIGHT


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    """The slider changes the picture and the step, and the console stays empty."""
    path = report(make_run(tmp_path / "run"), None)
    moved = """<script>
    const slider = document.querySelector("input"), image = document.querySelector("section.grid + section img");
    const before = [document.querySelector("output").value, image.src];
    slider.value = 1; slider.dispatchEvent(new Event("input"));
    const real = document.querySelector("section img:not(.frame)");
    const after = document.querySelector("output").value;
    document.title = [before[0], after, before[1] != image.src, real.src.length > 99].join("|");
    </script></body>"""
    page = tmp_path / "moved.html"
    page.write_text(path.read_text().replace("</body>", moved))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/b")
    done = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>step 400|step 200|true|true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
