"""Which rank is slow, by relative score."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.telemetry.progress import Telemetry
from internlm_trainer.telemetry.report import Reporter
from internlm_trainer.telemetry.sinks import Sinks
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


def test_a_rank_is_a_straggler_from_when_it_stays_slow_until_it_was_not_once() -> None:
    slow, even = Slowest(3, SLOW), Slowest(3, 1.05)
    stragglers = Stragglers()
    for ending in (even, None):
        assert [stragglers.look(slow) for _ in range(LASTING + 3)] == [None] * (LASTING - 1) + [slow] * 4
        assert stragglers.look(ending) is None


def test_ranks_that_are_slow_in_turn_are_no_stragglers() -> None:
    stragglers = Stragglers()
    assert not any(stragglers.look(Slowest(turn % 2, 2.0)) for turn in range(20))


class Kept(Reporter):
    """Keeps what is to be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[dict[str, Any]] = []

    def send(self, report: dict[str, Any]) -> None:
        self.sent.append(report)


def test_a_straggler_is_reported_while_it_lasts_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    reporter = Kept()
    telemetry = Telemetry(10, 0, 1, reporter, Sinks([], 0))
    for found in [Slowest(3, 2.0)] * (LASTING + 2) + [None] * 2:
        telemetry.compared(found)
        telemetry.begin(1.0)
    told = [(report.get("stragglerRank"), report.get("stragglerScore")) for report in reporter.sent]
    assert told == [(None, None)] * (LASTING - 1) + [(3, 2.0)] * 3 + [(None, None)] * 2
    assert [r.message for r in caplog.records if "straggler" in r.message] == [
        "rank 3 is a straggler: it computes 2.00 times as long as the median rank, and all wait for it"
    ]
