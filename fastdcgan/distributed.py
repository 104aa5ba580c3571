"""One run in several processes: who this process is, and what all of them agree on. Started with torchrun.

Every process trains the same networks on its own share of the images with its own noise; gradients are averaged, so
the networks stay the same everywhere. The first process alone writes. A process outside torchrun is a world of one,
for which everything here is free.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastdcgan.console import say
from fastdcgan.errors import UserError, first_line, number_in

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")

SEED_STEP = 1_000_003  # from one process's random numbers to the next one's
PATIENCE = 30.0  # seconds to wait for the other processes without a word


@dataclass(frozen=True)
class World:
    """All processes of a run. Every method but `seed` is to be called by all of them, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        local_rank: of this process on its machine; also the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def seed(self, seed: int) -> int:
        """The seed of this process's own random numbers; the first process has the run's."""
        return seed + SEED_STEP * self.rank

    def broadcast_object(self, value: T) -> T:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T | None:
        """What `work` returns in the first process, which alone does it; None in the others.

        Raises:
            UserError: what `work` raised, in all processes.
        """
        result: T | None = None
        complaint: str | None = None
        if self.rank == 0:
            try:
                result = work()
            except UserError as error:
                complaint = str(error)
        complaint = self.broadcast_object(complaint)
        if complaint is not None:
            raise UserError(complaint)
        return result

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, which alone does it, for all.

        Raises:
            UserError: what `work` raised, in all processes.
        """
        return self.broadcast_object(cast(T, self.first(work)))

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """The first process of each machine goes through this before its others: what it fetches they find there."""
        if self.size > 1 and self.local_rank > 0:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.local_rank == 0:
                dist.barrier()

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over all processes of each value."""
        everyones = self.gather(values)
        return {name: sum(each[name] for each in everyones) / self.size for name in values}

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give all processes the first one's tensors, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def leave(self) -> None:
        """Close the connections."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()


def join(device: torch.device) -> World:
    """The world that torchrun has started, or a world of one; on GPUs, each process takes the one of its local rank.

    Args:
        device: what the processes train on.

    Raises:
        UserError: fewer GPUs than processes on this machine; not started as torchrun starts processes; the others not
            to be reached; a process group that is open already.
    """
    size = number_in("WORLD_SIZE", 1)
    if size == 1:
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"the environment has WORLD_SIZE but no {missing[0]}: start with torchrun, or unset WORLD_SIZE")
    rank, local_rank, port = number_in("RANK", 0), number_in("LOCAL_RANK", 0), number_in("MASTER_PORT", 0)
    if not 0 <= rank < size:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={size}: ranks count from 0 to below that")
    if dist.is_initialized():
        raise UserError("a process group is open already: call destroy_process_group() before train()")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, fewer than the processes started on it:"
                f" give torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"  # what is said between processes does not wait for the GPU
    else:
        backend = "gloo"
    # A process group that is there when this module is imported is kept to the end, and its threads with it: they may
    # then be freeing tensors while the interpreter ends, and abort. A run that compiles imports it later.
    importlib.import_module("torch._dynamo")
    address = os.environ["MASTER_ADDR"]

    def meet() -> Store:
        store = meeting_place(address, port, rank, size)
        return dist.PrefixStore(meeting(store, rank, size), store)  # type: ignore[attr-defined]

    others = f"the other processes of WORLD_SIZE={size} at {address}:{port}"
    store = patiently(meet, others, speaks=local_rank == 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, local_rank)


def patiently(connect: Callable[[], T], others: str, *, speaks: bool) -> T:
    """What `connect` returns. It waits in C++, which does not hear Ctrl-C: so in a thread, while this one does.

    Args:
        speaks: tell the user where it takes long.

    Raises:
        UserError: the others are not to be reached.
    """
    found: Future[T] = Future()

    def work() -> None:
        try:
            found.set_result(connect())
        except Exception as error:
            found.set_exception(error)

    Thread(target=work, daemon=True).start()
    if not wait([found], PATIENCE).done and speaks:
        say(f"waiting for {others}; if there are none, unset WORLD_SIZE", anyone=True)
    try:
        return found.result()
    except dist.DistError as error:
        raise UserError(f"no connection to {others}: {first_line(error)}") from error


@functools.cache
def meeting_place(address: str, port: int, rank: int, size: int) -> Store:
    """torchrun's store, or one that the first process keeps for all.

    It stays for the life of the process: one that went with a run could go while another process, already at its next
    run, is reading there. The arguments, which rendezvous reads from the environment itself, tell stores apart.
    """
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return store


def meeting(store: Store, rank: int, size: int) -> str:
    """A name for this start of all processes, the same for all and never used before.

    torchrun's store outlives a restart, and has the addresses of those that are gone; and after one its agents on
    several machines count different numbers of restarts. So every process says that it is here, the first lists who
    is, and when all on the list have found themselves there its digest is the name.
    """
    own = uuid.uuid4().hex
    store.set(f"here/{rank}", own)
    while True:
        if rank == 0:
            store.set("list", " ".join(store.get(f"here/{each}").decode() for each in range(size)))
        listed = store.get("list").decode()
        if own in listed:
            name = hashlib.sha256(listed.encode()).hexdigest()
            store.set(f"{name}/{rank}", "here")
            if store.check([f"{name}/{each}" for each in range(size)]):  # nobody listed is one of those that are gone
                return name
        time.sleep(0.05)


class Averager:
    """Averages one network's gradients over all processes with one collective: they are gathered in one flat buffer.

    Args:
        parameters: full-precision, dense; the averages have their dtype and strides.
    """

    def __init__(self, world: World, parameters: Sequence[Tensor]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.world = world
        self.flat = parameters[0].new_zeros(sum(sizes))
        self.views = [
            part.as_strided(parameter.shape, parameter.stride())
            for part, parameter in zip(self.flat.split(sizes), parameters, strict=True)
        ]

    def average(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The means over all processes, in the buffer: the next call writes over them."""
        torch._foreach_copy_(self.views, list(gradients))
        dist.all_reduce(self.flat)
        self.flat.div_(self.world.size)
        return self.views
