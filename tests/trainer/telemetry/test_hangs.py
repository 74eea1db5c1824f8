"""When a rank hangs, decided from heartbeats: tables, and properties of any run."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.telemetry.hangs import ASLEEP_SECONDS, SLOWER, STEP_SECTIONS, Beat, Late, Limits, Watch
from internlm_trainer.telemetry.stacks import parse_stacks

LIMITS = Limits(setup=100, step=10, checkpoint=50)


def beat(section: str, step: int = 0, rank: int = 0) -> Beat:
    return Beat(rank, 1000 + rank, section, step)


def watched(watch: Watch, beats: Iterable[Beat], start: float, seconds: float) -> Late | None:
    """Look once a second for so long while nothing moves; the last verdict."""
    late = None
    for second in range(int(seconds) + 1):
        late = watch.look(beats, start + second)
    return late


def trained(step_seconds: float = 1.0, ranks: int = 1) -> tuple[Watch, float]:
    """A watch that has seen ten steps, and the time when the last one ended."""
    watch, now = Watch(LIMITS), 0.0
    watch.look([beat("setup", 0, rank) for rank in range(ranks)], now)
    for step in range(11):
        for section in STEP_SECTIONS:
            watch.look([beat(section, step, rank) for rank in range(ranks)], now)
            now += step_seconds / len(STEP_SECTIONS)
    return watch, now


@pytest.mark.parametrize(
    ("section", "seconds", "hangs"),
    [
        ("fwd_bwd", 10, False),
        ("fwd_bwd", 12, True),
        ("data", 12, True),
        ("checkpoint", 50, False),
        ("checkpoint", 52, True),
        ("evaluation", 50, False),
        ("evaluation", 52, True),
        ("done", 100, False),
        ("done", 102, True),
    ],
)
def test_each_section_has_its_limit_once_steps_are_known(section: str, seconds: int, hangs: bool) -> None:
    watch, now = trained()
    late = watched(watch, [beat(section, 11)], now, seconds)
    assert (late is not None) == hangs


@pytest.mark.parametrize(
    ("section", "seconds", "hangs"),
    [
        ("setup", 100, False),
        ("setup", 102, True),
        ("prepare", 10**4, False),
        ("fwd_bwd", 100, False),
        ("fwd_bwd", 102, True),
    ],
)
def test_until_the_first_steps_are_done_the_limit_of_the_set_up_holds(
    section: str, seconds: int, hangs: bool
) -> None:
    late = watched(Watch(LIMITS), [beat(section)], 0, seconds)
    assert (late is not None) == hangs


def test_a_limit_of_0_never_ends() -> None:
    watch = Watch(Limits(0, 0, 0))
    assert watched(watch, [beat("setup")], 0, 10**4) is None


def test_slow_steps_stretch_the_limits() -> None:
    watch, now = trained(step_seconds=8.0)
    assert watch.limit("fwd_bwd") == pytest.approx(SLOWER * 8)
    assert watched(watch, [beat("fwd_bwd", 11)], now, 70) is None


def test_who_is_behind_is_judged_and_not_who_waits_for_it() -> None:
    watch, now = trained(ranks=3)
    beats = [beat("data", 12, 0), beat("fwd_bwd", 11, 1), beat("data", 12, 2)]
    late = watched(watch, beats, now, 12)
    assert late is not None
    assert late.beat.rank == 1
    # Rank 1 saves for long, as it may: the others wait, and nobody hangs.
    watch, now = trained(ranks=3)
    assert (
        watched(watch, [beat("data", 11, 0), beat("checkpoint", 11, 1), beat("data", 11, 2)], now, 40) is None
    )


def test_a_watcher_that_was_asleep_itself_accuses_nobody() -> None:
    watch, now = trained()
    stuck = [beat("fwd_bwd", 11)]
    assert watch.look(stuck, now) is None
    assert watch.look(stuck, now + 1000) is None
    assert watched(watch, stuck, now + 1000, 12) is not None


@given(
    st.lists(
        st.tuples(st.sampled_from((*STEP_SECTIONS, "checkpoint")), st.floats(0, 9.9)), min_size=1, max_size=60
    ),
    st.integers(1, 4),
)
def test_a_rank_that_moves_within_the_limits_is_never_late(
    stays: list[tuple[str, float]], ranks: int
) -> None:
    watch, now = Watch(LIMITS), 0.0
    for step, (section, seconds) in enumerate(stays):
        beats = [beat(section, step, rank) for rank in range(ranks)]
        assert watch.look(beats, now) is None
        now += min(seconds, ASLEEP_SECONDS)
        assert watch.look(beats, now) is None


@given(st.floats(0.01, 50), st.integers(1, 4), st.integers(0, 3))
def test_a_rank_that_stands_still_is_found_in_time_whatever_the_others_do(
    step_seconds: float, ranks: int, stuck: int
) -> None:
    stuck %= ranks
    watch, now = trained(step_seconds, ranks)
    limit = watch.limit("fwd_bwd")
    beats = [beat("fwd_bwd" if rank == stuck else "reduce", 11, rank) for rank in range(ranks)]
    late = watched(watch, beats, now, limit + 2)
    assert late is not None
    assert late.beat.rank == stuck
    assert limit <= max(LIMITS.step, SLOWER * step_seconds * 1.01)


DUMP = """\
Thread 0x00007f520f0276c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/usr/lib/python3.11/threading.py", line 622 in wait

Thread 0x00007f520f8286c0 (most recent call first):
  File "/app/plugin.py", line 7 in spin

Current thread 0x00007f5210669b80 (most recent call first):
  File "/lib/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/app/train.py", line 160 in train_step
"""
CRASH = """\
Fatal Python error: Segmentation fault

Current thread 0x00007f5210669b80 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "<string>", line 1 in <module>

Extension modules: numpy (total: 1)
"""


def test_the_telling_line_of_a_dump_names_the_main_thread_and_one_that_is_busy() -> None:
    stacks = parse_stacks(DUMP)
    assert stacks is not None
    assert stacks.in_collective
    assert (
        stacks.telling
        == "all_reduce (distributed/distributed_c10d.py:3000); another thread in spin (app/plugin.py:7)"
    )


def test_the_telling_line_of_a_crash_names_what_it_died_of() -> None:
    stacks = parse_stacks(DUMP + CRASH)
    assert stacks is not None
    assert stacks.telling == "Segmentation fault: string_at (ctypes/__init__.py:519)"


@pytest.mark.parametrize("text", ["", "Fatal Python error: Aborted\n", "  File x\n", "noise"])
def test_what_is_no_dump_gives_none(text: str) -> None:
    assert parse_stacks(text) is None
