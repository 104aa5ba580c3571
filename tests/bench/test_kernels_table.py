from __future__ import annotations

from fastdcgan.bench.kernels_table import verdict


def row(variant, ms, fraction=0.9, shape=(2048, 64, 32, 32), **others):
    return {
        "shape": list(shape), "groups": 2, "dtype": "bf16", "variant": variant, "pass": "forward", "timer": "cold",
        "ms": ms, "gb_per_s": 1000.0, "copy_gb_per_s": 1000.0, "fraction_of_copy": fraction, **others,
    }  # fmt: skip


def test_a_faster_rival_and_the_share_of_a_copy_are_named():
    slower = [row("fused", 1.0, 0.88), row("tuned", 0.75), row("compiled", 2.0), {"error": "no", "variant": "eager"}]
    named, share = verdict(slower)
    assert named.endswith("tuned takes 75% of that") and "2048x64x32x32" in named
    assert share == "forward, larger than L2: 88% to 88% of a copy's bandwidth"


def test_nothing_is_said_of_small_tensors_where_nobody_is_faster():
    assert verdict([row("fused", 1.0, shape=(64, 512, 4, 4)), row("tuned", 1.5, shape=(64, 512, 4, 4))]) == []
    assert verdict([row("fused", 1.0), row("tuned", 0.5, groups=1)])[0].startswith("forward, larger"), "other groups"
