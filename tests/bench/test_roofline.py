from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdcgan import reference, winograd
from fastdcgan.bench import roofline
from fastdcgan.bench.roofline import Pass, Rates, floor_seconds, layer_table, measure_rates, step_passes


def flops(*, batch: int, size: int, width: int, **which: str) -> int:
    passes = step_passes(batch, (size, size), 3, 100, width, "fp32")
    return sum(row.flops for row in passes if all(getattr(row, name) == value for name, value in which.items()))


@pytest.mark.parametrize("size", [16, 28, 32, 64])
def test_forward_flops_are_those_torch_counts(size):
    generator, discriminator = reference.Generator(size, 3, 100, 8), reference.Discriminator(size, 3, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        discriminator(generator(torch.zeros(4, 100)))
    counted = counter.get_total_flops()
    discriminator_alone = flops(batch=4, size=size, width=8, phase="G update", direction="forward")
    d_update = flops(batch=4, size=size, width=8, phase="D update", direction="forward")
    generator_alone = d_update - 2 * discriminator_alone  # real and fake
    assert generator_alone + discriminator_alone == counted


def test_the_exact_step_needs_less_than_the_step_as_usually_written():
    """At 64x64: what is left out is the discriminator's weight gradients in the generator's update."""
    passes = step_passes(1, (64, 64), 3, 100, 64, "fp32")
    needed = sum(row.flops for row in passes)
    unused = sum(row.flops for row in passes if row.phase == "D update" and row.direction == "weight gradient") // 2
    assert needed == pytest.approx(2.27e9, rel=0.01)
    assert needed + unused == pytest.approx(2.48e9, rel=0.01)


def test_no_gradients_nobody_uses():
    passes = step_passes(8, (32, 32), 3, 100, 16, "fp32")
    gradients = {(row.phase, row.layer, row.direction) for row in passes}
    assert ("D update", "D 0 Conv2d", "input gradient") not in gradients
    assert ("G update", "G 0 ConvTranspose2d", "input gradient") not in gradients
    assert not [g for g in gradients if g[0] == "G update" and g[1].startswith("D") and g[2] == "weight gradient"]
    assert ("G update", "D 0 Conv2d", "input gradient") in gradients


def test_a_pass_takes_the_longer_of_arithmetic_and_memory():
    rates = Rates(matrix=100.0, copy=10.0)
    assert rates.seconds(Pass("", "", "", flops=200, bytes=10)) == 2
    assert rates.seconds(Pass("", "", "", flops=200, bytes=50)) == 5
    assert floor_seconds([Pass("", "", "", 200, 10), Pass("", "", "", 0, 50)], rates) == 7


def test_low_precision_moves_fewer_bytes_but_the_same_flops():
    full, low = (step_passes(8, (32, 32), 1, 100, 16, precision) for precision in ("fp32", "bf16"))
    assert sum(row.flops for row in full) == sum(row.flops for row in low)
    assert sum(row.bytes for row in low) < 0.7 * sum(row.bytes for row in full)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 1_565_152_768), ("bf16", 871_761_408)])
def test_bytes_added_up_by_hand(precision, expected):
    """Of 64 images: each convolution's operands and result once, BatchNorm 3 passes forward and 5 back, and Adam's
    reads and writes of float32 weights, moments and gradients."""
    passes = step_passes(64, (64, 64), 3, 100, 64, precision)
    assert (sum(row.bytes for row in passes), sum(row.flops for row in passes)) == (expected, 145_575_903_232)


def test_winograds_convolutions_multiply_25_times_where_direct_ones_do_64(monkeypatch):
    """At 64x64, width 64: the three between feature maps of each network, where the batch has 32 tiles."""
    monkeypatch.setattr(winograd, "_limits", lambda channels: winograd.IN_TORCH)
    for batch in (16, 32):  # the smallest grid has a tile an image, of which the discriminator sees two at a time
        direct, less = (step_passes(batch, (64, 64), 3, 100, 64, "fp32", by_winograd=each) for each in (False, True))
        fewer = {(a.phase, a.layer) for a, b in zip(direct, less, strict=True) if a != b}
        ours = {f"D {i} Conv2d" for i in (2, 5, 8)}, {f"G {i} ConvTranspose2d" for i in (3, 6, 9)}
        expected = {("D update", layer) for layer in ours[0] | ours[1]} | {("G update", x) for x in ours[0] | ours[1]}
        if batch == 16:
            expected -= {
                ("G update", "D 8 Conv2d"),
                ("D update", "G 3 ConvTranspose2d"),
                ("G update", "G 3 ConvTranspose2d"),
            }
        assert fewer == expected
        for a, b in zip(direct, less, strict=True):
            assert b.bytes == a.bytes and (b.flops == a.flops or b.flops * 64 == a.flops * 25)


