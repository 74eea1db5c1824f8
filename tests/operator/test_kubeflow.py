"""Kubeflow's progress contract, as a report of ours. Its real clients are in test_channel.py."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import World, make_report

from internlm_operator import kubeflow


def convert(last: Any = None, **status: Any) -> dict[str, Any]:
    content = kubeflow.ProgressStatus.model_validate({"trainerStatus": status})
    report = kubeflow.to_report(content, 3, last)
    assert report is not None
    assert report.attempt == 3
    return report.model_dump(by_alias=True, exclude_defaults=True, exclude={"attempt"})


def metrics(**values: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


LAST = make_report(attempt=3, startStep=30, step=40, totalSteps=200, loss=2.5)


@pytest.mark.parametrize(
    ("last", "status", "expected"),
    [
        (None, {"progressPercentage": 45}, {"startStep": 45, "step": 45, "totalSteps": 100}),
        (LAST, {"progressPercentage": 50}, {"startStep": 30, "step": 100, "totalSteps": 200, "loss": 2.5}),
        (
            None,
            {
                "progressPercentage": 10,
                "estimatedRemainingSeconds": 60,
                "metrics": metrics(current_step="7", total_steps="64", loss="2.25", eval_loss="2.5"),
            },
            {
                "startStep": 7,
                "step": 7,
                "totalSteps": 64,
                "loss": 2.25,
                "validationLoss": 2.5,
                "etaSeconds": 60,
            },
        ),
        (
            LAST,
            {"metrics": metrics(loss="nan", total_steps="-1")},
            {"startStep": 30, "step": 40, "totalSteps": 200, "loss": 2.5},
        ),
        (None, {"metrics": metrics(accuracy="0.9", stage="warm-up")}, {"step": 0, "totalSteps": 100}),
    ],
)
def test_percentages_and_metrics_become_steps_and_losses(
    last: Any, status: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert convert(last, **status) == expected


def tell(world: World, attempt: int, last: Any, **status: Any) -> Any:
    """An attempt's report comes, after `last`; returns it."""
    content = kubeflow.ProgressStatus.model_validate({"trainerStatus": status})
    report = kubeflow.to_report(content, attempt, last)
    assert report is not None
    world.wait(10)
    world.tell(report)
    world.settle()
    return report


def test_an_attempt_began_where_its_first_step_is_told_whatever_an_operator_hears_of_it_later() -> None:
    world = World()
    for attempt, steps in ((1, ("1", "60")), (2, ("51", "80"))):
        world.start()
        # So does Transformers begin, also where it resumes.
        last = tell(world, attempt, None, progressPercentage=0, metrics=metrics(total_steps="400"))
        for step in steps:
            last = tell(world, attempt, last, metrics=metrics(current_step=step))
        if attempt == 1:
            world.end(0, 1)
            world.settle()
            assert world.status["lastFailure"]["lostSteps"] == 59
            world.reap()
    tell(world, 2, None, metrics=metrics(current_step="90"))  # to an operator that has just taken over
    assert [(a["startStep"], a["endStep"]) for a in world.status["attempts"]] == [(1, 60), (51, 90)]
    assert world.status["lastFailure"]["lostSteps"] == 9
    assert world.status["attemptsWithoutProgress"] == 0


def test_a_request_that_says_nothing_changes_nothing() -> None:
    assert kubeflow.to_report(kubeflow.ProgressStatus.model_validate({}), 1, None) is None
