"""Taking noise out of pictures: the nearest picture that the generator can draw, and what is sound of the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.invert import check_search
from fastdcgan.apps.latent import invert
from fastdcgan.apps.pictures import names, read_pictures, save, sheet, to_picture
from fastdcgan.apps.trained import device_of, open_both
from fastdcgan.console import progress, say
from fastdcgan.distances import psnr, ssim
from fastdcgan.errors import UserError
from fastdcgan.files import check_out, printable
from fastdcgan.models import AnyDiscriminator, AnyGenerator

PRIOR = 0.01
WINDOW = 5  # pixels a side, of the Wiener filter


def denoise_images(
    run: Path,
    images: Sequence[Path],
    *,
    out: Path,
    sigma: float = 0.1,
    add_noise: bool = False,
    clean: Sequence[Path] = (),
    restarts: int = 8,
    steps: int = 300,
    seed: int = 0,
    fit: bool = False,
) -> None:
    """Write for each image the denoised one (NAME.png); sheet.png shows (clean,) noisy and denoised side by side.

    Args:
        sigma: standard deviation of the noise; black is 0 and white 1.
        add_noise: the images are clean: add such noise to them first.
        clean: what the images are without noise, in the same order, to measure against.

    Raises:
        UserError: images or a run that cannot be used, or a setting that is not possible.
    """
    check_search(restarts, steps, seed)
    if not 0 < sigma <= 1:
        raise UserError(f"--sigma {sigma:g} is not possible: above 0 and at most 1, where black is 0 and white 1")
    if clean and add_noise:
        raise UserError("--add-noise takes the images themselves as the clean ones: leave --clean out")
    if clean and len(clean) != len(images):
        raise UserError(f"--clean names {len(clean)} pictures for {len(images)} images: give one for each, in order")
    _, generator, discriminator = open_both(run)
    noisy = read_pictures(images, generator, fit)
    truth = noisy if add_noise else read_pictures(clean, generator, fit) if clean else None
    if add_noise:
        noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))
        noisy = (noisy + 2 * sigma * noise).clamp(-1, 1)
    check_out(out)
    named = names(images, out, clean)
    with progress("denoising", steps, "steps") as advance:
        denoised = denoise(
            generator, discriminator, noisy, sigma, restarts=restarts, steps=steps, seed=seed, advance=advance
        )
    lines = []
    for i, name in enumerate(named):
        save(to_picture(denoised[i]), out / f"{name}.png")
        if truth is not None:
            noisy_psnr, filtered, modelled = (psnr(x[i], truth[i]) for x in (noisy, wiener(noisy, 2 * sigma), denoised))
            noisy_ssim, after_ssim = (ssim(x[i : i + 1], truth[i : i + 1]).item() for x in (noisy, denoised))
            lines.append(
                f"{printable(name)}: PSNR {noisy_psnr:.1f} -> {modelled:.1f} dB (a filter alone: {filtered:.1f}),"
                f" SSIM {noisy_ssim:.2f} -> {after_ssim:.2f}"
            )
    columns = {} if truth is None else {"clean": truth}
    columns |= {"noisy": noisy, "denoised": denoised}
    save(sheet(list(zip(*columns.values(), strict=True)), list(columns)), out / "sheet.png")
    say(f"{'noisy' if truth is None else 'clean, noisy'}, denoised: {printable(out / 'sheet.png')}")
    for line in lines:  # last: standard output may be full
        print(line)


def denoise(
    generator: AnyGenerator,
    discriminator: AnyDiscriminator,
    noisy: Tensor,
    sigma: float,
    *,
    restarts: int = 8,
    steps: int = 300,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """The nearest pictures of the generator plus the Wiener-filtered rest.

    The pictures are found with Huber's loss, which grows linearly for differences above the noise, so that dead
    pixels do not count much. What they miss of the images is filtered by `wiener` and added: where the generator
    fits, the rest is noise and nothing comes back; where it does not, the image's own detail stays.

    Args:
        noisy: (N, C, H, W) in -1..1.
        sigma: standard deviation of the noise, on the scale where black is 0 and white 1.

    Returns:
        (N, C, H, W) in -1..1, on the CPU.
    """
    target = noisy.to(device_of(generator))

    def robust_loss(pictures: Tensor, which: Tensor) -> Tensor:
        return F.huber_loss(pictures, target[which], reduction="none", delta=2 * sigma).flatten(1).mean(1)

    found = invert(
        generator,
        discriminator,
        robust_loss,
        len(noisy),
        restarts=restarts,
        steps=steps,
        prior=PRIOR * min(1.0, 2 * sigma),
        seed=seed,
        advance=advance,
    ).pictures.cpu()
    return (found + wiener(noisy - found, 2 * sigma)).clamp(-1, 1)


def wiener(images: Tensor, sigma: float) -> Tensor:
    """Wiener's filter with local statistics (Lee 1980): each pixel moves to its window's mean as far as noise explains.

    Args:
        images: (N, C, H, W).
        sigma: standard deviation of the noise, on the images' scale.
    """
    mean, square = (_window_mean(x) for x in (images, images.square()))
    variance = (square - mean.square()).clamp(min=1e-12)
    return mean + (1 - sigma**2 / variance).clamp(min=0) * (images - mean)


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, [WINDOW // 2] * 4, mode="reflect"), WINDOW, stride=1)
