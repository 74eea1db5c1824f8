"""Kubeflow Trainer's progress contract, so that its clients work in our pods as they are.

The Kubeflow SDK (`update_trainjob_status`), Transformers (its Kubeflow callback, which it adds by itself) and
whatever else follows https://github.com/kubeflow/trainer/tree/master/docs/proposals/2779-trainjob-progress find
the server, its certificate and a token by three environment variables, and post percentages and metrics.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from internlm_operator.report import Message, Report

_MAX_STEPS = 2**53
# What the clients call the same thing: Transformers, and the examples of the Kubeflow documentation.
_STEP = ("current_step", "currentStep", "global_step", "step")
_TOTAL = ("total_steps", "totalSteps", "max_steps")
_LOSS = ("loss", "train_loss")
_VALIDATION_LOSS = ("eval_loss", "validation_loss", "val_loss")


def status_path(namespace: str, name: str) -> str:
    """Path of a job's status on the server."""
    return f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status"


def environment(server: str, namespace: str, name: str, ca_file: str, token_file: str) -> dict[str, str]:
    """The variables by which the clients find the server."""
    return {
        "KUBEFLOW_TRAINER_SERVER_URL": server + status_path(namespace, name),
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": ca_file,
        "KUBEFLOW_TRAINER_SERVER_TOKEN": token_file,
    }


class Metric(Message):
    """A number by its name; the contract sends every value as text."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    value: Annotated[str, Field(max_length=256)]


class TrainerStatus(Message):
    """How far the training is."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    metrics: Annotated[list[Metric], Field(max_length=256)] = []


class ProgressStatus(Message):
    """The body of a request."""

    trainer_status: TrainerStatus | None = None


def to_report(content: ProgressStatus, attempt: int, last: Report | None) -> Report | None:
    """The same as a report of ours; `last` is the attempt's last one, if any. None if it says nothing."""
    status = content.trainer_status
    if status is None:
        return None
    metrics = {
        metric.name: number for metric in status.metrics if (number := _number(metric.value)) is not None
    }

    def find(names: tuple[str, ...]) -> float | None:
        return next((metrics[name] for name in names if name in metrics), None)

    # Without a number of steps, those of the last report; a percentage alone counts as so many of 100.
    total = _whole(find(_TOTAL)) or (last.total_steps if last else 0) or 100
    step = _whole(find(_STEP))
    if step is None and status.progress_percentage is not None:
        step = total * status.progress_percentage // 100
    if step is None:
        step = last.step if last else 0
    # Where it resumed is not told. Transformers begins with 0 % in any case, so the first step beyond that is taken.
    start = last.start_step if last and last.start_step else step
    loss, validation = find(_LOSS), find(_VALIDATION_LOSS)
    return Report.model_validate(
        {
            "attempt": attempt,
            "startStep": start,
            "step": step,
            "totalSteps": total,
            "loss": loss if loss is not None or last is None else last.loss,
            "validationLoss": validation if validation is not None or last is None else last.validation_loss,
            "etaSeconds": status.estimated_remaining_seconds,
        }
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(value: float | None) -> int | None:
    return None if value is None or not 0 <= value <= _MAX_STEPS else int(value)
