"""What a step holds on a GPU, counted without one: the kernels' fake implementations stand for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdcgan import models, optimizer, patches
from fastdcgan.kernels import batch_norm_act, image_conv
from fastdcgan.step import TrainStep

BATCH, SIZE, WIDTH, LATENT = 32, 64, 64, 100
MAP = BATCH * WIDTH * (SIZE // 2) ** 2 * 2  # bytes of the largest feature map of BATCH images, in bf16
IMAGES = BATCH * 3 * SIZE**2 * 2


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operations have made since this began and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                    self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        return sum(self.sizes.values())


def held(monkeypatch: pytest.MonkeyPatch, fault: Callable[[TrainStep], None] | None = None) -> tuple[list[int], int]:
    """The second step's bytes: in use as each network's Adam starts and at the end, beyond those before; its peak."""
    for module in (batch_norm_act, image_conv):
        monkeypatch.setitem(module.__globals__, "use_triton", lambda *_: True)
    monkeypatch.setattr(patches, "are_faster", lambda *_: False)
    found: list[int] = []
    monkeypatch.setattr(optimizer, "adam_step", lambda *_, **__: found.append(live.now()))
    generator = models.build_generator("dcgan", (SIZE, SIZE), 3, LATENT, WIDTH)
    discriminator = models.build_discriminator("dcgan", (SIZE, SIZE), 3, WIDTH)
    source, index = torch.zeros(BATCH, SIZE, SIZE, 3, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.int64)
    step = TrainStep(generator, discriminator, source, index, precision="bf16")
    if fault is not None:
        fault(step)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        step.update()
        found.clear()
        live.peak, before = 0, live.now()
        step.update()
        return [number - before for number in (*found, live.now())], live.peak - before


def test_activations_are_freed_between_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature map halves from layer to layer. The generator's four have an x each, and all but the last a y: 2.75 of
    the largest. The discriminator sees twice the images: 2 for its first, without BatchNorm, and 3.5 for the x and y of
    the others."""
    (at_adam_d, at_adam_g, after), peak = held(monkeypatch)
    gradients_d, gradients_g = (
        2 * sum(p.numel() for p in network.parameters())
        for network in (models.Discriminator(SIZE, 3, WIDTH), models.Generator(SIZE, 3, LATENT, WIDTH))
    )
    small = MAP // 8  # statistics, logits, float32 gradients of BatchNorm
    generators = 2.75 * MAP + 2 * IMAGES  # with the real images and its own
    assert generators + gradients_d <= at_adam_d < generators + gradients_d + small
    assert 2 * IMAGES + gradients_g <= at_adam_g < 2 * IMAGES + gradients_g + small
    assert abs(after) < small
    # D's backward pass frees its activations as it goes: they are all there, with both kinds of images in one batch,
    # before the large layers' gradients are.
    assert peak < generators + 5.5 * MAP + 2 * IMAGES + gradients_d


@pytest.mark.parametrize("phase", ["discriminator", "generator"])
def test_the_count_sees_what_is_kept(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    kept = []

    def keep(step: TrainStep) -> None:
        loss = f"{phase}_loss"
        whole = getattr(step, loss)

        def and_keep(*images: Tensor) -> object:
            kept.append([image * 1 for image in images])
            return whole(*images)

        monkeypatch.setattr(step, loss, and_keep)

    sound, _ = held(monkeypatch)
    faulty, _ = held(monkeypatch, keep)
    more = [b - a for a, b in zip(sound, faulty, strict=True)]
    expected = 2 * IMAGES if phase == "discriminator" else IMAGES
    assert more == [expected if phase == "discriminator" else 0, expected, expected]
