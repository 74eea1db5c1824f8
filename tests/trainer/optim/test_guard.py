"""Which updates are skipped: the guard's tensors against the same rules in plain numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_trainer.config import LossScaleSpec, SkipSpec
from internlm_trainer.optim.guard import Counts, SkipGuard
from internlm_trainer.optim.loss_scale import LossScale

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
Step = tuple[float, float]


def spec(window: int = 8, threshold: int = 6) -> SkipSpec:
    return SkipSpec.model_validate({"window": window, "spikeThreshold": threshold})


def run(guard: SkipGuard, steps: list[Step], first: int = 1) -> list[bool]:
    return [
        bool(guard.judge(number, torch.tensor(loss), torch.tensor(norm)))
        for number, (loss, norm) in enumerate(steps, first)
    ]


def reference(steps: list[Step], window: int, threshold: int) -> list[bool | None]:
    """The rules in words: a list of the steps so far, looked at one by one.  None: too close to call."""
    past: list[list[float]] = []
    skips: list[bool | None] = []
    for step in steps:
        skip: bool | None = not all(map(math.isfinite, step))
        logs = [math.log(max(value, 1e-30)) for value in step if math.isfinite(value)]
        if not skip and threshold and len(past) >= window:
            seen = np.array(past[-window:])
            median = np.sort(seen, 0)[(window - 1) // 2]
            mad = np.sort(np.abs(seen - median), 0)[(window - 1) // 2]
            highest = ((np.array(logs) - median) / np.maximum(1.4826 * mad, 0.01)).max()
            skip = None if abs(highest / threshold - 1) < 1e-3 else bool(highest > threshold)
        if len(logs) == 2:
            past.append(logs)
        skips.append(skip)
    return skips


NUMBERS = st.one_of(
    st.floats(1.0, 3.0, width=32), st.floats(0.0, 2.0**20, width=32), st.sampled_from([NAN, INF, -INF])
)
STEPS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=60)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, window=st.sampled_from([8, 9, 16]), threshold=st.sampled_from([0, 1, 6]))
def test_the_guard_decides_as_the_rules_do(steps: list[Step], window: int, threshold: int) -> None:
    guard = SkipGuard(spec(window, threshold), CPU)
    found = run(guard, steps)
    expected = [
        skip if rule is None else rule
        for skip, rule in zip(found, reference(steps, window, threshold), strict=True)
    ]
    assert found == expected
    in_a_row = next((n for n, skip in enumerate(reversed(expected)) if not skip), len(expected))
    last = max((number for number, skip in enumerate(expected, 1) if skip), default=0)
    assert guard.read() == Counts(sum(expected), in_a_row, last)


@settings(max_examples=30, deadline=None)
@given(steps=STEPS, at=st.integers(0, 60))
def test_a_guard_restored_from_json_decides_as_the_one_that_was_never_interrupted(
    steps: list[Step], at: int
) -> None:
    whole = SkipGuard(spec(), CPU)
    expected = run(whole, steps)
    before, after = SkipGuard(spec(), CPU), SkipGuard(spec(), CPU)
    run(before, steps[:at])
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert run(after, steps[at:], at + 1) == expected[at:]
    assert after.state_dict() == whole.state_dict()


CALM: list[Step] = [(2.0 + 0.01 * (n % 5), 1.0 + 0.1 * (n % 3)) for n in range(8)]


@pytest.mark.parametrize(
    ("steps", "skips"),
    [
        ([(NAN, 1.0), (2.0, INF), (2.0, 1.0)], [True, True, False]),
        ([(2.0, 1.0), (99.0, 99.0)], [False, False]),  # nothing is a spike before the window is full
        ([*CALM, (99.0, 1.0), (2.0, 1.0)], [*[False] * 8, True, False]),
        ([*CALM, *[(2.0, 99.0)] * 6], [*[False] * 8, *[True] * 5, False]),  # what lasts becomes normal
        ([*CALM, (0.1, 0.001)], [False] * 9),  # less is no fault
        ([*[(2.0, 1.0)] * 8, (2.1, 1.05), (2.2, 1.0)], [*[False] * 9, True]),  # 6% of what never varied
    ],
)
def test_steps_and_what_becomes_of_them(steps: list[Step], skips: list[bool]) -> None:
    assert run(SkipGuard(spec(), CPU), steps) == skips


def test_with_another_window_the_counts_go_on_and_the_window_fills_anew() -> None:
    before, after = SkipGuard(spec(8), CPU), SkipGuard(spec(9), CPU)
    run(before, [*CALM, (99.0, 1.0)])
    after.load_state_dict(before.state_dict())
    assert after.read() == Counts(1, 1, 9)
    assert run(after, [(99.0, 1.0)], 10) == [False]


def test_an_overflow_in_fp16_is_skipped_and_counted_but_not_as_one_of_many_in_a_row() -> None:
    guard = SkipGuard(spec(), CPU, LossScale(LossScaleSpec(initial=4), 1, CPU))
    counts, scales = [], []
    for number in range(1, 5):
        assert guard.judge(number, torch.tensor(2.0), torch.tensor(INF))
        counts.append(guard.read().in_a_row)
        scales.append(float(guard.scale or 0))
    assert scales == [2.0, 1.0, 1.0, 1.0]
    assert counts == [0, 0, 1, 2]  # at the smallest scale it is no matter of scale any more
    assert guard.judge(5, torch.tensor(NAN), torch.tensor(NAN))
    assert guard.read() == Counts(5, 3, 5)
