"""The mix of sources: as even as whole rows allow, and continued from counts alone."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.data.mixture import next_sources

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("weights", "order"),
    [
        ([1.0], [0, 0, 0]),
        ([1.0, 1.0], [0, 1, 0, 1]),
        ([3.0, 1.0], [0, 0, 1, 0] * 2),
        ([0.6, 0.4], [0, 1, 0, 1, 0] * 2),
    ],
)
def test_the_source_furthest_behind_is_next(weights: list[float], order: list[int]) -> None:
    assert next_sources([0] * len(weights), weights, len(order)) == order


@given(weights=WEIGHTS, first=st.integers(0, 200), then=st.integers(0, 200))
def test_the_order_continues_from_the_counts(weights: list[float], first: int, then: int) -> None:
    whole = next_sources([0] * len(weights), weights, first + then)
    counts = [whole[:first].count(source) for source in range(len(weights))]
    assert next_sources(counts, weights, then) == whole[first:]


@given(weights=WEIGHTS, rows=st.integers(0, 300))
def test_no_source_ever_strays_from_its_share(weights: list[float], rows: int) -> None:
    taken = [0] * len(weights)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    rounding = Fraction(1, 10**6)
    for n, source in enumerate(next_sources(taken, weights, rows), start=1):
        taken[source] += 1
        for count, share in zip(taken, shares, strict=True):
            assert n * share - (len(weights) - 1) - rounding <= count <= n * share + 1 + rounding
