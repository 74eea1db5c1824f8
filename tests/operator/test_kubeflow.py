"""Kubeflow's progress contract, as a report of ours. Its real clients are in test_operator_process.py."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import make_report

from internlm_operator import kubeflow


def convert(last: Any = None, **status: Any) -> dict[str, Any]:
    content = kubeflow.ProgressStatus.model_validate({"trainerStatus": status})
    report = kubeflow.to_report(content, 3, last)
    assert report is not None
    assert report.attempt == 3
    return report.model_dump(by_alias=True, exclude_defaults=True, exclude={"attempt"})


def metrics(**values: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


LAST = make_report(attempt=3, step=40, totalSteps=200, loss=2.5)


@pytest.mark.parametrize(
    ("last", "status", "expected"),
    [
        (None, {"progressPercentage": 45}, {"step": 45, "totalSteps": 100}),
        (LAST, {"progressPercentage": 50}, {"step": 100, "totalSteps": 200, "loss": 2.5}),
        (
            None,
            {
                "progressPercentage": 10,
                "estimatedRemainingSeconds": 60,
                "metrics": metrics(current_step="7", total_steps="64", loss="2.25", eval_loss="2.5"),
            },
            {"step": 7, "totalSteps": 64, "loss": 2.25, "validationLoss": 2.5, "etaSeconds": 60},
        ),
        (
            LAST,
            {"metrics": metrics(loss="nan", total_steps="-1")},
            {"step": 40, "totalSteps": 200, "loss": 2.5},
        ),
        (None, {"metrics": metrics(accuracy="0.9", stage="warm-up")}, {"step": 0, "totalSteps": 100}),
    ],
)
def test_percentages_and_metrics_become_steps_and_losses(
    last: Any, status: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert convert(last, **status) == expected


def test_a_request_that_says_nothing_changes_nothing() -> None:
    assert kubeflow.to_report(kubeflow.ProgressStatus.model_validate({}), 1, None) is None
