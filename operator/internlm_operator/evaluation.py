"""Which checkpoint is evaluated, by which pod, and what came of it.

An evaluation has a pod of its own, made like a worker but without the job channel and its token: what it found is its
termination message.  A try is in the status before its pod is made, as attempts are.  Whatever fails here is told in
`status.evaluation`; training does not wait for it, nor hear of it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from internlm_operator import failures, kubeflow, objects
from internlm_operator.api import Checkpoint, Evaluation, EvaluationResult, JobSpec, NetworkSpec
from internlm_operator.failures import CONTAINER, Pod
from internlm_operator.manifest import JobError, parse_job
from internlm_operator.objects import Object, Settings
from internlm_operator.plan import Create, Draft
from internlm_operator.status import holds
from internlm_operator.times import seconds_since, stamp
from internlm_trainer.config import EvaluationSpec, is_due

MAX_TRIES = 3
MAX_RESULTS = 100
MAX_MESSAGE = 500
# A pod that is not there after this was refused, or taken away.
MISSING_SECONDS = 60
_OF_WORKERS = {
    "INTERNLM_ATTEMPT",
    "INTERNLM_REPORT_TOKEN_FILE",
    "INTERNLM_REPORT_CA_FILE",
    *kubeflow.environment("", "", "", "", ""),
}
_Word = Annotated[str, Field(min_length=1, max_length=64)]


class _Termination(BaseModel):
    """What an evaluation leaves."""

    reason: str
    message: str = ""
    results: Annotated[list[tuple[_Word, _Word, FiniteFloat]], Field(max_length=MAX_RESULTS)] = []


def follow(draft: Draft) -> None:
    """Note what came of the evaluation under way, and begin the one that is due."""
    spec = _spec(draft)
    if spec is None or spec.evaluation is None or spec.suspend or holds(draft.status, "Failed"):
        draft.remove([pod for pod in draft.evaluations if not _is_over(pod)])
        if draft.status.evaluation is not None:
            draft.status.evaluation.step = None
        return
    state = draft.status.evaluation or Evaluation()
    checkpoint, last = draft.status.checkpoint, holds(draft.status, "Succeeded")
    if state.step is not None:
        _look(draft, spec, state)
    if (
        state.step is None
        and checkpoint is not None
        and is_due(spec.evaluation, checkpoint.step, state.evaluated_step, last)
    ):
        _begin(draft, spec, state, checkpoint, 1)
    if state != Evaluation():
        draft.status.evaluation = state


def is_under_way(draft: Draft) -> bool:
    """Whether there is something to wait for."""
    return draft.status.evaluation is not None and draft.status.evaluation.step is not None


def _spec(draft: Draft) -> JobSpec | None:
    """The job's description, if it asks for evaluations or ever did."""
    if "evaluation" not in (draft.job.get("spec") or {}):
        return None
    try:
        return parse_job(draft.job).spec
    except JobError:
        return None


def _begin(draft: Draft, spec: JobSpec, state: Evaluation, checkpoint: Checkpoint, attempt: int) -> None:
    state.step, state.uri, state.attempt = checkpoint.step, checkpoint.uri, attempt
    state.start_time = stamp(draft.now)
    draft.remove(draft.evaluations)
    _make(draft, spec, state)


def _make(draft: Draft, spec: JobSpec, state: Evaluation) -> None:
    draft.actions.append(Create(evaluation_pod(draft.job, spec, state, draft.observed.settings), True))
    draft.wake(MISSING_SECONDS)


def _look(draft: Draft, spec: JobSpec, state: Evaluation) -> None:
    name = pod_name(draft.name, state)
    pod = next((pod for pod in draft.evaluations if pod["metadata"]["name"] == name), None)
    if pod is None:
        age = seconds_since(state.start_time, draft.now)
        if age is not None and age < MISSING_SECONDS:
            _make(draft, spec, state)
        else:
            _fail(draft, spec, state, f"Pod {name} is gone, or could not be made.")
    elif _is_over(pod):
        word = _word(pod)
        if word is not None and word.reason == "Completed" and failures.has_succeeded(pod):
            _note(draft, state, word)
        else:
            _note_failure(draft, spec, state, pod, word)


