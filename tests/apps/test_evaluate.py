"""`evaluate`: a trained generator ranks above an untrained one; each distance does what its name says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d

from fastdcgan import distances
from fastdcgan.apps import evaluate as evaluate_module
from fastdcgan.apps.evaluate import evaluate, features_of, inception_scores, measure, side_by_side, table
from fastdcgan.apps.export import export
from fastdcgan.apps.features import untrained as fresh_discriminator
from fastdcgan.apps.image_sets import shuffled
from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.neighbours import _reach, nearest_images, prdc
from fastdcgan.apps.pictures import save, to_picture
from fastdcgan.data import open_dataset
from fastdcgan.distances import (
    _ssim_parts,
    laplacian_pyramid,
    ms_ssim,
    ms_ssim_diversity,
    psnr,
    sliced_wasserstein,
    ssim,
)
from fastdcgan.errors import UserError
from fastdcgan.models import Discriminator, Generator
from fastdcgan.pixels import to_uint8


def test_trained_ranks_above_untrained(networks):
    generator, discriminator = networks
    data = open_dataset("digits", image_size=(16, 16), device=torch.device("cpu"))
    real = data.take(range(300)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.manual_seed(0)
    untrained = Generator(16, 1, 100, 16).eval()
    judge = fresh_discriminator(discriminator, real)
    good, bad = (measure(real, generate(g, latents(range(300), 100)), judge) for g in (generator, untrained))
    print(good, bad, sep="\n")
    assert good["swd"] < 0.6 * bad["swd"]
    assert good["ms_ssim"] < bad["ms_ssim"] - 0.1
    for name in ("precision", "density", "coverage"):
        assert good[name] > bad[name], name


def test_outputs(run, tmp_path):
    evaluate(run, data="digits", images=64, out=tmp_path / "e.json")
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["images"] == 64 and report["step"] == 400
    assert report["results"]["other real images"]["precision"] > 0.3
    for name in ("e.png", "e-nearest.png"):
        assert Image.open(tmp_path / name).size == (13 * 98 - 2, 20 + 5 * 98 - 2)


def test_a_small_set_is_compared_with_half_of_itself(run, digits, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i, image in enumerate(digits):
        save(to_picture(image), folder / f"{i}.png")
    evaluate(run, data=str(folder), out=tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 32
    (folder / "0.png").unlink()
    with pytest.raises(UserError, match="has 63 usable images: at least 64 are needed"):
        evaluate(run, data=str(folder), out=tmp_path / "e.json")


def images(count, size, seed=0, channels=3):
    noise = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1) * 4 - 2


def test_one_picture_over_and_over_is_nothing_to_compare_with(run, digits, tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(64):
        save(to_picture(digits[0]), tmp_path / "set" / f"{i}.png")
    with pytest.raises(UserError, match="the 32 images taken from"):
        evaluate(run, data=str(tmp_path / "set"), out=tmp_path / "e.json")
    assert not (tmp_path / "e.json").exists()


def test_sliced_wasserstein_is_small_for_one_distribution_and_finds_blur_at_the_fine_level():
    a, b = images(200, 32), images(200, 32, seed=1)
    same = sliced_wasserstein(a, b)
    assert list(same) == [32, 16]
    blurred = sliced_wasserstein(a, torch.nn.functional.avg_pool2d(b, 5, 1, 2))
    assert blurred[32] > 2 * same[32]
    assert sliced_wasserstein(a, b) == same  # the seed decides
    as_bytes = sliced_wasserstein(((a.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), b.clamp(-1, 1))
    assert as_bytes[16] == pytest.approx(sliced_wasserstein(a.clamp(-1, 1), b.clamp(-1, 1))[16], rel=0.05)


def test_a_scale_and_an_offset_do_not_count_in_the_sliced_wasserstein_distance():
    """Each channel is normalised over its set. Patches of 7x7 of images of 7x7 are the whole image in both sets."""
    a = images(50, 7, channels=2)
    moved = a * torch.tensor([0.5, 3.0])[:, None, None] + torch.tensor([0.1, -0.2])[:, None, None]
    assert sliced_wasserstein(a, moved)[7] < 1e-5
    assert sliced_wasserstein(a, images(50, 7, 5, 2))[7] > 0.01


def test_what_no_picture_shows_does_not_count_in_the_sliced_wasserstein_distance():
    """Transparency that hardly varies; where it varies in one set, or by more than a step of 255, it counts."""
    a, b = images(60, 16), images(60, 16, seed=1)
    opaque = torch.ones(60, 1, 16, 16)

    def distance(alpha, other):
        return sliced_wasserstein(torch.cat([a, alpha], 1), torch.cat([b, other], 1))[16]

    noise = images(60, 16, 3, channels=1)
    same = distance(opaque, opaque)
    assert distance(opaque, opaque - 1e-3 * noise.abs()) == pytest.approx(same, rel=0.01)
    assert distance(opaque, opaque - 0.1 * noise.abs()) > 1.5 * same
    assert distance(opaque - 0.1 * noise, opaque - 0.1 * noise.flip(0)) == pytest.approx(
        distance(opaque - 0.2 * noise, opaque - 0.2 * noise.flip(0)), rel=1e-3
    )


def test_absolute_a_scale_and_an_offset_count_in_the_sliced_wasserstein_distance():
    """In units of the second set; where that one is even, as opaque pictures' alpha is, as they are."""
    a = images(50, 7, channels=2)

    def distance(moved):
        return sliced_wasserstein(moved, a, absolute=True)[7]

    assert distance(a) < 1e-5
    assert distance(3 * a) == pytest.approx(2 * distance(2 * a), rel=1e-3) and distance(2 * a) > 0.3
    assert distance(a + 0.5 * a.std()) > 0.2
    even, noise = torch.ones(50, 1, 7, 7), images(50, 7, 3, channels=1)
    apart = sliced_wasserstein(even + 0.1 * noise, even, absolute=True)[7]
    assert sliced_wasserstein(even + 0.2 * noise, even, absolute=True)[7] == pytest.approx(2 * apart) and apart < 0.1


