import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastdcgan.config import TrainConfig, flag
from fastdcgan.errors import UserError


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"image_size": "50"}, "48 and 56"),
        ({"image_size": "64x"}, "HEIGHTxWIDTH"),
        ({"batch_size": 1}, "BatchNorm needs at least 2"),
        ({"batch_size": -3}, "--batch-size"),
        ({"steps": -1}, "--steps -1"),
        ({"steps": 0}, "--steps 0"),
        ({"epochs": 0.0}, "--epochs"),
        ({"epochs": float("nan")}, "--epochs"),
        ({"steps": 5, "epochs": 5.0}, "--steps and --epochs"),
        ({"lr": 0.0}, "--lr"),
        ({"r1": 1e300}, "--r1 1e[+]300 is not possible.* 1e[+]06 at most"),
        ({"instance_noise": float("inf")}, "--instance-noise inf"),
        ({"beta1": 1.0}, "--beta1"),
        ({"beta2": 1.0}, "--beta2"),
        ({"ema_decay": 1.0}, "--ema-decay"),
        ({"keep": 0}, "--keep"),
        ({"log_every": 0}, "--log-every"),
        ({"checkpoint_every": 10**13}, "--checkpoint-every 10000000000000 is too large"),
        ({"gen_width": 0}, "--gen-width"),
        ({"latent_dim": 0}, "--latent-dim"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"arch": "tutorial", "image_size": "32"}, "28x28"),
        ({"precision": "fp8"}, "--precision 'fp8'.*bf16"),
        ({"on_divergence": "panic"}, "--on-divergence 'panic'"),
        ({"channels": 2}, "--channels 2"),
        ({"lr": "fast"}, "--lr 'fast'"),
        ({"compile": 1}, "--compile 1"),
        ({"sync_batchnorm": True, "r1": 5.0}, "--sync-batchnorm cannot"),
        ({"sync_batchnorm": True, "loss": "wgan-gp"}, "--sync-batchnorm cannot"),
        ({"run_dir": Path(os.fsdecode(b"r\xff"))}, "--run-dir.*UTF-8"),
    ],
)
def test_impossible_values(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        TrainConfig(**wrong)
    assert "\n" not in str(error.value)


def test_presets_and_sizes() -> None:
    assert TrainConfig().size == (32, 32) and TrainConfig().widths == (32, 32)
    assert TrainConfig(data="photos").size == (64, 64) and TrainConfig(data="photos").widths == (64, 64)
    assert TrainConfig(data="photos", image_size="64x96", gen_width=16).size == (64, 96)
    assert TrainConfig(data="photos", gen_width=16).widths == (16, 16)
    assert TrainConfig(data="photos", gen_width=16, disc_width=8).widths == (16, 8)
    assert TrainConfig(arch="tutorial", data="mnist").size == (28, 28)


def test_epochs_become_steps() -> None:
    config = TrainConfig(data="photos", epochs=1.5, batch_size=64)
    assert config.total_steps(1000) == 24  # 1,500 images in batches of 64
    assert TrainConfig(steps=7).total_steps(1000) == 7
    assert config.total_steps(1000, processes=4) == 6  # of 256 images
    assert config.total_steps(1000, seen=1400) == 2  # what is left
    assert config.total_steps(1000, seen=1536) == 0
    assert (TrainConfig().total_steps(1797), TrainConfig(data="photos").total_steps(9)) == (1_000, 20_000)


def test_json_round_trip() -> None:
    config = TrainConfig(data="photos", image_size="64x96", epochs=2, flip=True, run_dir=Path("x"), lr=1e-4)
    assert TrainConfig.from_json(json.loads(json.dumps(config.as_json()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "many"),
        ("compile", 1),
        ("loader", "magic"),
        ("batch_size", None),
        ("lr", "fast"),
        ("data", 3),
        ("new", 1),
    ],
)
def test_json_of_another_kind(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"config.json.*({flag(field)}|{field})"):
        TrainConfig.from_json({**TrainConfig().as_json(), field: value})


def test_a_resumed_run_keeps_what_it_was() -> None:
    saved = TrainConfig(data="mnist", image_size="32", steps=100, batch_size=16)
    again = resumed(TrainConfig(data="mnist", steps=200, resume=True, run_dir=Path("r")), saved)
    assert (again.size, again.steps, again.batch_size) == ((32, 32), 200, 16)
    assert resumed(TrainConfig(epochs=2.0), saved).steps is None
    assert resumed(TrainConfig(steps=9), dataclasses.replace(saved, steps=None, epochs=2.0)).epochs is None
    for field, value in (
        ("image_size", "64"),
        ("arch", "tutorial"),
        ("channels", 3),
        ("gen_width", 8),
        ("disc_width", 8),
        ("latent_dim", 8),
    ):
        with pytest.raises(UserError, match="cannot change"):
            resumed(dataclasses.replace(TrainConfig(), **{field: value}), saved)


def resumed(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    return config.resumed(saved, config.differs())


def test_paths_may_be_text() -> None:
    config = TrainConfig(data=Path("photos"), run_dir="run", cache_dir="cache", image_size=32)  # type: ignore[arg-type]
    assert config.size == (32, 32) and config == TrainConfig.from_json(config.as_json())
    assert (config.data, config.run_dir, config.cache_dir) == ("photos", Path("run"), Path("cache"))


def test_a_resumed_run_takes_what_is_asked_for_even_where_it_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    saved = TrainConfig(data=tmp_path / "photos", lr=1e-3, compile=True, keep=5)  # type: ignore[arg-type]
    again = TrainConfig(run_dir=Path("r")).resumed(saved, {"lr", "compile", "run_dir"})
    assert (again.lr, again.compile, again.keep) == (2e-4, False, 5)
    with pytest.raises(UserError, match="DATA digits cannot change"):
        TrainConfig().resumed(saved, {"data"})


def test_data_that_has_moved_may_be_named_anew(tmp_path: Path) -> None:
    for was, now in (("photos", "pictures"), ("photos/{0..9}.tar", "pictures/{0..9}.tar")):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "0.tar").touch()
        saved, config = TrainConfig(data=str(tmp_path / was)), TrainConfig(data=str(tmp_path / now))
        assert TrainConfig().resumed(saved, set()) == saved
        with pytest.raises(UserError, match="cannot change"):
            config.resumed(saved, {"data"})
        (tmp_path / "photos").rename(tmp_path / "pictures")
        assert config.resumed(saved, {"data"}) == config
        with pytest.raises(UserError, match=r"there is no .* any more"):
            TrainConfig().resumed(saved, set())
        if "{" in was:  # the shards alone have moved
            (tmp_path / "photos").mkdir()
            assert config.resumed(saved, {"data"}) == config
        shutil.rmtree(tmp_path / "pictures")


def test_a_resumed_run_may_say_the_same_in_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    saved = TrainConfig(data="photos", channels=3)
    for same in (
        {"data": str(tmp_path / "photos") + "/"},
        {"image_size": "64x64"},
        {"gen_width": 64},
        {"disc_width": 64},
        {"channels": 3},
    ):
        asked = dataclasses.replace(TrainConfig(data="photos"), **same)
        assert asked.resumed(saved, set(same)) == saved


@pytest.mark.parametrize("data", [np.zeros((1, 1)), np.zeros((4, 16, 16)), ["a", "b"], None, 64])
def test_data_that_is_neither_name_nor_path(data: object) -> None:
    with pytest.raises(UserError, match=r"DATA is a (ndarray|list|NoneType|int): give a dataset's name or a path"):
        TrainConfig(data=data)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--batch-size array"):
        TrainConfig(batch_size=np.array([64]))  # type: ignore[arg-type]


def test_numbers_of_numpy_and_sizes_as_pairs() -> None:
    config = TrainConfig(data="photos", image_size=(64, 96), gen_width=np.int64(16), lr=np.float32(0.5))  # type: ignore[arg-type]
    assert TrainConfig(data="photos", image_size=[64, 96]).size == (64, 96)  # type: ignore[arg-type]
    assert config == TrainConfig(data="photos", image_size="64x96", gen_width=16, lr=0.5)
    assert json.loads(json.dumps(config.as_json()))["gen_width"] == 16
    assert TrainConfig(image_size=np.int64(32)).size == (32, 32)  # type: ignore[arg-type]


def test_the_folder_one_is_in_can_be_the_run() -> None:
    assert TrainConfig(run_dir=Path(".")).run_dir == Path(".")


def test_what_is_usual() -> None:
    usual = TrainConfig()
    assert (usual.lr, usual.beta1, usual.beta2, usual.ema_decay) == (2e-4, 0.5, 0.999, 0.999)
    assert (usual.batch_size, usual.latent_dim, usual.r1_every, usual.keep) == (64, 100, 16, 3)
    names = {"mnist": (28, 32, 4_000), "cifar10": (32, 64, 20_000), "svhn": (32, 64, 20_000), "fake": (32, 32, 1_000)}
    names |= {"fashion-mnist": names["mnist"], "digits": names["fake"], "celeba": (64, 64, 20_000)}
    for name, expected in names.items():
        config = TrainConfig(data=name)
        assert (config.size[0], config.widths[0], config.total_steps(9)) == expected


def test_learning_rates_are_those_of_lr_unless_said_otherwise() -> None:
    assert TrainConfig(lr=1e-3).rates == (1e-3, 1e-3)
    assert TrainConfig(lr=1e-3, lr_g=1e-4).rates == (1e-4, 1e-3)
    assert TrainConfig(lr=1e-3, lr_d=1e-4).rates == (1e-3, 1e-4)
