"""How a step on a GPU has torch take memory; what the user has set stays. That it does is in `test_step.py`."""

from __future__ import annotations

import ctypes
import os
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdcgan.gpu_memory import maps_memory, take_no_more_than_needed

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator is told; none of the variables is set."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr("fastdcgan.gpu_memory.maps_memory", lambda: True)
    return told


def test_segments_grow_and_the_workspace_is_small(settings: list[str]) -> None:
    take_no_more_than_needed(1)
    assert settings == ["expandable_segments:True"]
    assert [os.environ.get(variable) for variable in VARIABLES] == [":16:8", "128", None, None]
    take_no_more_than_needed(1)  # for the next step in this process
    assert settings == ["expandable_segments:True"] * 2


@pytest.mark.parametrize("variable", VARIABLES)
def test_what_the_user_has_set_stays(settings: list[str], variable: str) -> None:
    os.environ[variable] = "as it is"
    take_no_more_than_needed(1)
    assert os.environ[variable] == "as it is"
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (variable != "CUBLASLT_WORKSPACE_SIZE")
    assert settings == ([] if variable.startswith("PYTORCH") else ["expandable_segments:True"])


@pytest.mark.parametrize(
    ("system", "release", "processes"),
    [
        ("Windows", "11", 1),
        ("Linux", "6.6.87.2-microsoft-standard-WSL2", 1),
        ("Linux", "4.4.0-19041-Microsoft", 1),
        ("Linux", "6.8.0-generic", 2),
    ],
)
def test_segments_do_not_grow_where_that_was_seen_to_fail(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, system: str, release: str, processes: int
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    take_no_more_than_needed(processes)
    assert settings == [] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_segments_do_not_grow_where_the_gpu_cannot_map_memory(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdcgan.gpu_memory.maps_memory", lambda: False)
    take_no_more_than_needed(1)
    assert settings == [] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("failing", [None, "cuDeviceGet", "cuDeviceGetAttribute"])
def test_the_driver_is_asked_about_the_current_gpu(
    monkeypatch: pytest.MonkeyPatch, says: bool, failing: str | None
) -> None:
    """With a stand-in for the driver: two GPUs, numbered from 10 on, of which the second says what it says."""

    def get(device: Any, ordinal: int) -> int:
        device._obj.value = 10 + ordinal
        return 101 if failing == "cuDeviceGet" else 0

    def attribute(answer: Any, number: int, device: Any) -> int:
        answer._obj.value = int(says == (device.value == 11)) if number == 102 else 7
        return 1 if failing == "cuDeviceGetAttribute" else 0

    driver = SimpleNamespace(cuDeviceGet=get, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    assert maps_memory() == (says and failing is None)


def test_without_a_driver_nothing_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert not maps_memory()


def test_torch_knows_the_setting() -> None:
    with pytest.raises(Exception, match="expandable_segment"):
        torch._C._accelerator_setAllocatorSettings("expandable_segment:True")  # no such one
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
