"""Several processes: the same numbers as one with the joint batch, the same run when it is stopped, and one fate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastdcgan import checkpoint, distributed, models, reference, trainer
from fastdcgan.checkpoint import Checkpoint
from fastdcgan.config import TrainConfig
from fastdcgan.data.array_dataset import ArrayDataset
from fastdcgan.data.order import Order, Position
from fastdcgan.distributed import ALONE, World, join
from fastdcgan.errors import UserError
from fastdcgan.saver import position
from fastdcgan.step import TrainStep

STEPS, BATCH = 10, 8  # of all processes together
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FLAGS = "--image-size 16 --gen-width 4 --latent-dim 8 --batch-size 8 --log-every 3 --sample-every 6 --device cpu"


@pytest.mark.parametrize(("sync", "compile"), [(True, False), (True, True), (False, False)])
def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path, sync: bool, compile: bool) -> None:
    joint, found = trained_together(tmp_path, sync=sync, compile=compile, spectral=False)
    slow = reference.Generator(16, 3, 10, 8).double(), reference.Discriminator(16, 3, 8).double()
    for network, kind in zip(slow, ("generator", "discriminator"), strict=True):
        network.load_state_dict(joint["weights"][kind])
    optimizers = reference.adam(slow[0]), reference.adam(slow[1])
    for each_noise, each_real in zip(joint["noise"], joint["real"], strict=True):
        reference.reference_step(*slow, *optimizers, each_real, each_noise)

    for network, kind in zip(slow, ("generator", "discriminator"), strict=True):
        for name, value in network.state_dict().items():
            ours = found[0][kind][name]
            distance = ((ours - value).double().norm() / value.double().norm().clamp(min=1e-12)).item()
            if sync:  # rounding of 10 steps, as between the fast step and the reference in one process
                assert distance < 1e-9, f"{kind} {name}: {distance:.1e}"
                assert torch.equal(ours, found[1][kind][name]), f"{kind} {name} is not the same in both processes"
            elif "running" not in name and name.endswith("weight") and value.dim() == 4:
                # Each process normalises by its own images: close to the joint batch, and not equal to it.
                assert 1e-6 < distance < 0.2, f"{kind} {name}: {distance:.1e}"
                assert torch.equal(ours, found[1][kind][name]), f"{kind} {name} is not the same in both processes"


def test_two_processes_divide_by_the_same_singular_values(tmp_path: Path) -> None:
    _, found = trained_together(tmp_path, sync=True, compile=False, spectral=True)
    assert all(torch.equal(value, found[1]["discriminator"][name]) for name, value in found[0]["discriminator"].items())


def trained_together(tmp_path: Path, **options: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What two processes were given, and the weights that each ends with."""
    torch.manual_seed(0)
    generator, discriminator = models.Generator(16, 3, 10, 8).double(), models.Discriminator(16, 3, 8).double()
    weights = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    noise, real = torch.randn(STEPS, BATCH, 10).double(), torch.rand(STEPS, BATCH, 3, 16, 16).double() * 2 - 1
    joint = {"weights": weights | {"average": generator.state_dict()}, "noise": noise, "real": real, **options}
    torch.save(joint, tmp_path / "joint.pt")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    worker = [sys.executable, str(Path(__file__).parent / "one_of_two.py"), str(tmp_path)]
    processes = [
        subprocess.Popen([*worker, str(rank)], env=os.environ | meeting, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        errors = process.communicate(timeout=180)[1]
        assert process.returncode == 0, errors
    return joint, [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]


def test_no_two_processes_of_any_machine_draw_the_same() -> None:
    worlds = [World(rank, 4, rank % 2) for rank in range(4)]  # two machines with two processes each
    assert len({world.seed(7) for world in worlds}) == 4
    assert worlds[0].seed(7) == ALONE.seed(7) == 7


def test_processes_train_on_noise_of_their_own() -> None:
    noise = []
    for world in (ALONE, World(0, 2, 0), World(1, 2, 1)):
        networks = models.Generator(16, 3, 10, 8), models.Discriminator(16, 3, 8)
        step = TrainStep(*networks, torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.arange(4), seed=7, world=world)
        step.draw()
        noise.append(step.noise.clone())
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])


