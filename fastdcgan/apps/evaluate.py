"""How good a run's pictures are, beside real images measured the same way."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.features import activations, untrained
from fastdcgan.apps.image_sets import batches, circumstances, open_images, pictures_of, shuffled
from fastdcgan.apps.latent import BATCH, generate, latents
from fastdcgan.apps.neighbours import nearest_images, prdc
from fastdcgan.apps.pictures import save, sheet
from fastdcgan.apps.trained import device_of, fingerprint, open_both
from fastdcgan.console import progress, say, spinner
from fastdcgan.distances import ms_ssim_diversity, sliced_wasserstein
from fastdcgan.errors import UserError, check_at_least, check_seeds, first_line
from fastdcgan.files import check_out, printable
from fastdcgan.models import AnyDiscriminator
from fastdcgan.pixels import to_uint8
from fastdcgan.processor import choose_device

ROWS, COLUMNS = 5, 6  # of the two sets of pictures beside each other
FEWEST = 32


def evaluate(
    run: Path,
    *,
    data: str,
    out: Path,
    images: int = 2000,
    features: Path | None = None,
    fid: bool = False,
    inception_weights: Path | None = None,
    seed: int = 0,
    ema: bool = True,
) -> None:
    """Write the measurements as JSON, draw real and generated pictures side by side, and generated ones beside the
    nearest of the whole set, and print the measurements as a table.

    Args:
        data: real images, as in `fastdcgan train`.
        images: real ones, and as many generated ones; at most half of `data`, as the other half is
            measured beside them.
        features: a run whose discriminator's features are compared for precision and recall; by default those of an
            untrained one (Naeem et al. 2020, section 4), with the same weights for all networks of one shape and
            BatchNorm's statistics of the real images. A run's own discriminator is partial: it has learned to keep
            generated pictures apart from real ones.
        fid: also FID, KID and inception score, with torch-fidelity.
        inception_weights: file of the Inception network for `fid`; by default torch-fidelity fetches it.
        seed: of the generated pictures and of which real images are taken.

    Raises:
        UserError: data, runs or settings that cannot be used; --fid where torch-fidelity is not installed.
    """
    check_at_least("--images", images, FEWEST)
    check_seeds(seed, "--images", images)
    if inception_weights is not None and not inception_weights.is_file():
        raise UserError(f"--inception-weights {inception_weights} does not exist: leave it out to fetch the usual file")
    if fid and importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("--fid needs torch-fidelity: pip install torch-fidelity, or leave --fid out")
    run_found, generator, discriminator = open_both(run, ema)
    judge = None if features is None else open_both(features)[2]
    if judge is not None and (judge.image_size, judge.channels) != (generator.image_size, generator.channels):
        raise UserError(f"--features {features} was trained at another size or number of channels than {run}")
    shown, twins = (out.parent / f"{out.stem}{end}.png" for end in ("", "-nearest"))
    check_out(out, (".json",), pictures_of(data, [shown, twins]), [shown, twins])
    set_ = open_images(data, generator)
    count = min(images, set_.count // 2)
    if count < FEWEST:
        raise UserError(f"{data} has {set_.count} usable images: at least {2 * FEWEST} are needed to compare with")
    order = shuffled(set_.count, seed)
    real = torch.cat(list(batches(set_, order[:count])))
    if (real == real[:1]).all():
        raise UserError(f"the {count} images taken from {data} are all the same: give real images that differ")
    if judge is None:
        judge = untrained(discriminator, real[:BATCH])
    other = torch.cat(list(batches(set_, order[count : 2 * count])))
    parts = []
    with progress("sampling", count, "images") as advance:
        for first in range(0, count, BATCH):
            seeds = range(seed + first, seed + min(first + BATCH, count))
            parts.append(generate(generator, latents(seeds, generator.latent_dim)).cpu())
            advance(len(seeds))
    fake = torch.cat(parts)
    sets = {"generated": fake, "other real images": other}
    inception: dict[str, dict[str, float]] = {}
    if fid:  # first, because it may fail
        with spinner(f"looking at {3 * count:,} pictures with the Inception network"):
            inception = inception_scores(real, sets, inception_weights)
    with spinner(f"comparing {count:,} generated pictures with as many real ones"):
        results = {name: measure(real, images, judge, seed) | inception.get(name, {}) for name, images in sets.items()}
    report = {
        "run": str(run),
        "step": run_found.step,
        "ema": ema,
        "weights": fingerprint(generator),
        "data": data,
        "images": count,
        "features": "untrained" if features is None else str(features),
        "results": results,
        **circumstances(device_of(generator)),
    }
    save((json.dumps(report, indent=1) + "\n").encode(), out)
    drawn = fake[: ROWS * COLUMNS]
    save(side_by_side({"real": real, "generated": drawn}), shown)
    say(f"{printable(out)}; real and generated pictures: {printable(shown)}")
    with progress("looking for the nearest", set_.count, "images") as advance:
        near = nearest_images(drawn, counting(batches(set_, list(range(set_.count))), advance))
    heading = f"nearest of all {set_.count:,} real ones, in the same places"
    save(side_by_side({"generated": drawn, heading: near}), twins)
    say(f"generated pictures and the nearest real ones: {printable(twins)}")
    print(table(results))  # last: standard output may be full


def counting(parts: Iterable[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
    """The parts one by one; `advance` gets the number of images of each once the next is asked for."""
    for part in parts:
        yield part
        advance(len(part))


def side_by_side(sets: dict[str, Tensor]) -> Image.Image:
    """The first pictures of two sets (N, C, H, W), under their names."""
    (left, right), (name, other) = sets.values(), sets
    rows = (slice(first, first + COLUMNS) for first in range(0, ROWS * COLUMNS, COLUMNS))
    return sheet([[*left[row], None, *right[row]] for row in rows], [name, *[""] * COLUMNS, other])


def measure(real: Tensor, fake: Tensor, discriminator: AnyDiscriminator, seed: int = 0) -> dict[str, float]:
    """Everything that needs no pretrained weights, of images (N, C, H, W) in -1..1 against as many real ones.

    Returns:
        swd_<height>: sliced Wasserstein distance x 1,000 at that level of the pyramid, and swd, their mean;
        ms_ssim: mean similarity of random pairs of `fake`;
        precision, recall, density, coverage: in the discriminator's activations.
    """
    levels = {f"swd_{height}": 1000 * value for height, value in sliced_wasserstein(real, fake, seed=seed).items()}
    return {
        **levels,
        "swd": sum(levels.values()) / len(levels),
        "ms_ssim": ms_ssim_diversity(fake, seed=seed),
        **prdc(*features_of(discriminator, real, fake)),
    }


@torch.no_grad()
def described(discriminator: AnyDiscriminator, images: Tensor) -> list[Tensor]:
    """Every stage's activations, averaged to a grid of 2x2: (N, 4 * width of the stage) each, on the CPU."""
    device = device_of(discriminator)
    parts = [
        [F.adaptive_avg_pool2d(each, 2).flatten(1).cpu() for each in activations(discriminator, part.to(device))]
        for part in images.split(BATCH)
    ]
    return [torch.cat(stage) for stage in zip(*parts, strict=True)]


