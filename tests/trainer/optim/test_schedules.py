"""Schedules that are functions of the step or of the tokens alone: beta2 and the growing batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer import config
from internlm_trainer.config import OptimizerSpec, TrainSpec
from internlm_trainer.optim.schedule import beta2
from internlm_trainer.rules import broken_rules


@pytest.mark.parametrize(
    ("exponent", "step", "value"),
    [
        (0.0, 0, 0.9),
        (0.0, 10**6, 0.9),
        (0.5, 0, 0.9),  # InternLM's scheduler starts to count after the first update
        (0.5, 1, 0.9),
        (0.5, 100, 0.9),
        (0.5, 400, 0.95),
        (0.8, 10**5, 0.9999),
    ],
)
def test_beta2_of_a_step(exponent: float, step: int, value: float) -> None:
    spec = OptimizerSpec.model_validate({"betas": [0.9, 0.9], "beta2Exponent": exponent})
    assert beta2(spec, step) == pytest.approx(value)


def job(ramp: tuple[int, int, int] | None, full: int = 64, **training: int) -> TrainSpec:
    """Rows of 8 tokens; batches of `full`."""
    names = ("startTokens", "incrementTokens", "overTokens")
    return TrainSpec.model_validate(
        {
            "model": {"layers": 1, "hiddenSize": 8, "heads": 1, "vocabSize": 512, "seqLen": 8},
            "data": {"tokenizer": "t", "train": [{"path": "d"}]},
            "training": {
                "globalBatchTokens": full,
                "batchRampUp": dict(zip(names, ramp, strict=True)) if ramp else None,
            }
            | (training or {"steps": 1}),
            "checkpoint": {"path": "c"},
        }
    )


@pytest.mark.parametrize(
    ("ramp", "tokens", "batches"),
    [
        (None, 150, [64, 64, 64]),
        ((16, 16, 96), 250, [16, 16, 32, 48, 64, 64, 64]),  # more from 32, from 64 and from 96 tokens on
        ((16, 48, 64), 200, [16, 16, 16, 16, 64, 64, 64]),  # one increment: whole from 64 tokens on
        ((16, 16, 96), 40, [16, 16, 32]),  # the end comes first
        ((16, 16, 3), 100, [16, 64, 64]),  # over before it began
    ],
)
def test_the_batches_of_a_job(ramp: tuple[int, int, int] | None, tokens: int, batches: list[int]) -> None:
    spec, consumed, found = job(ramp, tokens=tokens), 0, []
    while consumed < tokens:
        found.append(config.batch_tokens(spec, 1, consumed))
        consumed += found[-1]
    assert found == batches
    assert config.total_steps(spec, 1) == len(batches)


@given(
    rows=st.integers(1, 20),
    step=st.integers(1, 8),
    count=st.integers(1, 12),
    world=st.integers(1, 4),
    over=st.integers(1, 5000),
    tokens=st.integers(1, 20000),
)
def test_a_ramp_grows_in_whole_rows_to_the_full_batch_and_its_steps_are_counted(
    rows: int, step: int, count: int, world: int, over: int, tokens: int
) -> None:
    at_once = 8 * world
    start, increment = rows * at_once, step * at_once
    full = start + count * increment
    spec = job((start, increment, over), full, tokens=tokens)
    assert [rule.path for rule in broken_rules(spec, world)] == []
    consumed, batches = 0, []
    while consumed < tokens:
        batches.append(config.batch_tokens(spec, world, consumed))
        consumed += batches[-1]
    assert batches == sorted(batches)
    assert batches[0] == start
    assert all(batch % at_once == 0 for batch in batches)
    assert config.batch_tokens(spec, world, over) == full
    assert config.total_steps(spec, world) == len(batches)


@pytest.mark.parametrize(
    ("ramp", "path"),
    [
        ((12, 16, 96), "training.batchRampUp.startTokens"),
        ((64, 16, 96), "training.batchRampUp.startTokens"),
        ((16, 12, 96), "training.batchRampUp.incrementTokens"),
        ((16, 32, 96), "training.batchRampUp.incrementTokens"),
    ],
)
def test_a_ramp_whose_stages_no_rows_make_is_refused(ramp: tuple[int, int, int], path: str) -> None:
    assert path in [rule.path for rule in broken_rules(job(ramp), 1)]