def test_winograds_channels_are_those_of_the_larger_grid(monkeypatch):
    """So none of the convolutions between images and feature maps, however many channels those have."""
    monkeypatch.setattr(winograd, "_limits", lambda channels: winograd.IN_C)
    direct, less = (step_passes(32, (64, 64), 3, 100, 64, "fp32", by_winograd=each) for each in (False, True))
    fewer = {a.layer for a, b in zip(direct, less, strict=True) if a != b}
    assert fewer == {*(f"D {i} Conv2d" for i in (2, 5, 8)), *(f"G {i} ConvTranspose2d" for i in (3, 6, 9))}


def test_rates_are_measured_and_the_table_adds_up(monkeypatch):
    rates = measure_rates(torch.device("cpu"), "fp32")
    assert rates.matrix > 1e9 and rates.copy > 1e8
    passes = step_passes(2, (16, 16), 3, 10, 4, "fp32")
    assert f"{floor_seconds(passes, rates) * 1e6:.1f}" in layer_table(passes, rates).splitlines()[-1]


def test_rates_count_both_operations_of_a_product_and_both_ways_of_a_copy(monkeypatch):
    took = iter([1e-3, 2e-4, 1e-2])  # a matrix product, a convolution, a copy
    monkeypatch.setattr(roofline, "_best_seconds", lambda *_: next(took))
    rates = measure_rates(torch.device("cpu"), "fp32")
    convolution = 2 * (32 * 30 * 30) * (256 * 256 * 3 * 3)
    assert rates.matrix == pytest.approx(max(2 * 2048**3 / 1e-3, convolution / 2e-4))
    assert rates.copy == pytest.approx(2 * 2**28 / 1e-2)
    took = iter([1e-3, 1.0, 1e-2])
    assert measure_rates(torch.device("cpu"), "fp32").matrix == pytest.approx(2 * 2048**3 / 1e-3)


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_rates_are_those_of_the_precision_and_no_switch_stays(precision, monkeypatch):
    seen = []

    def noted(*operands, out=None):
        if operands[0].dtype != torch.uint8:
            switches = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            seen.append((operands[0].dtype, *switches))

    monkeypatch.setattr(roofline, "_best_seconds", lambda work, device: work() is None or 1.0)
    monkeypatch.setattr(torch, "mm", noted)
    monkeypatch.setattr(torch, "conv2d", noted)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    measure_rates(torch.device("cpu"), precision)
    assert seen == [(roofline.DTYPES[precision], precision == "tf32", precision == "tf32")] * 2
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_seconds_are_of_one_call_in_the_fastest_round_until_the_device_is_done(monkeypatch):
    """With a stand-in for a GPU, whose work takes its time after the call has returned."""
    now, waiting, rounds = [100.0], [0.0], iter([9.0, 4.0, 2.0, 3.0, 5.0, 6.0, 7.0])
    cost = [0.0]

    def wait(device):
        now[0] += waiting[0]
        waiting[0], cost[0] = 0.0, 0.0

    def work():
        cost[0] = cost[0] or next(rounds)
        waiting[0] += cost[0]

    monkeypatch.setattr(roofline, "synchronize", wait)
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now[0])
    assert roofline._best_seconds(work, torch.device("cuda")) == 2


def test_the_layer_table_has_units_and_says_what_decides():
    passes = [
        Pass("D update", "D 0 Conv2d", "forward", 3 * 10**9, 5 * 10**6),
        Pass("G update", "G", "update", 0, 10**7),
    ]
    _, first, second, total = layer_table(passes, Rates(matrix=1e12, copy=1e10)).splitlines()
    assert first.split()[-4:] == ["3.000", "5.00", "3000.0", "matrix"]
    assert second.split()[-4:] == ["0.000", "10.00", "1000.0", "memory"]
    assert total.split() == ["sum", "3.000", "15.00", "4000.0"]
