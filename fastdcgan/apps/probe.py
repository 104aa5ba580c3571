"""How much the discriminator has learned to see: a linear classifier on its features (Radford et al. 2016, 5.1)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import binomtest
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.features import activations, untrained
from fastdcgan.apps.image_sets import BATCH, circumstances, open_images, pictures_of, shuffled
from fastdcgan.apps.pictures import save
from fastdcgan.apps.trained import device_of, open_both
from fastdcgan.console import progress, say
from fastdcgan.data import Dataset
from fastdcgan.errors import UserError, check_at_least, check_seed
from fastdcgan.files import check_out, printable
from fastdcgan.models import AnyDiscriminator
from fastdcgan.pixels import to_floats

POOLED = 4  # the grid every layer is max-pooled to
HELD_OUT = 0.2  # of each class, where there is no test set
CHOICE = 2500  # images at most that the SVM's regularisation is chosen on
STRENGTHS = (0.1, 0.3, 1.0)  # of the loss against the regularisation: c times the number of images
TOLERANCE = 0.1  # of the solver; a smaller one takes longer and changes the accuracy by a tenth of a percent


def probe(run: Path, *, data: str, test_data: str | None = None, out: Path, images: int = 5000, seed: int = 0) -> None:
    """Write the accuracy on labelled images, beside its baselines, as JSON and as a picture of bars, and print it.

    The simplest of the baselines is the share of the test images that the largest class has.

    Args:
        data: images in one folder a class, or a named set; labels are the folders' names.
        test_data: another such set to measure on; by default a fifth of each class of `data`.
        images: to train the classifier on, and to measure it on, at most.
        seed: of which ones.

    Raises:
        UserError: data without classes, or too little of more than one, or a run that cannot be used.
    """
    check_at_least("--images", images, 10)
    check_seed(seed)
    run_found, _, discriminator = open_both(run)
    picture = out.parent / f"{out.stem}.png"
    reads = [path for each in (data, test_data) if each is not None for path in pictures_of(each, [picture])]
    check_out(out, (".json",), reads, [picture])
    train, train_numbers, test, test_numbers = choose(data, test_data, discriminator, images, seed)
    labels = torch.tensor(train.labels)[train_numbers], torch.tensor(test.labels)[test_numbers]
    if len(labels[0].unique()) < 2:
        raise UserError(f"the {len(train_numbers)} images of {data} to train on are of one class: give more --images")
    total = len(train_numbers) + len(test_numbers)
    with progress("reading", total, "images") as advance:
        pixels = [read(*each, advance) for each in ((train, train_numbers), (test, test_numbers))]
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "raw pixels": lambda x: x.flatten(1),
        "untrained discriminator": pooled_features(untrained(discriminator, to_floats(pixels[0][:BATCH]))),
        "discriminator": pooled_features(discriminator),
    }
    results: dict[str, Any] = {}
    for kind, describe in kinds.items():
        with progress(kind, total, "images") as advance:
            features = [extract(describe, images, device_of(discriminator), advance) for images in pixels]
        results[kind] = classify(features[0], labels[0], features[1], labels[1])
    largest = labels[1].bincount().max().item() / len(labels[1])
    report = {
        "run": str(run),
        "step": run_found.step,
        "data": data,
        "test_data": test_data,
        "classes": train.class_names,
        "largest_class": largest,
        "train_images": len(train_numbers),
        "test_images": len(test_numbers),
        "results": results,
        **circumstances(device_of(discriminator)),
    }
    save((json.dumps(report, indent=1) + "\n").encode(), out)
    save(bars(results, largest), picture)
    say(f"accuracy with its baselines: {printable(out)} and {printable(picture)}")
    for kind, result in results.items():  # last: standard output may be full
        low, high = result["interval"]
        print(f"{kind:24s} {result['accuracy']:6.1%}  (95%: {low:.1%} to {high:.1%})")


def choose(
    data: str, test_data: str | None, discriminator: AnyDiscriminator, images: int, seed: int
) -> tuple[Dataset, list[int], Dataset, list[int]]:
    """(training set, numbers of images in it, test set, numbers of images in it).

    Raises:
        UserError: a set without labels, or test data with other classes.
    """
    train = open_images(data, discriminator)
    labels, names = _labelled(train, data)
    order = shuffled(train.count, seed)
    if test_data is not None:
        test = open_images(test_data, discriminator)
        _, test_names = _labelled(test, test_data)
        if test_names != names:
            odd = sorted(set(test_names) ^ set(names))[:3]
            raise UserError(
                f"--test-data {test_data} has other classes than {data} ({', '.join(odd)}): make them the same"
            )
        return train, order[:images], test, shuffled(test.count, seed)[:images]
    kept: list[int] = []
    for label in range(len(names)):
        members = [i for i in order if labels[i] == label]
        cut = max(1, round(HELD_OUT * len(members)))
        if len(members) < 2:
            raise UserError(f"class {names[label]} of {data} has a single image: at least 2 are needed")
        kept += members[cut:]
    in_kept = set(kept)
    mixed = [i for i in order if i in in_kept], [i for i in order if i not in in_kept]
    return train, mixed[0][:images], train, mixed[1][:images]


def _labelled(data: Dataset, name: str) -> tuple[list[int], list[str]]:
    if data.labels is None or data.class_names is None or len(data.class_names) < 2:
        raise UserError(f"{name} has no classes: put the images of each class in a folder of its own")
    return data.labels, data.class_names


def pooled_features(discriminator: AnyDiscriminator) -> Callable[[Tensor], Tensor]:
    """A function from images (N, C, H, W) to every layer's activations, max-pooled to 4x4 and flattened: (N, d)."""
    return lambda images: torch.cat(
        [F.adaptive_max_pool2d(each, POOLED).flatten(1) for each in activations(discriminator, images)], dim=1
    )