def features_of(discriminator: AnyDiscriminator, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Features of two sets, in which each of the discriminator's stages counts the same: (N, d) and (M, d)."""
    stages = zip(described(discriminator, real), described(discriminator, fake), strict=True)
    # Centred, for distances are computed from products, which would drown them in what all features have in common.
    scaled = [((a - a.mean(0)) / a.std(0).norm(), (b - a.mean(0)) / a.std(0).norm()) for a, b in stages]
    return torch.cat([a for a, _ in scaled], dim=1), torch.cat([b for _, b in scaled], dim=1)


def inception_scores(real: Tensor, sets: dict[str, Tensor], weights: Path | None) -> dict[str, dict[str, float]]:
    """FID, KID and inception score of each set (N, C, H, W) in -1..1 against `real`, through torch-fidelity.

    Raises:
        UserError: the Inception network's weights cannot be had.
    """
    import torch_fidelity

    def as_set(images: Tensor) -> _Listed:
        colour = images[:, :3].expand(-1, 3, -1, -1) if images.shape[1] != 4 else images[:, :3]
        return _Listed(list(to_uint8(colour)))

    scores, reference = {}, as_set(real)
    # The folder keeps what the network says of `real` for the next set. The warning is of more workers than cores.
    with TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore", category=UserWarning):
        for name, images in sets.items():
            try:
                found = torch_fidelity.calculate_metrics(
                    input1=as_set(images),
                    input2=reference,
                    input2_cache_name="real",
                    cache_root=folder,
                    cuda=choose_device("auto").type == "cuda",
                    isc=True,
                    fid=True,
                    kid=True,
                    kid_subset_size=min(1000, len(images)),
                    feature_extractor_weights_path=None if weights is None else str(weights),
                    verbose=False,
                )
            except Exception as error:  # from a network or a file that is not its weights
                raise UserError(
                    f"--fid: the Inception network cannot be loaded ({first_line(error)}); name it with"
                    " --inception-weights"
                ) from error
            scores[name] = {
                "fid": found["frechet_inception_distance"],
                "kid": found["kernel_inception_distance_mean"],
                "inception_score": found["inception_score_mean"],
            }
    return scores


class _Listed(torch.utils.data.Dataset[Tensor]):
    """Images, as torch-fidelity takes them."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each measurement, a column for each set."""
    names = list(results)
    lines = [f"{'':16s}" + "".join(f"{name:>20s}" for name in names)]
    for key in results[names[0]]:
        values = (results[name].get(key) for name in names)
        figures = "".join(f"{value:20.3f}" if value is not None else f"{'':>20s}" for value in values)
        lines.append(f"{key:16s}{figures}  {better(key)} is better")
    return "\n".join(lines)


def better(key: str) -> str:
    """Whether a lower or a higher figure of this measurement is better."""
    return "lower" if key.startswith(("swd", "ms_ssim", "fid", "kid")) else "higher"
