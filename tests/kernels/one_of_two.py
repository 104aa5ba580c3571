"""One of the processes that `check_sync` starts: batch_norm_act with sync on its share of a joint batch.

python one_of_two.py FOLDER RANK, FOLDER with a file joint.pt
"""

import importlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastdcgan.kernels import batch_norm_act

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
importlib.import_module("torch._dynamo")  # before there is a group: see fastdcgan.distributed.join
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
joint = torch.load(folder / "joint.pt")
groups, options = joint["groups"], joint["options"]


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's half of every group."""
    parts = tensor.unflatten(0, (groups, 2, -1))[:, rank]
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return parts.flatten(0, 1).contiguous(memory_format=layout)


x, weight, bias = (t.requires_grad_() for t in (share(joint["x"]), joint["weight"], joint["bias"]))
running_mean, running_var = joint["running_mean"], joint["running_var"]


def run(x: torch.Tensor) -> torch.Tensor:
    return batch_norm_act(
        x, weight, bias, running_mean, running_var, training=True, groups=groups, sync=True, **options
    )


y = (torch.compile(run, fullgraph=True) if joint["compiled"] else run)(x)
gradients = torch.autograd.grad(y, (x, weight, bias), share(joint["dy"]))
torch.save([y.detach(), *gradients, running_mean, running_var], folder / f"rank-{rank}.pt")
dist.barrier()  # neither leaves while the other may still be talking to it
dist.destroy_process_group()  # or its threads outlive the interpreter, which then sometimes aborts
