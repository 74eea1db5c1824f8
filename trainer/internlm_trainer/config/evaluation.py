"""`spec.evaluation`: what checkpoints are evaluated on while training goes on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from internlm_trainer.config.base import Spec

TaskName = Literal[
    "mmlu", "ceval", "cmmlu", "agieval", "boolq", "hellaswag", "arc_easy", "arc_challenge", "gsm8k", "choices"
]
_Url = Annotated[str, Field(min_length=1, max_length=1024)]


class ResourcesSpec(Spec):
    """Resources of a container, as Kubernetes has them."""

    requests: dict[str, JsonValue] = {}
    """What it gets in any case, such as `cpu: 4`."""
    limits: dict[str, JsonValue] = {}
    """The most that it gets, such as `memory: 64Gi` or `nvidia.com/gpu: 1`."""


class EvaluationSpec(Spec):
    """Tasks and texts that checkpoints are evaluated on, in a pod of their own, while training goes on.

    The newest checkpoint is evaluated, one at a time; those that come meanwhile wait, and of these only the newest is
    taken. The last one of a job that succeeds always is. What fails here never touches training.
    """

    tasks: Annotated[list[TaskName], Field(max_length=32)] = []
    """Tasks of `internlm eval`."""
    data: _Url | None = None
    """Folder or URL (any fsspec protocol) with one folder a task."""
    text: Annotated[list[_Url], Field(max_length=32)] = []
    """Text files to find the perplexity of: paths, URLs or patterns."""
    shots: Annotated[int, Field(ge=0, le=100)] | None = None
    """Examples before each question. Default: the task's own number."""
    limit: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Only the first so many questions of each subject, or texts."""
    every_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    """Fewest steps between two evaluated checkpoints; the default takes every one that there is time for."""
    timeout_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 7200
    """The longest that one evaluation may take."""
    resources: ResourcesSpec = ResourcesSpec()
    """Resources of the evaluation's container. Without a GPU it runs on the CPU; on one machine (`internlm run`) it
    always does, at low priority."""


def is_due(evaluation: EvaluationSpec, newest: int, evaluated: int, last: bool) -> bool:
    """Whether the checkpoint of step `newest` is to be evaluated, `evaluated` being the last one that was (0: none).

    last: no other checkpoint will come.
    """
    return newest > evaluated and (last or newest - evaluated >= evaluation.every_steps)