def test_of_unequal_sets_the_first_of_the_larger_count():
    a, b = images(40, 16), images(60, 16, seed=1)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b[:40])
    assert sliced_wasserstein(b, a) == sliced_wasserstein(b[:40], a)


def test_distances_between_oblong_pictures():
    for turn in (False, True):
        a, b = (images(40, 32, seed)[..., :16] for seed in (0, 1))
        a, b = (a.mT, b.mT) if turn else (a, b)
        assert list(sliced_wasserstein(a, b)) == [a.shape[2]]


def test_a_laplacian_pyramid_ends_at_16_and_is_flat_where_the_image_is():
    x = images(2, 64)
    levels = laplacian_pyramid(x)
    assert [level.shape[2] for level in levels] == [64, 32, 16]
    flat = laplacian_pyramid(torch.full((1, 1, 64, 64), 0.5))
    assert flat[0][..., 4:-4, 4:-4].abs().max() < 1e-6 and torch.allclose(flat[-1], torch.tensor(0.5))


def test_similarities():
    a, b = images(8, 64).clamp(-1, 1), images(8, 64, seed=1).clamp(-1, 1)
    assert torch.allclose(ms_ssim(a, a), torch.ones(8), atol=1e-5) and torch.allclose(
        ssim(a, a), torch.ones(8), atol=1e-5
    )
    assert ssim(a, b).max() < 0.3
    slightly = a + 0.05 * b
    assert (ssim(a, slightly) > ssim(a, a + 0.3 * b)).all()
    assert ms_ssim_diversity(a[:1].expand(8, -1, -1, -1)) == pytest.approx(1, abs=1e-4)
    assert ms_ssim_diversity(torch.cat([a, b])) < 0.4
    assert psnr(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20)


