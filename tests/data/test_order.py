"""The order of the images: permutations, shards, positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.data.order import Order, Position, permutation, random_places


def test_every_epoch_is_a_new_permutation_of_all_images() -> None:
    first, second = permutation(100, 0, 0), permutation(100, 0, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert list(first) != list(second) != list(permutation(100, 1, 1))


def test_the_order_never_changes_between_versions() -> None:
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(5, 7, 3).tolist() == [2, 4, 3, 1, 0]


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 50),
    world_size=st.integers(1, 4),
    start=st.integers(0, 120),
    length=st.integers(1, 80),
    seed=st.integers(0, 3),
)
def test_ranks_interleave_to_the_order_of_one_process(
    count: int, world_size: int, start: int, length: int, seed: int
) -> None:
    whole = Order(count, seed).slice(start * world_size, length * world_size)
    shares = [Order(count, seed, rank, world_size).slice(start, length) for rank in range(world_size)]
    assert np.array_equal(np.stack(shares, axis=1).ravel(), whole)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 40), length=st.integers(1, 60), start=st.integers(0, 60), data=st.data())
def test_taking_passes_over_the_unusable_and_says_where_to_go_on(
    count: int, length: int, start: int, data: st.DataObject
) -> None:
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any)))
    order = Order(count, 3)
    images, after = order.take(start, length, usable)
    raw = order.slice(start, int(after[-1]) - start)
    assert raw[usable[raw]].tolist() == images.tolist()
    half = length // 2
    if half:
        rest, _ = order.take(int(after[half - 1]), length - half, usable)
        assert np.array_equal(images[half:], rest)


@given(taken=st.integers(0, 100), before=st.integers(1, 6), now=st.integers(1, 6))
def test_another_number_of_ranks_goes_on_where_the_others_were(taken: int, before: int, now: int) -> None:
    state = Position(taken, images=7).state(Order(50, 0, before - 1, before), np.ones(50, dtype=bool))
    elements = []
    for rank in range(now):
        position = Position.resume(Order(50, 0, rank, now), state)
        assert position.images == 7
        elements += [rank + now * k for k in range(position.taken, position.taken + 3)]
    assert sorted(elements) == list(range(taken * before, taken * before + 3 * now))


def test_random_places_never_change_between_versions_and_differ_by_epoch() -> None:
    places = random_places(1000, 7, 2)
    assert places[:2].tolist() == [[0.5231147502091889, 0.11689063983412185], [0.08882013347818207, 0.5943736912593107]]
    assert 0 <= places.min() < 0.01 < 0.99 < places.max() < 1
    assert abs(places.mean() - 0.5) < 0.02
    others = [random_places(1000, 7, 3), random_places(1000, 8, 2)]
    assert not any((places == other).any() for other in others)


def test_a_position_in_a_set_that_has_grown_begins_a_new_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    state = Position(taken=70, images=70).state(Order(50, 0), np.ones(50, dtype=bool))
    assert Position.resume(Order(60, 0), state).taken == 120
    assert "the data changed: 60 files where there were 50" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "now"), [(10, 5), (10, 25), (10, 9)])
def test_a_new_epoch_of_a_set_that_has_changed_is_the_next_one(before: int, now: int) -> None:
    """Counted in the epochs that there were, whether the set has grown or shrunk."""
    for taken, epoch in ((0, 0), (1, 1), (10, 1), (17, 2)):
        state = Position(taken, taken).state(Order(before, 0), np.ones(before, dtype=bool))
        assert Position.resume(Order(now, 0), state) == Position(epoch * now, taken)