def test_each_start_has_a_name_of_its_own() -> None:
    """Though the store still has what those said who are gone, and processes come at different times."""
    store = dist.HashStore()
    store.set("list", "old ones here")
    names = []
    for start in range(2):

        def come(rank: int, start: int = start) -> str:
            time.sleep(0.4 * ((rank + start) % 3))
            return distributed.meeting(store, rank, 3)

        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(come, range(3)))
        assert len(found) == 1
        names += found
    assert names[0] != names[1]


def test_each_process_takes_the_gpu_of_its_place_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sixth of eight is the second on its machine; and after a restart none reads what was said before it."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}.items():
        monkeypatch.setenv(name, value)
    taken, begun = [], []
    monkeypatch.setattr(distributed, "meeting", lambda store, rank, size: f"start of {size}, for {rank}")
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "meeting_place", lambda *_: dist.HashStore())
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: prefix)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: begun.append((backend, how)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert join(torch.device("cuda")) == World(5, 8, 1) and taken == [1]
    assert begun == [("cpu:gloo,cuda:nccl", {"store": "start of 8, for 5", "rank": 5, "world_size": 8})]


def test_other_processes_go_on_where_all_have_been() -> None:
    """And know what each has found to be broken."""
    positions = [{"taken": 9, "unusable": [3]}, {"taken": 7, "unusable": [1, 3]}, {"taken": 8, "unusable": []}]
    saved = Checkpoint({}, {"data": positions})
    there = {"taken": 22, "world_size": 1}  # the second has seen elements 1, 4, ..., 19 of all: 22 is its next
    assert position(saved, ALONE) == there | {"unusable": [1, 3]}
    positions[1]["unusable"] = []
    assert position(saved, World(1, 2)) == there | {"unusable": [3]}
    assert [position(saved, World(rank, 3)) for rank in range(3)] == positions
    state = position(saved, World(0, 2)) | {"count": 50, "listing": "", "images": 24}
    begins = [rank + 2 * Position.resume(Order(50, 0, rank, 2), state).taken for rank in range(2)]
    assert sorted(begins) == [22, 23]


def torchrun(run: Path, *more: str, steps: int, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", "fastdcgan", "train", "digits"]
    command += [*FLAGS.split(), "--checkpoint-every", "6", "--steps", str(steps), "--run-dir", str(run), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that never stopped."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert "in each of 2 processes" in finished(torchrun(run, steps=18))
    return run


def test_both_processes_resume_to_the_same_bits(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for later in ("step-000012", "step-000018"):
        shutil.rmtree(run / "checkpoints" / later)
    finished(torchrun(run, "--resume", steps=18))
    folders = [each / "checkpoints" / "step-000018" for each in (run, straight)]
    for file in folders[0].glob("*.safetensors"):
        a, b = load_file(file), load_file(folders[1] / file.name)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    random = load_file(folders[0] / "state.safetensors")["rng"]
    assert len(random) == 2 and not torch.equal(random[0], random[1]), "each process draws its own noise"
    positions = [json.loads((folder / "state.json").read_text())["data"] for folder in folders]
    assert positions[0] == positions[1] and len(positions[0]) == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18], "the first process alone writes"
    assert lines[-1]["images"] == 18 * 8 * 2


def test_another_number_of_processes_goes_on_and_says_what_changes(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    command = [sys.executable, "-m", "fastdcgan", "train", "digits", *FLAGS.split(), "--steps", "24"]
    command += ["--run-dir", str(run), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 processes where there were 2" in done.stderr and "no longer the one that never stopped" in done.stderr
    state = json.loads((run / "checkpoints" / "step-000024" / "state.json").read_text())
    assert state["images"] == 18 * 16 + 6 * 8 and state["data"][0]["taken"] == 18 * 16 + 6 * 8


def test_a_killed_process_ends_the_other_and_a_restart_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(run, "--resume", steps=3000, restarts=1)
    for kill in range(2):  # the second one is one more than may be restarted
        known = checkpoint.complete(run)[-1:]
        while checkpoint.complete(run)[-1:] == known and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            pytest.fail(f"ended before kill {kill}: {process.communicate()[1]}")
        workers = children(process.pid)
        os.kill(workers[kill], signal.SIGKILL)
        ended = time.monotonic()
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() - ended < 30
            time.sleep(0.05)
    said = process.communicate(timeout=30)[1]
    assert process.returncode != 0 and "going on from step" in said
    assert checkpoint.load(checkpoint.complete(run)[-1]).progress["step"] > 0


def test_a_mistake_is_one_line_from_one_process(tmp_path: Path) -> None:
    process = torchrun(tmp_path / "run", "--batch-size", "1000", steps=6)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert said.count("fastdcgan: digits has 1797 usable images, fewer than one batch of 1000 on each of 2 ranks") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", ["torchrun", "one process"])
def test_a_signal_saves_in_all_processes(tmp_path: Path, to: str) -> None:
    run = tmp_path / "run"
    process = torchrun(run, "--log-every", "1000000", steps=100_000)  # no point at which they exchange figures is near
    while not (run / "checkpoints" / "step-000006").exists() and process.poll() is None:
        time.sleep(0.02)
    if to == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(children(process.pid)[1], signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert to == "torchrun" or process.returncode == 0, "they end alike, and torchrun does not start them anew"
    assert f"fastdcgan train --run-dir {run} --resume" in said
    step = json.loads((checkpoint.complete(run)[-1] / "state.json").read_text())["step"]
    assert f"stopped after step {step:,}" in said


def children(pid: int) -> list[int]:
    """Process numbers of torchrun's workers, first rank first."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(int(word) for word in listed.stdout.split())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_first_process_of_a_machine_goes_before_its_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which wait for it, also where it fails."""
    done: list[str] = []
    monkeypatch.setattr(distributed.dist, "barrier", lambda: done.append("barrier"))
    for rank, local_rank in ((4, 0), (5, 1)):
        with distributed.World(rank, 8, local_rank).first_on_each_machine():
            done.append(f"work of {local_rank}")
    assert done == ["work of 0", "barrier", "barrier", "work of 1"]
    done.clear()
    with pytest.raises(OSError), distributed.World(0, 8, 0).first_on_each_machine():
        raise OSError
    assert done == ["barrier"]


def test_one_process_of_all_machines_does_what_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the first of each machine."""
    monkeypatch.setattr(World, "broadcast_object", lambda _, value: value)
    done: list[int] = []
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        World(rank, 4, local_rank).first(lambda rank=rank: done.append(rank))  # type: ignore[misc]
    assert done == [0]


def test_what_the_first_process_complains_of_ends_the_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "broadcast_object", lambda _, value: "there is no such folder")
    with pytest.raises(UserError, match="there is no such folder"):
        World(1, 2).first(lambda: pytest.fail("the first does it"))


def test_what_torchrun_would_have_said_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="no RANK: start with torchrun, or unset WORLD_SIZE"):
        distributed.join(torch.device("cpu"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="no MASTER_ADDR: start with torchrun"):
        distributed.join(torch.device("cpu"))


def test_who_waits_for_nobody_is_told_and_can_stop(tmp_path: Path) -> None:
    """As in a shell whose environment is of something else; where the first should be, and where it is missing."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored by jobs in the background
        " from fastdcgan import distributed; distributed.PATIENCE = 0.2; from fastdcgan.cli import main; main()"
    )
    for rank in ("0", "1"):
        port = str(free_port())
        place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", script, "train", "digits", "--steps", "1", "--run-dir", str(tmp_path / "run")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | place) as process:
            assert process.stderr is not None
            try:
                said = next(line for line in process.stderr if line.startswith("waiting"))
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=60)
            finally:
                process.kill()
        expected = f"waiting for the other processes of WORLD_SIZE=2 at 127.0.0.1:{port}; if there are none, unset"
        assert (said.startswith(expected), process.returncode) == (True, 130), said
    assert not (tmp_path / "run").exists()


def test_others_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> None:
        raise dist.DistStoreError("Timed out: 1/2 clients joined.")

    with pytest.raises(UserError, match=r"no connection to the others: Timed out: 1/2 clients joined\."):
        distributed.patiently(nobody, "the others", speaks=True)


def test_the_meeting_place_stays_from_one_training_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [dist.HashStore(), dist.HashStore()]
    made = iter(stores)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(next(made), 0, 2)]))
    distributed.meeting_place.cache_clear()
    try:
        found = [distributed.meeting_place("127.0.0.1", port, 0, 2) for port in (29500, 29500, 29501)]
    finally:
        distributed.meeting_place.cache_clear()
    assert found[0] is found[1] is stores[0] and found[2] is stores[1]


def test_a_group_of_the_callers_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, usual in {"WORLD_SIZE": "2", "RANK": "0", **MASTER}.items():
        monkeypatch.setenv(name, usual)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"open already: call destroy_process_group\(\) before"):
        distributed.join(torch.device("cpu"))