@pytest.mark.parametrize("similarity", [ssim, ms_ssim])
def test_oblong_pictures_are_as_alike_as_turned(similarity):
    a = images(4, 64)[..., :40].clamp(-1, 1)
    b = (a + 0.3 * images(4, 64, seed=1)[..., :40]).clamp(-1, 1)
    assert torch.allclose(similarity(a, b), similarity(a.mT, b.mT), atol=1e-5)


def test_ssim_agrees_with_its_formula_on_constants():
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.25)
    # In 0..255 these are 191.25 and 95.625, and c1 is (0.01 * 255)^2.
    assert ssim(a, b).item() == pytest.approx((2 * 191.25 * 95.625 + 6.5) / (191.25**2 + 95.625**2 + 6.5), abs=1e-4)


def test_ssim_agrees_with_its_formula_in_one_window():
    """Of 11x11 pixels with a deviation of 1.5, by the formula of Wang et al. in 0..255, where c2 is (0.03 * 255)^2."""
    a = 0.05 * images(1, 11, channels=1)  # so pale that c2 counts
    b = a + 0.03 * images(1, 11, seed=1, channels=1)
    away = torch.arange(11) - 5.0
    window = torch.exp(-(away[:, None] ** 2 + away**2) / (2 * 1.5**2)).double()
    window /= window.sum()
    x, y = ((image[0, 0].double() + 1) * 127.5 for image in (a, b))
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    var_x, var_y = ((window * (each - mean) ** 2).sum() for each, mean in ((x, mean_x), (y, mean_y)))
    covariance = (window * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert ssim(a, b).item() == pytest.approx(expected.item(), abs=1e-4)


def test_one_picture_in_many_brightnesses_is_one_picture():
    picture = images(1, 64).clamp(-0.9, 0.9)
    shades = picture + torch.linspace(-0.05, 0.05, 8)[:, None, None, None]
    assert ms_ssim_diversity(shades) > 0.99


def test_precision_and_recall_tell_collapse_from_noise():
    random = torch.Generator().manual_seed(0)
    real = torch.randn(400, 4, generator=random)
    same = prdc(real, torch.randn(400, 4, generator=random))
    assert min(same.values()) > 0.7 and same["density"] == pytest.approx(1, abs=0.2)
    collapsed = prdc(real, 0.01 * torch.randn(400, 4, generator=random))
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.2
    far = prdc(real, 3 * torch.randn(400, 4, generator=random))
    assert far["precision"] < 0.5 and far["recall"] > 0.8


def test_surroundings_are_of_five_neighbours():
    """As in the papers, where nothing else is said."""
    real, fake = torch.randn(50, 4), torch.randn(50, 4)
    assert prdc(real, fake) == prdc(real, fake, k=5) != prdc(real, fake, k=4)


def test_the_nearest_real_images_are_found():
    real = torch.rand(20, 3, 8, 8)
    near = nearest_images(real[[7, 3, 19]] + 0.01 * torch.randn(3, 3, 8, 8), real.split(6))
    assert torch.equal(near, real[[7, 3, 19]])


def test_the_nearest_of_bright_images_is_found():
    bright = 1 - 1e-3 * torch.rand(60, 3, 32, 32)
    assert torch.equal(nearest_images(bright, [bright]), bright)


def test_a_copy_of_any_real_image_is_shown_beside_it(run, tmp_path, monkeypatch):
    """Whichever half of the set it is in, or neither."""
    data = open_dataset("digits", image_size=(16, 16), device=torch.device("cpu"))
    copies = data.take(range(0, 1797, 60)).permute(0, 3, 1, 2) / 127.5 - 1
    monkeypatch.setattr(evaluate_module, "generate", lambda _, z: copies.repeat(2, 1, 1, 1)[: len(z)])
    evaluate(run, data="digits", images=40, out=tmp_path / "e.json")
    shown = np.asarray(Image.open(tmp_path / "e-nearest.png"))[20:]
    assert np.array_equal(shown[:, : 6 * 98 - 2], shown[:, 7 * 98 :])


def test_features_of_pale_pictures_are_as_exact_as_of_others(networks):
    data = open_dataset("digits", image_size=(16, 16), device=torch.device("cpu"))
    pale = 0.9 + 0.02 * (data.take(range(200)).permute(0, 3, 1, 2) / 127.5 - 1)
    features, _ = features_of(fresh_discriminator(networks[1], pale), pale[:100], pale[100:])
    exact = torch.cdist(features.double(), features.double())
    assert (torch.cdist(features, features) - exact).abs().max() < 0.01 * exact.max()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random ones, for the real ones cannot be had everywhere: distances in random features are distances too."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    for weight in network.parameters():
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight)  # torch's own would let the signal die away
    torch.save(network.state_dict(), path)
    return path


