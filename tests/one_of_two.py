"""One of two processes that train together on given batches: python one_of_two.py FOLDER RANK, FOLDER with joint.pt."""

import os
import sys
from pathlib import Path

import torch

from fastdcgan import models
from fastdcgan.distributed import join
from fastdcgan.step import TrainStep

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
world = join(torch.device("cpu"))
joint = torch.load(folder / "joint.pt")
torch.manual_seed(1 + rank)  # other weights in each process, until they begin together
generator, discriminator = models.Generator(16, 3, 10, 8).double(), models.Discriminator(16, 3, 8).double()
if joint["sync"]:
    models.sync_batch_norm(generator)
    models.sync_batch_norm(discriminator)
batch = joint["noise"].shape[1] // 2
mine = slice(rank * batch, (rank + 1) * batch)
source = torch.zeros(batch, 16, 16, 3, dtype=torch.uint8)
options = {"spectral_norm": joint["spectral"]}
step = TrainStep(generator, discriminator, source, torch.arange(batch), world=world, **options)
if rank == 0:
    step.load_weights(joint["weights"])
step.synchronise()
if joint["compile"]:
    step.compile()
for noise, real in zip(joint["noise"], joint["real"], strict=True):
    step.draw = lambda noise=noise, real=real: step.noise.copy_(noise[mine]) is not None and real[mine]
    step.update()
torch.save(step.weights(), folder / f"rank-{rank}.pt")
world.leave()
if sys.platform == "linux":
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads), f"may still be at work while the interpreter ends: {threads}"