def _note(draft: Draft, state: Evaluation, word: _Termination) -> None:
    assert state.step is not None
    now, step = stamp(draft.now), state.step
    new = [
        EvaluationResult(step=step, task=task, metric=metric, value=value, time=now)
        for task, metric, value in word.results
    ]
    state.results = [*state.results, *new][-MAX_RESULTS:]
    state.evaluated_step, state.step, state.message = step, None, ""
    found = ", ".join(f"{one.task} {one.metric} {one.value:.4g}" for one in new)
    draft.event("Normal", "Evaluated", f"Step {step}: {found}"[:MAX_MESSAGE])


def _note_failure(
    draft: Draft, spec: JobSpec, state: Evaluation, pod: Pod, word: _Termination | None
) -> None:
    if (pod.get("status") or {}).get("reason") == "DeadlineExceeded":
        assert spec.evaluation is not None
        sentence = f"It took longer than evaluation.timeoutSeconds, {spec.evaluation.timeout_seconds} s."
        _fail(draft, spec, state, sentence, final=True)
    elif word is not None and word.message:
        _fail(draft, spec, state, word.message, final=word.reason == "UserError")
    else:
        failure = failures.failure_of(pod)
        _fail(draft, spec, state, failure.message if failure else "Its pod ended without a result.")


def _fail(draft: Draft, spec: JobSpec, state: Evaluation, sentence: str, final: bool = False) -> None:
    """Try again on the newest checkpoint, or give up until there is another."""
    assert state.step is not None
    state.message = sentence[:MAX_MESSAGE]
    checkpoint = draft.status.checkpoint
    if not final and state.attempt < MAX_TRIES and checkpoint is not None:
        _begin(draft, spec, state, checkpoint, state.attempt + 1)
        return
    draft.event("Warning", "EvaluationFailed", f"Step {state.step}: {state.message}")
    state.evaluated_step, state.step = state.step, None


def _is_over(pod: Pod) -> bool:
    """The evaluation has ended, whatever other containers its pod was given."""
    return "terminated" in failures.trainer_state(pod) or failures.is_over(pod)


def _word(pod: Pod) -> _Termination | None:
    terminated = failures.trainer_state(pod).get("terminated") or {}
    try:
        return _Termination.model_validate_json(terminated.get("message") or "")
    except ValidationError:
        return None


def pod_name(job_name: str, state: Evaluation) -> str:
    return f"{job_name}-evaluation-{state.step}-{state.attempt}"


def evaluation_pod(job: Object, spec: JobSpec, state: Evaluation, settings: Settings) -> Object:
    """The pod of a try: the worker's with the user's template, but for what makes it one of a gang."""
    assert spec.evaluation is not None
    # It is in no gang: no adapters, and no network but its own.
    pod = objects.worker_pod(job, spec.model_copy(update={"network": NetworkSpec()}), 0, 1, settings)
    metadata, pod_spec = pod["metadata"], pod["spec"]
    metadata["name"] = pod_name(job["metadata"]["name"], state)
    for label in (objects.INDEX_LABEL, objects.ATTEMPT_LABEL):
        del metadata["labels"][label]
    metadata["labels"][objects.EVALUATION_LABEL] = str(state.step)
    del pod_spec["hostname"], pod_spec["subdomain"]
    pod_spec["activeDeadlineSeconds"] = spec.evaluation.timeout_seconds
    pod_spec["volumes"] = [one for one in pod_spec["volumes"] if one["name"] != "internlm-token"]
    pod_spec["containers"] = [
        _container(one, spec.evaluation, state) if one["name"] == CONTAINER else one
        for one in pod_spec["containers"]
    ]
    return pod


def _container(container: Object, asked: EvaluationSpec, state: Evaluation) -> Object:
    added = {"INTERNLM_CHECKPOINT": state.uri}
    resources = asked.resources.model_dump(by_alias=True, exclude_defaults=True)
    if not any("/" in name for name in (*asked.resources.limits, *asked.resources.requests)):
        added["CUDA_VISIBLE_DEVICES"] = ""  # some images show every GPU of the node to whoever asked for none
    kept = [one for one in container["env"] if one["name"] not in {*_OF_WORKERS, *added}]
    container = {key: value for key, value in container.items() if key not in ("ports", "args", "resources")}
    return container | {
        "command": ["python3", "-m", "internlm_trainer.evaluator"],
        "env": kept + [{"name": key, "value": value} for key, value in added.items()],
        "resources": resources,
        "volumeMounts": [one for one in container["volumeMounts"] if one["name"] != "internlm-token"],
    }
