"""The time by the API server's clock, learnt from its answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from hypothesis import given
from hypothesis import strategies as st

from internlm_operator.times import ServerClock

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def hear(clock: ServerClock, ahead: float, sent: float, received: float, answered: float) -> None:
    """An answer of a server whose clock is ahead by so much; the other times are by this machine's clock."""
    date = (NOW + timedelta(seconds=answered + ahead)).replace(microsecond=0)
    clock.heard(
        format_datetime(date, usegmt=True), NOW + timedelta(seconds=sent), NOW + timedelta(seconds=received)
    )


@given(
    ahead=st.floats(-0.9, 0.9),
    at=st.floats(0, 1000),
    out=st.floats(0, 5),
    back=st.floats(0, 5),
)
def test_clocks_that_agree_to_a_second_are_one(ahead: float, at: float, out: float, back: float) -> None:
    clock = ServerClock()
    hear(clock, ahead, at, at + out + back, at + out)
    assert clock.ahead == timedelta()


@given(
    ahead=st.floats(-90000, 90000),
    answers=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20),
)
def test_a_clock_that_is_off_is_followed_to_within_seconds(
    ahead: float, answers: list[tuple[float, float]]
) -> None:
    clock, at = ServerClock(), 0.0
    for out, back in answers:
        at += out
        hear(clock, ahead, at - out, at + back, at)
        at += back
        # The answer's date is cut to seconds, its way takes up to two, and another second is tolerated.
        assert abs(clock.ahead.total_seconds() - ahead) < 4


def test_a_clock_that_was_set_right_is_believed_again() -> None:
    clock = ServerClock()
    hear(clock, 60, 0, 0.1, 0.05)
    assert 59 < clock.ahead.total_seconds() < 61
    hear(clock, 0, 1, 1.1, 1.05)
    assert abs(clock.ahead.total_seconds()) < 1


def test_an_answer_without_a_date_says_nothing() -> None:
    clock = ServerClock()
    for date in ("", "yesterday", "Thu, 01 Jan 1970 00:00:00 -0000"):
        clock.heard(date, NOW, NOW)
    assert clock.ahead == timedelta()