def test_packed_sets_of_one_size_are_told_apart() -> None:
    """As one that was exchanged between two starts, or on one of two machines."""
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 4, 4, 3), dtype=np.uint8)
    first, same, other = (
        ArrayDataset("set", array, "", device=torch.device("cpu"), seed=0, flip=False)
        for array in (pixels, pixels.copy(), pixels[::-1].copy())
    )
    assert first.listed() == same.listed() != other.listed()
    state = first.stream(8).state()
    assert (same.changed(state), other.changed(state)) == (False, True)
    assert not other.changed(state | {"listing": ""})  # of a checkpoint from before


def test_processes_started_with_other_flags_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for where each has its files."""
    other = TrainConfig(data="elsewhere", run_dir=Path("there"), cache="disk", seed=1)
    monkeypatch.setattr(World, "gather", lambda _, mine: [mine, other.as_json()])
    trainer.check_alike(World(0, 2), TrainConfig(seed=1))
    with pytest.raises(UserError, match=r"differ in --seed \(\[0, 1\]\): start all with the same"):
        trainer.check_alike(World(0, 2), TrainConfig())


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: start with torchrun, or unset WORLD_SIZE"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0: start"),
        ("RANK", "x", "RANK=x: start"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK=-1: start"),
        ("RANK", "2", "RANK=2 and WORLD_SIZE=2"),
        ("MASTER_PORT", "abc", "MASTER_PORT=abc: start"),
        ("RANK", "", "no RANK: start"),
    ],
)
def test_an_environment_of_something_else_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, complaint: str
) -> None:
    for name, usual in {"WORLD_SIZE": "2", "RANK": "0", **MASTER, variable: value}.items():
        monkeypatch.setenv(name, usual)
    with pytest.raises(UserError, match=complaint):
        distributed.join(torch.device("cpu"))


def test_without_other_processes_the_environment_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert distributed.join(torch.device("cpu")) == ALONE


def test_more_processes_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2", **MASTER}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("there is no such GPU"))
    with pytest.raises(UserError, match=r"has 2 GPUs, fewer .*--nproc-per-node 2"):
        distributed.join(torch.device("cuda"))


def test_means_are_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.World, "gather", lambda _, value: [value, {"loss": 3.0}])
    assert distributed.World(0, 2).means({"loss": 1.0}) == {"loss": 2.0}
