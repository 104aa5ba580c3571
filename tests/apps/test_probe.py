"""`probe`: the features beat raw pixels, which are a fair baseline; the interval is right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.apps import probe as probe_module
from fastdcgan.apps.features import activations
from fastdcgan.apps.probe import bars, choose, classify, pooled_features, probe
from fastdcgan.data import open_dataset
from fastdcgan.errors import UserError


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Digits at 16x16 pixels, moved about by up to three of them: pixels alone tell less than shapes."""
    data = open_dataset("digits", image_size=(16, 16), device=torch.device("cpu"))
    folder, random = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for i, (digit, label) in enumerate(zip(data.take(range(900))[..., 0].numpy(), data.labels, strict=False)):
        (folder / str(label)).mkdir(exist_ok=True)
        page = np.roll(digit, random.integers(-3, 4, 2), (0, 1))
        Image.fromarray(page).save(folder / str(label) / f"{i}.png")
    return folder


@pytest.fixture
def set_of(tmp_path):
    """set_of({"a": 3}): a folder of that many pictures a class."""

    def make(counts):
        for name, count in counts.items():
            (tmp_path / "set" / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (16, 16), i).save(tmp_path / "set" / name / f"{i}.png")
        return str(tmp_path / "set")

    return make


def test_the_features_beat_raw_pixels(run, labelled, tmp_path):
    probe(run, data=str(labelled), out=tmp_path / "probe.json")
    report = json.loads((tmp_path / "probe.json").read_text())
    accuracy = {kind: result["accuracy"] for kind, result in report["results"].items()}
    print(accuracy)
    assert accuracy["discriminator"] > accuracy["raw pixels"] + 0.05
    assert accuracy["raw pixels"] > 2 * report["largest_class"]
    assert report["largest_class"] == pytest.approx(0.1, abs=0.01)
    assert (report["train_images"], report["test_images"]) == (720, 180)
    assert Image.open(tmp_path / "probe.png").size == (640, 170)


def test_held_out_images_are_of_every_class_and_not_trained_on(networks, labelled):
    train, train_numbers, test, test_numbers = choose(str(labelled), None, networks[1], 10_000, seed=0)
    assert train is test and not set(train_numbers) & set(test_numbers)
    assert {train.labels[i] for i in test_numbers} == set(range(10))


def test_few_images_are_of_all_classes_and_no_more_than_asked_for(networks, set_of):
    data = set_of(dict.fromkeys("abcd", 50))
    train, train_numbers, _, test_numbers = choose(data, None, networks[1], 30, seed=0)
    assert len(train_numbers) == len(test_numbers) == 30
    for numbers in (train_numbers, test_numbers):
        assert {train.labels[i] for i in numbers} == set(range(4))


def test_features_are_every_layer_at_4x4(networks, digits):
    found = pooled_features(networks[1])(digits[:3])
    assert found.shape == (3, (16 + 32) * 16)
    first = activations(networks[1], digits[:3])[0]  # of 8x8
    assert torch.equal(found[:, : 16 * 16], torch.nn.functional.max_pool2d(first, 2).flatten(1))


def test_separable_classes_are_separated_and_noise_is_not():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    noise = torch.randn(400, 10, generator=random)
    told = noise.clone()
    told[:, 0] += 8 * labels

    def accuracy(features):
        return classify(features[:200].clone(), labels[:200], features[200:].clone(), labels[200:])["accuracy"]

    assert accuracy(told) > 0.98
    assert 0.35 < accuracy(noise) < 0.65


def test_data_without_classes_is_explained(run, digit_files, labelled, tmp_path):
    with pytest.raises(UserError, match="no classes"):
        probe(run, data=str(digit_files[0].parent), out=tmp_path / "out" / "probe.json")
    with pytest.raises(UserError, match="other classes"):
        other = tmp_path / "other"
        for name in ("a", "b"):
            (other / name).mkdir(parents=True)
            Image.new("L", (16, 16)).save(other / name / "1.png")
        probe(run, data=str(labelled), test_data=str(other), out=tmp_path / "out" / "probe.json")
    assert not (tmp_path / "out" / "probe.json").exists()


def test_another_set_to_measure_on_has_its_own_labels(run, tmp_path):
    """Black and white pictures, which anything can tell apart, in other shares and so in another order."""
    for folder, counts in (("train", (12, 8)), ("test", (3, 10))):
        for name, colour, count in (("black", 0, counts[0]), ("white", 255, counts[1])):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (16, 16), abs(colour - 3 * i)).save(tmp_path / folder / name / f"{i}.png")
    probe(run, data=str(tmp_path / "train"), test_data=str(tmp_path / "test"), out=tmp_path / "probe.json")
    report = json.loads((tmp_path / "probe.json").read_text())
    assert (report["train_images"], report["test_images"], report["classes"]) == (20, 13, ["black", "white"])
    assert report["largest_class"] == pytest.approx(10 / 13), "of the images that are measured on"
    for result in report["results"].values():
        assert result["accuracy"] == 1 and result["interval"] == pytest.approx((0.7719, 1.0), abs=1e-4)


