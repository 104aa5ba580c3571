"""Runs `equivalence/` in a process of its own, where Triton's interpreter executes the kernels on the CPU.

One process either interprets or compiles kernels, and machine code has tests in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdcgan.kernels.backend import INTERPRETING, TRITON_MISSING

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(INTERPRETING, reason="this process interprets already, and runs those tests itself")
@pytest.mark.skipif(TRITON_MISSING is not None, reason=f"no Triton: {TRITON_MISSING}")
def test_the_kernels_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels/equivalence",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    # No GPU in sight, and one thread: the interpreter works on arrays too small to share.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        pytest.fail(f"{' '.join(command)}\n{run.stdout[-20000:]}\n{run.stderr[-5000:]}", pytrace=False)
    assert " passed" in run.stdout, run.stdout
