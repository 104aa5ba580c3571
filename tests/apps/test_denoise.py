"""`denoise`: nearer to the clean picture than the noisy one, and than a filter that knows no digits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastdcgan.apps.denoise import denoise, denoise_images, wiener
from fastdcgan.apps.distances import psnr
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


def test_outputs_and_report(run, digit_files, tmp_path, capsys):
    denoise_images(run, digit_files, out=tmp_path / "a", sigma=0.1, add_noise=True, restarts=2, steps=40)
    assert Image.open(tmp_path / "a" / "sheet.png").size == (3 * 98 - 2, 20 + 4 * 98 - 2)
    assert capsys.readouterr().out.count("PSNR") == 4
    denoise_images(run, digit_files, out=tmp_path / "b", restarts=2, steps=40)
    assert Image.open(tmp_path / "b" / "sheet.png").size == (2 * 98 - 2, 20 + 4 * 98 - 2)
    assert Image.open(tmp_path / "b" / "digit3.png").size == (16, 16)


@pytest.mark.parametrize("setting", [{"sigma": 0.0}, {"sigma": float("nan")}, {"steps": 0}, {"restarts": 0}])
def test_impossible_settings_are_explained(run, digit_files, tmp_path, setting):
    with pytest.raises(UserError, match="--" + next(iter(setting))):
        denoise_images(run, digit_files, out=tmp_path / "out", **setting)
    with pytest.raises(UserError, match="--clean names 1"):
        denoise_images(run, digit_files, out=tmp_path / "out", clean=digit_files[:1])
    assert not (tmp_path / "out").exists()