def test_what_was_measured_is_saved_where_it_cannot_be_printed(run, labelled, tmp_path, monkeypatch, full):
    monkeypatch.setattr("sys.stdout", full)
    with pytest.raises(OSError, match="No space left"):
        probe(run, data=str(labelled), out=tmp_path / "probe.json", images=50)
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json", "probe.png"}
    assert len(json.loads((tmp_path / "probe.json").read_text())["results"]) == 3


def test_what_was_measured_is_printed(run, labelled, tmp_path, capsys):
    probe(run, data=str(labelled), out=tmp_path / "probe.json", images=50)
    results = json.loads((tmp_path / "probe.json").read_text())["results"]
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].rstrip() for line in lines] == ["raw pixels", "untrained discriminator", "discriminator"]
    assert [line[24:].split()[0] for line in lines] == [f"{result['accuracy']:.1%}" for result in results.values()]


def test_the_regularisation_that_does_best_is_taken(monkeypatch):
    """Of classifiers that do best at 1 over the number of images; each is judged on images it has not seen."""

    class Fake:
        def __init__(self, C, **_):
            self.c = C

        def fit(self, features, labels):
            self.seen, self.strength = features, self.c * len(features)
            return self

        def score(self, features, labels):
            assert not (self.seen[:, None] == features).all(2).any()
            return 1 - 0.01 * abs(self.strength - 1.0)

    monkeypatch.setattr(probe_module, "LinearSVC", Fake)
    features, labels = torch.randn(130, 3), torch.arange(130) % 2
    assert classify(features[:100], labels[:100], features[100:], labels[100:])["c"] == pytest.approx(1 / 100)


@pytest.mark.parametrize("kind", ["one direction", "twice", "constant"])
def test_features_that_go_together(kind):
    random = torch.Generator().manual_seed(0)
    features = {
        "one direction": torch.rand(200, 1, generator=random) @ torch.rand(1, 1000, generator=random),
        "twice": torch.randn(100, 400, generator=random).repeat(2, 1),
        "constant": torch.zeros(200, 400),
    }[kind]
    found = classify(features, torch.arange(200) % 2, features[:10].clone(), torch.zeros(10).long())
    assert 0 <= found["accuracy"] <= 1


def test_features_that_are_not_finite_are_explained():
    for train, test in ((float("inf"), 0.0), (0.0, float("nan"))):
        with pytest.raises(UserError, match="not finite"):
            classify(torch.full((10, 4), train), torch.arange(10) % 2, torch.full((3, 4), test), torch.zeros(3).long())


def test_one_class_alone_is_explained(run, tmp_path):
    """Of ten images drawn from ten thousand and one; and a part to choose on of one class is no reason to stop."""
    labels = torch.tensor([0] * 9 + [1])
    found = classify(torch.randn(10, 4), labels, torch.randn(3, 4), torch.zeros(3).long())
    assert found["c"] == pytest.approx(0.03)
    for name, count in (("many", 400), ("one", 2)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (16, 16), i % 256).save(tmp_path / "set" / name / f"{i}.png")
    with pytest.raises(UserError, match="of one class: give more --images"):
        probe(run, data=str(tmp_path / "set"), out=tmp_path / "probe.json", images=10)


def test_a_class_of_a_single_image_is_explained(networks, set_of):
    with pytest.raises(UserError, match=r"class lone of .* has a single image: at least 2 are needed"):
        choose(set_of({"many": 10, "lone": 1}), None, networks[1], 100, seed=0)


def test_bars_are_as_long_as_they_say():
    results = {"raw pixels": {"accuracy": 0.25, "interval": (0.2, 0.3)}, "discriminator": {"accuracy": 0.75,
               "interval": (0.7, 0.8)}}  # fmt: skip
    page, left, width = np.asarray(bars(results, largest=0.5)).astype(int), 190, 380
    for row, (colour, share) in enumerate((((0xB0, 0xB8, 0xC4), 0.25), ((0x4C, 0x78, 0xA8), 0.75))):
        (filled,) = np.nonzero((page[15 + 40 * row + 5] == colour).all(1))
        assert (filled.min(), filled.max()) == (left, left + width * share)
        (interval,) = np.nonzero((page[15 + 40 * row + 14, left : left + int(width * share) + 25] == 0).all(1))
        low, high = list(results.values())[row]["interval"]
        assert (interval.min(), interval.max()) == pytest.approx((width * low, width * high), abs=1)
    (largest,) = np.nonzero((page[10] == 0x80).all(1))
    assert largest.tolist() == [left + width * 0.5]
    assert (page[-20:] == 0).all(2).any(), "what the bars and lines are is said below them"


def test_images_are_judged_one_by_one():
    """Whatever else is in the test set: features are scaled by the training images alone."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    features = torch.randn(100, 5, generator=random) + 4 * labels[:, None]
    ones = 4 + torch.randn(30, 5, generator=random)  # all of one class, so with another mean
    assert classify(features, labels, ones, torch.ones(30).long())["accuracy"] > 0.95


def test_the_interval_is_of_whole_images(monkeypatch):
    """29 of 100, although 0.29 * 100 is 28.999999999999996."""

    class Fake:
        def score(self, features, labels):
            return 0.29

    monkeypatch.setattr(probe_module, "svm", lambda *_: Fake())
    labels = torch.arange(100) % 2
    found = classify(torch.randn(100, 3), labels, torch.randn(100, 3), labels)
    assert found["interval"] == pytest.approx((0.2101, 0.3854), abs=1e-4)