def test_inception_scores_rank_sets(inception_weights):
    real = images(24, 16)
    near, far = (real + 0.1 * images(24, 16, seed=1)).clamp(-1, 1), images(24, 16, seed=2).clamp(-0.1, 0.1)
    scores = inception_scores(real, {"near": near, "far": far}, inception_weights)
    print(scores)
    assert 0 < 10 * scores["near"]["fid"] < scores["far"]["fid"]
    assert 10 * abs(scores["near"]["kid"]) < scores["far"]["kid"]
    assert all(score["inception_score"] >= 1 for score in scores.values())


def test_a_file_without_the_inception_network_is_explained(run, tmp_path):
    (tmp_path / "wrong.pth").write_text("not weights")
    with pytest.raises(UserError, match="name it with --inception-weights"):
        evaluate(
            run, data="digits", out=tmp_path / "e.json", images=32, fid=True, inception_weights=tmp_path / "wrong.pth"
        )
    assert not (tmp_path / "e.json").exists()


def test_impossible_settings_are_explained(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cases = [
        ({"images": 5}, "--images 5"),
        ({"fid": True}, "pip install torch-fidelity"),
        ({"fid": True, "inception_weights": tmp_path / "absent.pth"}, "--inception-weights"),
    ]
    for setting, complaint in cases:
        with pytest.raises(UserError, match=complaint):
            evaluate(run, data="digits", out=tmp_path / "e.json", **setting)
    assert not list(tmp_path.iterdir())


def test_features_of_other_channels_are_refused(run, tmp_path, monkeypatch):
    open_both, colour = evaluate_module.open_both, Discriminator(16, 3, 8)
    monkeypatch.setattr(
        evaluate_module,
        "open_both",
        lambda path, ema=True: (None, None, colour) if path != run else open_both(path, ema),
    )
    with pytest.raises(UserError, match="--features other was trained at another size or number of channels"):
        evaluate(run, data="digits", images=32, out=tmp_path / "e.json", features=Path("other"))
    assert not (tmp_path / "e.json").exists()


def test_multi_scale_similarity_weighs_its_scales():
    """Two scales at 32 pixels: contrast and structure of the fine one, all of SSIM of the coarse one (Wang et al.)."""
    a, b = images(4, 32).clamp(-1, 1), images(4, 32, seed=1).clamp(-1, 1)
    b = (a + 0.3 * b).clamp(-1, 1)
    fine, coarse = _ssim_parts(a, b)[1].flatten(1).mean(1), ssim(avg_pool2d(a, 2), avg_pool2d(b, 2))
    first, second = 0.0448 / (0.0448 + 0.2856), 0.2856 / (0.0448 + 0.2856)
    assert torch.allclose(ms_ssim(a, b), fine**first * coarse**second, atol=1e-6)
    assert torch.allclose(ms_ssim(a[..., :16, :16], b[..., :16, :16]), ssim(a[..., :16, :16], b[..., :16, :16]))


def test_a_distance_is_the_mean_over_sorted_projections(monkeypatch):
    """In one dimension, where a direction is 1 or -1: 0, 1, 2 and 5, 1, 0 are 0, 0 and 3 apart."""
    described = iter([torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [1.0], [0.0]])])
    monkeypatch.setattr(distances, "_normalised", lambda *_: next(described))
    assert sliced_wasserstein(images(3, 16), images(3, 16)) == {16: pytest.approx(1.0)}


