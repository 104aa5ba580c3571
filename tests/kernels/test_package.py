"""The package's borders: what it imports, under which name it answers, and that it works without Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastdcgan.kernels

ROOT = Path(__file__).parents[2]
HERE = Path(fastdcgan.kernels.__file__).parent


def test_it_imports_only_torch_and_triton():
    allowed = {"torch", "triton", "fastdcgan", *sys.stdlib_module_names}
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                assert not name.startswith("fastdcgan") or name.startswith("fastdcgan.kernels"), f"{path.name}: {name}"


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_it_refuses_another_name():
    refused = run("import kernels")
    assert refused.returncode == 1 and "import this package as fastdcgan.kernels" in refused.stderr


def test_without_triton():
    """As on a platform that has none: the reference runs, and asking for Triton says why it cannot."""
    works = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fastdcgan.kernels import batch_norm_act\n"
        "c = [torch.ones(3) for _ in range(4)]\n"
        "batch_norm_act(torch.randn(4, 3, 2, 2), *c, training=True)\n"
        "try: batch_norm_act(torch.randn(4, 3, 2, 2), *c, training=True, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert works.returncode == 0, works.stderr
    assert "Triton cannot be imported (ModuleNotFoundError" in works.stdout
