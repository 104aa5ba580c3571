"""bench/gpu.sh with a stand-in for Python that notes what it is asked to run: there is no GPU here to run it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(tmp_path: Path, *sections: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The script's end, and a line for each command that it gave Python."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$(echo \"$*\" | tr '\\n' ' ')\" >> {asked}\n")
    python.chmod(0o755)
    asked.touch()
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *sections]
    return subprocess.run(command, env=environment, capture_output=True, text=True), asked.read_text()


def test_every_section_runs_its_command(tmp_path: Path) -> None:
    ended, asked = run(tmp_path)
    assert ended.returncode == 0, ended.stderr
    named = re.findall(r"^ *section (?:\"([^\"]+)\"|(\w+))", (ROOT / "bench" / "gpu.sh").read_text(), re.MULTILINE)
    log = (tmp_path / "out" / "log.txt").read_text()
    # No nvidia-smi, no summary of pytest's and no run are here.
    ends = dict(re.findall(r"^== (.+): exit (\d+) after", log, re.MULTILINE))
    assert ends.keys() == {quoted or plain for quoted, plain in named}
    assert {name for name, code in ends.items() if code != "0"} <= {"machine", "tests", "train"}
    for module in re.findall(r"fastdcgan\.bench\.(\w+)", asked):
        assert (ROOT / "bench" / f"{module}.py").exists()
    assert asked.count("fast-captured") >= 5 and "-m pytest" in asked and "fastdcgan train digits" in asked


def test_what_the_scripts_in_it_import_is_there() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    found = re.findall(r"^from (fastdcgan\.\S+) import (.+)$", script, re.MULTILINE)
    assert len(found) >= 5
    for module, names in found:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_sections_by_name_run_alone(tmp_path: Path) -> None:
    ended, asked = run(tmp_path, "cuts", "tuned example")
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"== (.+) \(at most", ended.stdout) == ["tuned example", "cuts"]
    assert "batch_norm_cuts" in asked and "kernels_table" not in asked and "-m pytest" not in asked


def test_a_section_that_is_not_there_is_said_before_any_runs(tmp_path: Path) -> None:
    ended, asked = run(tmp_path, "cuts", "cut")
    assert ended.returncode == 2 and "no section 'cut'" in ended.stderr and "feeding" in ended.stderr
    assert asked == ""