def test_the_diversity_is_of_different_pictures():
    two = images(2, 16).clamp(-1, 1)
    assert ms_ssim_diversity(two, pairs=50) == pytest.approx(ms_ssim(two[:1], two[1:]).item(), abs=1e-6)


def test_surroundings_reach_to_the_kth_other():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert _reach(line, 1).tolist() == [1, 1, 2, 4] and _reach(line, 2).tolist() == [3, 2, 3, 6]


def test_the_seed_chooses_the_images():
    assert sorted(shuffled(50, 1)) == list(range(50))
    assert shuffled(50, 1) == shuffled(50, 1) != shuffled(50, 2)


def test_the_table_says_which_way_is_better():
    one = {"swd_16": 1.0, "swd": 12.3456, "ms_ssim": 2.0, "precision": 0.5, "recall": 0.25, "density": 1.0, "fid": 9.0}
    lines = table({"generated": one, "other real images": {"swd": 3.0, "inception_score": 2.0}}).splitlines()
    assert lines[0].split() == ["generated", "other", "real", "images"]
    assert lines[2].split() == ["swd", "12.346", "3.000", "lower", "is", "better"]
    better = {line.split()[0]: line.split()[-3] for line in lines[1:]}
    assert better == {
        "swd_16": "lower", "swd": "lower", "ms_ssim": "lower", "fid": "lower",
        "precision": "higher", "recall": "higher", "density": "higher",
    }  # fmt: skip


def test_distances_are_in_thousandths(networks):
    real, fake = images(40, 16, channels=1).clamp(-1, 1), images(40, 16, 1, channels=1).clamp(-1, 1)
    found = measure(real, fake, networks[1], seed=3)
    assert found["swd"] == found["swd_16"] == pytest.approx(1000 * sliced_wasserstein(real, fake, seed=3)[16])


@pytest.fixture
def evaluated(run, tmp_path, monkeypatch):
    """evaluated(**settings): what is measured, by its name in the table, and what is shown, by the picture's."""

    def evaluated(**settings):
        found, shown = [], []
        monkeypatch.setattr(evaluate_module, "measure", lambda *given: found.append(given) or {"swd": 1.0})
        monkeypatch.setattr(evaluate_module, "side_by_side", lambda sets: shown.append(sets) or Image.new("L", (4, 4)))
        evaluate(run, data="digits", out=tmp_path / "e.json", images=40, **settings)
        return dict(zip(("generated", "other real images"), found, strict=True)), shown

    return evaluated


def test_what_is_compared_with_what(evaluated, networks):
    measured, (pictures, twins) = evaluated(seed=7)
    real, fake, judge, seed = measured["generated"]
    again, other, _, _ = measured["other real images"]
    assert (real.amin(), real.amax()) == (-1, 1)
    assert torch.equal(real, again) and seed == 7 and len(real) == len(fake) == len(other) == 40
    assert torch.cdist(real.flatten(1), other.flatten(1)).min() > 0, "no image is in both"
    assert torch.allclose(fake, generate(networks[0], latents(range(7, 47), 100)), atol=1e-5)
    assert torch.equal(pictures["real"][:30], real[:30]) and torch.equal(pictures["generated"], fake[:30])
    own, near = twins.values()
    every = open_dataset("digits", image_size=(16, 16), device=torch.device("cpu")).take(range(1797))
    every = every.permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(own, fake[:30])
    assert torch.allclose(near, every[torch.cdist(own.flatten(1), every.flatten(1)).argmin(1)], atol=1e-6)
    assert "all 1,797 real ones" in list(twins)[1]
    assert not torch.equal(judge.main[0].weight, networks[1].main[0].weight), "not the run's own discriminator"


def test_two_sets_stand_beside_each_other():
    black, grey = torch.full((30, 1, 16, 16), -1.0), torch.zeros(30, 1, 16, 16)
    page = np.asarray(side_by_side({"black": black, "grey": grey}))[20:]
    assert (page[:96, : 6 * 98 - 2 : 98] == 0).all() and (page[-96:, : 6 * 98 - 2 : 98] == 0).all()
    assert (page[:, 6 * 98 : 7 * 98 - 2] == 255).all()  # between them
    assert (page[:96, 7 * 98 :: 98] == 128).all() and (page[-96:, 7 * 98 :: 98] == 128).all()


