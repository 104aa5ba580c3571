"""Which room may import which: parsed, not trusted."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
# Room -> the rooms of fastdcgan it may import. Files not listed stand alone or are checked by the general rules below.
ALLOWED = {
    "fastdcgan/reference.py": {"image_size"},
    "fastdcgan/derivatives.py": set(),
    "fastdcgan/patches.py": {"derivatives"},
    "fastdcgan/native.py": {"errors"},
    "fastdcgan/winograd.py": {"derivatives", "native"},
    "fastdcgan/heap.py": set(),
    "fastdcgan/gpu_memory.py": set(),
    "fastdcgan/contention.py": set(),
    "fastdcgan/cores.py": set(),
    "fastdcgan/objectives.py": set(),
    "fastdcgan/stabilisers.py": set(),
    "fastdcgan/models.py": {"kernels", "patches", "reference", "winograd"},
    "fastdcgan/distributed.py": {"console", "errors"},
    "fastdcgan/optimizer.py": {"distributed", "kernels", "spans"},
    "fastdcgan/executors.py": {"console", "errors", "signals", "step"},
    "fastdcgan/step.py": {
        "distributed",
        "gpu_memory",
        "heap",
        "kernels",
        "models",
        "objectives",
        "optimizer",
        "spans",
        "stabilisers",
    },
    "fastdcgan/config.py": {"dataset_names", "errors", "files", "image_size"},
    "fastdcgan/dataset_names.py": set(),
    "fastdcgan/checkpoint.py": {"console", "errors"},
    "fastdcgan/alarms.py": set(),
    "fastdcgan/plot.py": set(),
    "fastdcgan/files.py": {"errors"},
    "fastdcgan/pixels.py": set(),
    "fastdcgan/versions.py": set(),
    "fastdcgan/report.py": {"alarms", "console", "errors", "files", "plot"},
    "fastdcgan/quality.py": {"distances", "pixels"},
    "fastdcgan/distances.py": {"pixels"},
    "fastdcgan/monitor.py": {"alarms", "files", "grid"},
    "fastdcgan/grid.py": {"files", "pixels"},
}
FILES = sorted(
    p for folder in ("fastdcgan", "kernels") for p in (ROOT / folder).rglob("*.py") if "fastdcgan/kernels" not in str(p)
)


def imported(path: Path) -> set[str]:
    """Dotted names of the modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "fastdcgan":
                found |= {f"fastdcgan.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    modules = imported(path)
    rooms = {m.split(".")[1] for m in modules if m.startswith("fastdcgan.")}
    top = {m.split(".")[0] for m in modules}
    if name.startswith("kernels/"):
        assert rooms <= {"kernels"}, "kernels import torch and triton only"
        assert top <= {"torch", "triton", "fastdcgan", *sys.stdlib_module_names}
    if name in ALLOWED:
        assert rooms <= ALLOWED[name]
    if not name.startswith("fastdcgan/apps/") and name not in ("fastdcgan/commands.py", "fastdcgan/__init__.py"):
        assert "apps" not in rooms, "training knows nothing of what a trained network is good for"
    if not name.startswith("fastdcgan/data/"):
        assert "nvidia" not in top, "only data/ imports DALI"
        assert (
            not any(m.startswith("fastdcgan.data.") and m != "fastdcgan.data.dataset" for m in modules)
            or name == "fastdcgan/commands.py"
        )
    if name not in ("fastdcgan/commands.py", "fastdcgan/__init__.py"):
        assert "trainer" not in rooms, "only the command line imports the trainer"
        assert "cli" not in rooms or name.endswith("__main__.py")
        assert "commands" not in rooms or name == "fastdcgan/cli.py"
    assert "kernels" not in top and "tests" not in top and "profiles" not in top


def test_a_run_that_compiles_nothing_starts_without_the_compiler(tmp_path: Path) -> None:
    """Nor scikit-learn: each takes two seconds to import."""
    code = (
        "import sys; from fastdcgan import TrainConfig, load_run, train, winograd; winograd.PAYS_HERE = True\n"
        f"config = TrainConfig(steps=2, gen_width=32, disc_width=32, device='cpu', run_dir={str(tmp_path / 'run')!r})\n"
        "load_run(train(config))\n"
        "print(*{'torch._dynamo', 'torchvision', 'sklearn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "\n", done.stdout + done.stderr


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['fastdcgan', 'train', '--help']\ntry:\n import fastdcgan.cli; fastdcgan.cli.main()\n"
    )
    code += "finally:\n print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--image-size" in done.stdout and done.stdout.splitlines()[-1] == "False False"


def test_kernels_refuse_another_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "import this package as fastdcgan.kernels" in done.stderr


WINDOWS = """
import ctypes, os, shutil, signal, sys
sys.modules["triton"] = None
import torch, torchvision.transforms.functional, torch.utils.tensorboard, PIL.Image, safetensors.torch

def in_use(path):
    whole = os.path.realpath(path)
    held = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
    held += [line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if " /" in line]
    return any(each == whole or each.startswith(whole + os.sep) for each in held)

def refusing(function):
    # What is open or mapped, or a folder with such a file in it, is neither renamed nor deleted, nor a folder replaced.
    def refuse(path, *to, **options):
        if os.path.lexists(path) and (any(map(in_use, (path, *to))) or any(map(os.path.isdir, to))):
            raise PermissionError(13, "The file is being used by another process", str(path))
        return function(path, *to, **options)
    return refuse

for name in ("replace", "rename", "unlink", "remove"):
    setattr(os, name, refusing(getattr(os, name)))
shutil._use_fd_functions = False
for name in ("nvidia.dali", "fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "posix_fallocate", "getloadavg", "sysconf", "getuid"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM"):
    delattr(signal, name)
sys.platform, ctypes.CDLL = "win32", None

from fastdcgan import TrainConfig, load_run, train
from fastdcgan.cli import main
small = dict(image_size="16", gen_width=4, batch_size=4, cache="disk", cache_dir="cache", run_dir="run")
train(TrainConfig(data="pictures", steps=4, **small))
run = train(TrainConfig(steps=6, run_dir="run", resume=True, checkpoint_every=1, keep=1, cache="disk"))
for words in (
    "data pack pictures --image-size 16 --out set.npy",
    "train set.npy --steps 2 --gen-width 4 --batch-size 4 --run-dir packed",
    "sample run --count 4", "sample run --count 4", "export run --out model", "report run",
):
    main(words.split())
print(load_run(run).step, sorted(path.name for path in (run / "checkpoints").iterdir()))
"""


def test_it_trains_where_neither_triton_nor_dali_nor_unix_is(tmp_path: Path) -> None:
    """As on a laptop with Windows, as far as that can be had here."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 16), (40 * i, 9, 99)).save(tmp_path / "pictures" / f"{i}.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6 ['best', 'step-000006']"
    assert "peak memory" not in done.stderr, "nobody says"
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "images").iterdir() if path.suffix != ".lock")
    assert kept == [".json", ".npy", ".rows"]  # of which Windows deletes what nobody has open when the set has changed


def test_what_a_gpu_machine_runs_needs_torch_triton_and_numpy_alone():
    """As `bench/gpu.sh` says; scipy it asks for."""
    modules = (
        "throughput",
        "profiling",
        "kernels_table",
        "discriminator_memory",
        "batch_norm_cuts",
        "end_to_end",
        "data_path",
        "feeding",
    )
    script = (
        "import sys\n"
        "for name in ('tyro', 'nvidia.dali', 'webdataset', 'scipy', 'matplotlib'): sys.modules[name] = None\n"
        f"for name in {modules}: __import__('fastdcgan.bench.' + name)\n"
        "import fastdcgan.data, fastdcgan.step\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)


def test_a_program_that_imports_it_keeps_its_warnings():
    """Pillow's of very large pictures, for one, which the command line alone is silent about."""
    script = (
        "import warnings\n"
        "before = list(warnings.filters)\n"
        "import PIL.Image, numpy, torch\n"
        "others = [each for each in warnings.filters if each not in before]\n"
        "import fastdcgan.apps.pictures, fastdcgan.data, fastdcgan.trainer\n"
        "new = [each for each in warnings.filters if each not in before + others]\n"
        "assert not any('PIL' in str(each) for each in new), new\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)
