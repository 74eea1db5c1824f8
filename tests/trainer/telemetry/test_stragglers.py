"""Which rank is slow, by relative score."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.telemetry.stragglers import LASTING, SLOW, Slowest, Stragglers, slowest


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([100, 100, 130, 100], Slowest(2, 1.3)),
        ([50, 100], Slowest(1, 100 / 75)),
        ([100], None),
        ([0, 0, 0], None),
        ([], None),
    ],
)
def test_the_slowest_rank_is_scored_against_the_median(times: list[int], found: Slowest | None) -> None:
    assert slowest(times) == found


@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=64), st.integers(2, 1000))
def test_a_score_is_at_least_1_and_does_not_depend_on_the_unit(times: list[int], unit: int) -> None:
    found = slowest(times)
    assert found is not None
    assert found.score >= 1
    scaled = slowest([time * unit for time in times])
    assert scaled is not None
    assert (scaled.rank, scaled.score) == (found.rank, pytest.approx(found.score))


def test_a_rank_is_told_once_when_it_stays_slow_and_again_only_after_it_was_not() -> None:
    slow, even = Slowest(3, SLOW), Slowest(3, 1.05)
    stragglers = Stragglers()
    assert [stragglers.lasting(slow) for _ in range(LASTING + 3)] == [False] * (LASTING - 1) + [True] + [
        False
    ] * 3
    assert not stragglers.lasting(even)
    assert not stragglers.lasting(None)
    assert [stragglers.lasting(slow) for _ in range(LASTING)] == [False] * (LASTING - 1) + [True]


def test_ranks_that_are_slow_in_turn_are_no_stragglers() -> None:
    stragglers = Stragglers()
    assert not any(stragglers.lasting(Slowest(turn % 2, 2.0)) for turn in range(20))
