"""`denoise`: nearer to the clean picture than the noisy one, under strong noise also than a filter without digits."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from fastdcgan.apps import denoise as denoise_module
from fastdcgan.apps.denoise import PRIOR, denoise, denoise_images, wiener
from fastdcgan.apps.latent import Inversion
from fastdcgan.apps.pictures import open_picture, save, sheet, to_picture, to_tensor
from fastdcgan.distances import psnr, ssim
from fastdcgan.errors import UserError


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_psnr_rises_over_32_images(networks, digits, sigma):
    clean = digits[:32]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = (clean + 2 * sigma * noise).clamp(-1, 1)
    denoised = denoise(*networks, noisy, sigma, restarts=4, steps=160)
    before, after, filtered = (psnr(x, clean) for x in (noisy, denoised, wiener(noisy, 2 * sigma)))
    print(f"sigma {sigma}: {before:.1f} dB noisy, {after:.1f} denoised, {filtered:.1f} with the filter alone")
    assert after > before + 0.5
    if sigma == 0.2:
        assert after > filtered + 0.5


def test_wiener_takes_noise_away_and_leaves_edges():
    random = torch.Generator().manual_seed(0)
    flat = 0.3 * torch.randn(1, 1, 64, 64, generator=random)
    assert wiener(flat, 0.3).std() < 0.15
    edge = torch.ones(1, 1, 64, 64)
    edge[..., 32:] = -1
    assert (wiener(edge, 0.1) - edge).abs().max() < 0.02


def test_what_the_generator_misses_is_filtered_by_the_noise_there_is(networks, digits, monkeypatch):
    """The noise's deviation is twice as large where black is -1; differences above it count linearly."""
    asked = []

    def found(generator, discriminator, loss, count, **settings):
        asked.append(loss(digits[4:8], torch.arange(4)))
        return Inversion(torch.zeros(4, 100), digits[4:8], torch.zeros(4))

    monkeypatch.setattr(denoise_module, "invert", found)
    noisy = digits[:4]
    result = denoise(*networks, noisy, 0.2)
    assert torch.allclose(result, (digits[4:8] + wiener(noisy - digits[4:8], 0.4)).clamp(-1, 1))
    away = (digits[4:8] - noisy).abs().flatten(1)
    huber = torch.where(away < 0.4, away.square() / 2, 0.4 * (away - 0.2)).mean(1)
    assert torch.allclose(asked[0], huber, atol=1e-6)


def test_pictures_are_saved_where_nothing_can_be_printed(run, digit_files, tmp_path, monkeypatch, full):
    monkeypatch.setattr("sys.stdout", full)
    with pytest.raises(OSError, match="No space left"):
        denoise_images(run, digit_files[:2], out=tmp_path / "out", sigma=0.3, add_noise=True, restarts=1, steps=4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"digit0.png", "digit1.png", "sheet.png"}


def test_outputs_and_report(run, digit_files, tmp_path, capsys):
    denoise_images(run, digit_files, out=tmp_path / "a", sigma=0.1, add_noise=True, restarts=2, steps=40)
    assert Image.open(tmp_path / "a" / "sheet.png").size == (3 * 98 - 2, 20 + 4 * 98 - 2)
    assert capsys.readouterr().out.count("PSNR") == 4
    denoise_images(run, digit_files, out=tmp_path / "b", restarts=2, steps=40)
    assert Image.open(tmp_path / "b" / "sheet.png").size == (2 * 98 - 2, 20 + 4 * 98 - 2)
    assert Image.open(tmp_path / "b" / "digit3.png").size == (16, 16)


@pytest.mark.parametrize(
    "setting", [{"sigma": 0.0}, {"sigma": 1.01}, {"sigma": float("nan")}, {"steps": 0}, {"restarts": 0}]
)
def test_impossible_settings_are_explained(run, digit_files, tmp_path, setting):
    with pytest.raises(UserError, match="--" + next(iter(setting))):
        denoise_images(run, digit_files, out=tmp_path / "out", **setting)
    with pytest.raises(UserError, match="--clean names 1"):
        denoise_images(run, digit_files, out=tmp_path / "out", clean=digit_files[:1])
    assert not (tmp_path / "out").exists()


def test_clean_ones_twice_is_explained(run, digit_files, tmp_path):
    with pytest.raises(UserError, match="leave --clean out"):
        denoise_images(run, digit_files, out=tmp_path / "out", add_noise=True, clean=digit_files)
    assert not (tmp_path / "out").exists()


def test_images_of_another_kind_are_denoised_with_fit(run, tmp_path, capsys):
    Image.new("RGB", (30, 20), "gray").save(tmp_path / "noisy.png")
    Image.new("RGB", (40, 24), "gray").save(tmp_path / "clean.png")
    given = {"clean": [tmp_path / "clean.png"], "out": tmp_path / "out", "restarts": 1, "steps": 4}
    with pytest.raises(UserError, match="--fit"):
        denoise_images(run, [tmp_path / "noisy.png"], **given)
    denoise_images(run, [tmp_path / "noisy.png"], fit=True, **given)
    assert "noisy: PSNR 126.0" in capsys.readouterr().out  # the same grey