def read(data: Dataset, numbers: list[int], advance: Callable[[int], None]) -> Tensor:
    """The images with these numbers, uint8 (n, C, H, W), on the CPU."""
    parts = []
    for first in range(0, len(numbers), BATCH):
        parts.append(data.take(numbers[first : first + BATCH]).permute(0, 3, 1, 2))
        advance(len(parts[-1]))
    return torch.cat(parts)


@torch.no_grad()
def extract(
    describe: Callable[[Tensor], Tensor], pixels: Tensor, device: torch.device, advance: Callable[[int], None]
) -> Tensor:
    """The features of images, uint8 (n, C, H, W), on the device: (n, d)."""
    parts = []
    for images in pixels.split(BATCH):
        parts.append(describe(to_floats(images.to(device))))
        advance(len(images))
    return torch.cat(parts)


def classify(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, Any]:
    """Accuracy of a linear SVM (Tang 2013's L2-SVM), its regularisation chosen on a part of the training images.

    Args:
        train, test: features (N, d), changed in place: each is brought to mean 0 and variance 1 over `train`.
        train_labels, test_labels: int64 (N,).

    Returns:
        accuracy and its 95% interval (Wilson 1927), the strength chosen, the number of features.

    Raises:
        UserError: features that are not finite.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        raise UserError("the features are not finite, so no classifier can be trained on them: take another checkpoint")
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    for features in (train, test):
        features.sub_(mean).div_(deviation)
    seen, unseen, labels = train.cpu().numpy(), test.cpu().numpy(), train_labels.numpy()

    few = min(CHOICE, len(seen))
    cut = few * 4 // 5
    best = STRENGTHS[1]
    if len(np.unique(labels[:cut])) > 1:  # nearly always
        accuracies = [
            svm(seen[:cut], labels[:cut], strength).score(seen[cut:few], labels[cut:few]) for strength in STRENGTHS
        ]
        best = STRENGTHS[int(np.argmax(accuracies))]
    accuracy = svm(seen, labels, best).score(unseen, test_labels.numpy())
    right = binomtest(round(accuracy * len(test)), len(test))
    return {
        "accuracy": accuracy,
        "interval": tuple(right.proportion_ci(method="wilson")),
        "features": train.shape[1],
        "c": best / len(train),
    }


def svm(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> LinearSVC:
    """Trained on features (N, d), with one class against the others; in the dual, as there are many features."""
    machine = LinearSVC(C=strength / len(features), dual=True, tol=TOLERANCE, random_state=0)
    return machine.fit(features, labels)


def bars(results: dict[str, Any], largest: float) -> Image.Image:
    """The accuracies as horizontal bars with their intervals; a grey line at the accuracy of always naming the
    largest class."""
    font = ImageFont.load_default(14)
    page = Image.new("RGB", (640, 50 + 40 * len(results)), "white")
    draw = ImageDraw.Draw(page)
    left, width = 190, 380
    for i, (kind, result) in enumerate(results.items()):
        y, (low, high) = 15 + 40 * i, result["interval"]
        draw.text((left - 8, y + 14), kind, "black", font, anchor="rm")
        draw.rectangle(
            (left, y, left + width * result["accuracy"], y + 28), "#4c78a8" if kind == "discriminator" else "#b0b8c4"
        )
        draw.line((left + width * low, y + 14, left + width * high, y + 14), "black", 2)
        draw.text((left + width * high + 8, y + 14), f"{result['accuracy']:.1%}", "black", font, anchor="lm")
    x = left + width * largest
    draw.line((x, 8, x, page.height - 42), "#808080", 1)
    draw.text((x, page.height - 40), "largest class", "#808080", font, anchor="ma")
    draw.text((left, page.height - 20), "accuracy, and its 95% interval", "black", font, anchor="la")
    return page
