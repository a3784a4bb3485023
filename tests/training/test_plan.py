from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.core.errors import UsageError
from equipoise.data.plan import Planner, cost, first_fit

LENGTHS = [(10, (5, 5)), (3, (2, 9)), (40, (1, 1)), (7, (7, 7)), (1, (1, 1)), (20, (30, 4)), (5, (5, 6))]


def test_every_row_once_an_epoch_in_a_fresh_order() -> None:
    planner = Planner((LENGTHS,), batch_size=3, token_budget=50, seed=1)
    assert planner.steps_per_epoch == 3
    epochs = [[row for number in range(3) for row in planner.step(epoch * 3 + number).rows[0]] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]


def test_steps_can_be_asked_for_in_any_order() -> None:
    planner = Planner((LENGTHS,), 3, 50, seed=1)
    forward = [planner.step(number) for number in range(6)]
    backward = [planner.step(number) for number in reversed(range(6))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 45, 1000])
def test_ranks_share_a_step_evenly(world_size: int, budget: int) -> None:
    step = Planner((LENGTHS,), 7, budget, world_size=world_size).step(0)
    assert len({len(cuts) for cuts in step.ranks}) == 1
    done = sorted(row for cuts in step.ranks for micro in cuts if not micro.idle for row in micro.rows)
    assert done == sorted(step.rows[0])
    for cuts in step.ranks:
        for micro in cuts:
            positions = sum(cost(LENGTHS[row], True) for row in micro.rows)
            assert positions <= budget or len(micro.rows) == 1


def test_padded_rows_are_cut_by_their_real_area() -> None:
    planner = Planner((LENGTHS,), 7, 120, shared=False, padded=True)
    for micro in planner.all_rows(0):
        width = max(LENGTHS[row][0] + max(LENGTHS[row][1]) for row in micro.rows)
        assert width * 2 * len(micro.rows) <= 120 or len(micro.rows) == 1


def test_a_buffer_restarts_when_exhausted() -> None:
    planner = Planner((LENGTHS, LENGTHS[:2]), 3, 50)
    taken = [row for number in range(3) for row in planner.step(number).rows[1]]
    assert len(taken) == 7
    assert [sorted(taken[start : start + 2]) for start in (0, 2, 4)] == [[0, 1]] * 3


def test_a_buffer_goes_on_where_a_short_last_step_ended() -> None:
    # 9 rows in steps of 8: every second step takes one row of each stream.
    planner = Planner(([(1, (1,))] * 9, [(1, (1,))] * 16), 8, 50, shuffle=False)
    taken = [row for number in range(40) for row in planner.step(number).rows[1]]
    assert taken == [position % 16 for position in range(20 * 9)]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 60))
def test_first_fit_is_what_looking_at_every_bin_gives(sizes: list[int], budget: int) -> None:
    bins: list[list[int]] = []
    for index, size in enumerate(sizes):
        fitting = (found for found in bins if sum(sizes[other] for other in found) + size <= budget)
        if (first := next(fitting, None)) is None:
            bins.append([index])
        else:
            first.append(index)
    assert first_fit(sizes, budget) == bins


def test_a_whole_epoch_is_cut_in_no_time() -> None:
    sizes = np.random.default_rng(0).integers(20, 900, 160_000).tolist()
    start = time.perf_counter()
    bins = first_fit(sizes, 2048)
    assert time.perf_counter() - start < 15, "looking at every bin took 71 s"
    assert sorted(index for found in bins for index in found) == list(range(160_000))


def test_no_rows_and_too_many_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="no rows"):
        Planner(([],), 1, 1)
    with pytest.raises(UsageError, match="processes"):
        Planner((LENGTHS,), 1, 1, world_size=2)