FIGURES = r"(\w+): PSNR (.*) -> (.*) dB \(a filter alone: (.*)\), SSIM (.*) -> (.*)"


def test_what_is_printed_is_of_the_noisy_and_the_denoised(run, digits, digit_files, tmp_path, capsys):
    noise = torch.randn(digits[:2].shape, generator=torch.Generator().manual_seed(0))
    noisy_files = [tmp_path / f"noisy{i}.png" for i in range(2)]
    for path, image in zip(noisy_files, (digits[:2] + 0.4 * noise).clamp(-1, 1), strict=True):
        save(to_picture(image), path)
    denoise_images(run, noisy_files, clean=digit_files[:2], sigma=0.2, out=tmp_path / "out", restarts=1, steps=20)
    lines = capsys.readouterr().out.splitlines()
    clean, noisy, denoised = (
        torch.stack([to_tensor(open_picture(path)) for path in paths])
        for paths in (digit_files[:2], noisy_files, [tmp_path / "out" / f"noisy{i}.png" for i in range(2)])
    )
    filtered = wiener(noisy, 0.4)
    for i, line in enumerate(lines):
        name, *figures = re.fullmatch(FIGURES, line).groups()
        expected = [psnr(each[i], clean[i]) for each in (noisy, denoised, filtered)]
        expected += [ssim(each[i : i + 1], clean[i : i + 1]).item() for each in (noisy, denoised)]
        assert name == f"noisy{i}"
        assert [float(figure) for figure in figures] == pytest.approx(expected, abs=0.06)


def test_noise_that_is_added_is_as_strong_as_said_and_of_the_seed(run, tmp_path, capsys, monkeypatch):
    """On grey, where nothing is cut off; 0.1 of the range from black to white is 20 dB."""
    Image.new("L", (16, 16), 128).save(tmp_path / "grey.png")
    shown = []
    monkeypatch.setattr(denoise_module, "sheet", lambda rows, names: shown.append((rows, names)) or sheet(rows, names))
    for seed in (1, 1, 2):
        given = {"out": tmp_path / "out", "sigma": 0.1, "add_noise": True, "seed": seed, "restarts": 1, "steps": 4}
        denoise_images(run, [tmp_path / "grey.png"], **given)
    for line in capsys.readouterr().out.splitlines():
        assert float(re.fullmatch(FIGURES, line)[2]) == pytest.approx(20, abs=0.7)
    assert [names for _, names in shown] == [["clean", "noisy", "denoised"]] * 3
    (clean, first, _), (_, again, _), (_, other, _) = (rows[0] for rows, _ in shown)
    assert clean.std() == 0 and torch.equal(first, again) and not torch.equal(first, other)


def test_noise_does_not_go_beyond_black_and_white(run, tmp_path, monkeypatch):
    """As in any file of a noisy picture: what is measured and denoised is what could have been given."""
    Image.new("L", (16, 16), 250).save(tmp_path / "pale.png")
    shown = []
    monkeypatch.setattr(denoise_module, "sheet", lambda rows, names: shown.append(rows) or sheet(rows, names))
    given = {"sigma": 0.5, "add_noise": True, "restarts": 1, "steps": 4}
    denoise_images(run, [tmp_path / "pale.png"], out=tmp_path / "out", **given)
    ((_, noisy, denoised),) = shown[0]
    assert noisy.amax() == 1 and noisy.amin() == -1
    assert denoised.abs().max() <= 1


def test_the_settings_are_those_of_the_search(run, digit_files, tmp_path, monkeypatch):
    asked = []

    def spy(generator, discriminator, noisy, sigma, **named):
        asked.append({"sigma": sigma, **named})
        return denoise(generator, discriminator, noisy, sigma, **named)

    monkeypatch.setattr(denoise_module, "denoise", spy)
    settings = {"restarts": 1, "steps": 5, "sigma": 0.3, "seed": 3}
    denoise_images(run, digit_files[:1], out=tmp_path / "out", **settings)
    assert asked[0].items() >= settings.items()


@pytest.mark.parametrize("sigma", [0.1, 0.8])
def test_the_search_has_the_settings_and_the_priors_weight_goes_with_the_noise(networks, digits, monkeypatch, sigma):
    """Huber's loss grows with its threshold, up to the largest difference there is in pixels."""
    asked = []

    def found(generator, discriminator, loss, count, **settings):
        asked.append(settings)
        return Inversion(torch.zeros(2, 100), digits[:2], torch.zeros(2))

    monkeypatch.setattr(denoise_module, "invert", found)
    denoise(*networks, digits[:2], sigma, restarts=2, steps=5, seed=3)
    expected = {"restarts": 2, "steps": 5, "seed": 3, "prior": PRIOR * min(1, 2 * sigma)}
    assert asked[0].items() >= expected.items()
