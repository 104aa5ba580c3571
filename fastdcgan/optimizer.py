"""Adam for one network: float32 masters, the low-precision weights the network computes with, the moving average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdcgan.distributed import ALONE, Averager, World
from fastdcgan.kernels import adam_step
from fastdcgan.spans import span


class Adam:
    """Kingma and Ba 2015, in one call for the whole network; everything that changes lives on the device.

    Parameters that the network holds in bfloat16 have a float32 master here; the update writes both. `lr` is a
    device scalar, so a schedule changes it without touching a captured graph.

    Args:
        network: its parameters may have been cast to bfloat16; `masters` then gives their float32 values.
        masters: float32 values by name of the parameters that are in bfloat16, and of them alone.
        average: a network of the same kind in float32 whose parameters follow as an exponential moving average.
        average_decay: () tensor, the average's decay; needed with `average`.
        world: the processes whose gradients are averaged.

    Raises:
        ValueError: a parameter that requires no gradient.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        betas: tuple[float, float],
        masters: dict[str, Tensor],
        average: nn.Module | None = None,
        average_decay: Tensor | None = None,
        world: World = ALONE,
    ) -> None:
        self.parameters = dict(network.named_parameters())
        if frozen := [name for name, p in self.parameters.items() if not p.requires_grad]:
            raise ValueError(f"{frozen[0]} is frozen: all parameters of both networks are trained")
        self.masters = {name: masters.get(name, p.detach()) for name, p in self.parameters.items()}
        self.copies = [p.detach() if name in masters else None for name, p in self.parameters.items()]
        self.averages = None if average is None else [p.detach() for p in average.parameters()]
        self.average_decay = average_decay
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        device = next(iter(self.masters.values())).device
        self.steps = torch.zeros((), dtype=torch.float32, device=device)
        self.lr = torch.tensor(lr, dtype=torch.float64, device=device)  # 2e-4 has no exact float32
        self.betas = betas
        self.averager = Averager(world, list(self.masters.values())) if world.size > 1 else None

    def update(self, loss: Tensor) -> None:
        """Differentiate the loss with respect to this network's parameters, free the graph and move the parameters."""
        # In this thread: autograd's own would have another cuBLAS handle, and with it a second workspace on the GPU,
        # 32 MiB on a Hopper one.
        with span("backward"), torch.autograd.set_multithreading_enabled(False):
            gradients: Sequence[Tensor] = torch.autograd.grad(loss, list(self.parameters.values()))
        if self.averager is not None:
            with span("average gradients"):
                gradients = self.averager.average(gradients)
        with span("optimizer"):
            adam_step(
                list(self.masters.values()),
                gradients,
                list(self.exp_avg.values()),
                list(self.exp_avg_sq.values()),
                self.steps,
                lr=self.lr,
                betas=self.betas,
                copies=self.copies,
                emas=self.averages,
                ema_decay=self.average_decay,
            )

    def state(self) -> dict[str, Tensor]:
        """The moments and counters by name: the tensors themselves, not copies."""
        moments = {f"exp_avg.{name}": value for name, value in self.exp_avg.items()}
        moments |= {f"exp_avg_sq.{name}": value for name, value in self.exp_avg_sq.items()}
        return moments | {"steps": self.steps, "lr": self.lr}