def test_what_was_measured_is_saved_where_it_cannot_be_printed(evaluated, tmp_path, monkeypatch, full):
    monkeypatch.setattr("sys.stdout", full)
    with pytest.raises(OSError, match="No space left"):
        evaluated()
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.png", "e-nearest.png"}
    assert json.loads((tmp_path / "e.json").read_text())["results"]["generated"] == {"swd": 1.0}


def test_each_set_has_its_own_inception_scores(evaluated, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    scores = {"generated": {"fid": 3.0}, "other real images": {"fid": 1.0}}
    monkeypatch.setattr(evaluate_module, "inception_scores", lambda *_: scores)
    evaluated(fid=True)
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert {name: each["fid"] for name, each in results.items()} == {"generated": 3.0, "other real images": 1.0}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_inception_network_sees_colours_of_as_many_images_as_there_are(channels, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity")
    found = {"frechet_inception_distance": 1.0, "inception_score_mean": 4.0, "inception_score_std": 5.0}
    found |= {"kernel_inception_distance_mean": 2.0, "kernel_inception_distance_std": 3.0}
    asked = []
    monkeypatch.setattr(fidelity, "calculate_metrics", lambda **how: asked.append(how) or found)
    real, fake = (torch.rand(40, channels, 8, 8) * 2 - 1 for _ in range(2))
    scores = inception_scores(real, {"generated": fake}, None)
    assert scores == {"generated": {"fid": 1.0, "kid": 2.0, "inception_score": 4.0}}
    (how,) = asked
    assert how["kid_subset_size"] == len(how["input1"]) == len(how["input2"]) == 40
    for seen, images in ((how["input1"], fake), (how["input2"], real)):
        assert torch.equal(seen[7], to_uint8(images[7:8, :3].expand(-1, 3, -1, -1))[0])


def test_latest_weights_and_another_runs_features_can_be_asked_for(evaluated, run, networks, tmp_path):
    (_, average, *_), (_, latest, judge, _) = (
        evaluated(**settings)[0]["generated"] for settings in ({}, {"ema": False, "features": run})
    )
    assert not torch.equal(average, latest)
    assert torch.equal(judge.main[0].weight, networks[1].main[0].weight)
    assert json.loads((tmp_path / "e.json").read_text())["features"] == str(run)


def test_a_report_says_which_weights_were_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "measure", lambda *_: {"swd_16": 1.0})
    for ema in (True, False):
        out = tmp_path / f"{ema}.json"
        evaluate(run, data="digits", images=32, out=out, ema=ema)
        assert json.loads(out.read_text())["ema"] is ema
        export(run, format="safetensors", out=tmp_path / f"model-{ema}", evaluation=out, ema=ema)


def test_the_untrained_judge_is_always_the_same_one(networks, digits):
    before = torch.get_rng_state()
    one = fresh_discriminator(networks[1], digits)
    assert torch.equal(torch.get_rng_state(), before), "it leaves the random numbers alone"
    torch.manual_seed(5)
    other = fresh_discriminator(networks[1], digits)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_untrained_judge_has_the_statistics_of_the_images(networks, digits):
    judge = fresh_discriminator(networks[1], digits)
    place, norm = next((i, layer) for i, layer in enumerate(judge.main) if isinstance(layer, nn.BatchNorm2d))
    found = judge.main[:place](digits)
    assert torch.allclose(norm.running_mean, found.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.running_var, found.transpose(0, 1).flatten(1).var(1), rtol=1e-3)


def test_every_stage_counts_the_same(networks, digits):
    real, fake = features_of(networks[1], digits, digits[:9])
    for stage in real.split([4 * 16, 4 * 32], dim=1):
        assert stage.std(0).norm().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(fake, real[:9], atol=1e-4)  # scaled as the real ones are
