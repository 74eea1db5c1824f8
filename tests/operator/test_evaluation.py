"""Checkpoints are evaluated by pods of their own, one at a time, and training never hears of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_world import SETTINGS, World, make_report

from internlm_operator import failures, objects
from internlm_operator.evaluation import MAX_RESULTS, MISSING_SECONDS, pod_name
from internlm_operator.manifest import JobError, parse_spec
from internlm_operator.reconcile import reconcile
from internlm_operator.waits import Refusal

ASKED: dict[str, Any] = {"tasks": ["mmlu"], "data": "s3://sets"}


def found(*results: tuple[str, str, float]) -> str:
    return json.dumps({"reason": "Completed", "message": "", "results": results})


def world(evaluation: dict[str, Any] | None = None, **spec: Any) -> World:
    """A job whose gang runs."""
    made = World(evaluation=ASKED | (evaluation or {}), **spec)
    made.start()
    assert made.phase == "Running"
    return made


def save(world: World, step: int) -> None:
    """A checkpoint is there."""
    uri = f"s3://b/checkpoints/step-{step:08d}"
    checkpoint = {"step": step, "uri": uri, "time": "2026-01-01T00:00:00Z"}
    world.wait(10)
    world.tell(make_report(1, step, checkpoint=checkpoint))
    world.settle()


def only(world: World) -> dict[str, Any]:
    (pod,) = world.evaluations.values()
    return pod


def state(world: World) -> dict[str, Any]:
    return dict(world.status.get("evaluation") or {})


def test_a_checkpoint_is_evaluated_and_its_numbers_are_in_the_status() -> None:
    job = world()
    assert not job.evaluations
    save(job, 50)
    pod = only(job)
    assert pod["metadata"]["name"] == "job-evaluation-50-1"
    container = pod["spec"]["containers"][0]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["INTERNLM_CHECKPOINT"] == "s3://b/checkpoints/step-00000050"
    job.end_evaluation(0, found(("mmlu", "acc", 0.25), ("mmlu", "acc_norm", 0.5)))
    job.settle()
    results = state(job)["results"]
    assert [(one["step"], one["task"], one["metric"], one["value"]) for one in results] == [
        (50, "mmlu", "acc", 0.25),
        (50, "mmlu", "acc_norm", 0.5),
    ]
    assert "step" not in state(job)
    assert only(job) == pod | {"status": only(job)["status"]}, "it stays for its log"
    assert [event.reason for event in job.events][-1] == "Evaluated"
    assert job.phase == "Running"


def test_of_the_checkpoints_that_come_meanwhile_the_newest_is_next() -> None:
    job = world({"everySteps": 40})
    for step in (50, 60, 70, 80):
        save(job, step)
    assert list(job.evaluations) == ["job-evaluation-50-1"]
    job.end_evaluation(0, found(("mmlu", "acc", 0.2)))
    job.settle()
    assert "step" not in state(job), "80 is not 40 steps after 50"
    save(job, 90)
    assert list(job.evaluations) == ["job-evaluation-90-1"]


def test_the_last_checkpoint_of_a_job_is_evaluated_after_its_end() -> None:
    job = world({"everySteps": 300}, ttlSecondsAfterFinished=30)
    save(job, 310)
    job.end_evaluation(0, found())
    save(job, 400)
    assert "step" not in state(job)
    for index in range(2):
        job.complete(index)
    job.settle()
    assert job.phase == "Succeeded"
    job.wait(3600)
    job.settle()
    assert list(job.evaluations) == ["job-evaluation-400-1"]
    assert not job.deleted_job, "the evaluation is waited for"
    job.end_evaluation(0, found(("mmlu", "acc", 0.3)))
    job.step()
    assert state(job)["results"][-1]["step"] == 400
    job.wait(1)
    job.step()
    assert job.deleted_job


@pytest.mark.parametrize(
    ("code", "message", "reason", "tries", "says"),
    [
        (1, json.dumps({"reason": "Error", "message": "OSError: no"}), "", 3, "OSError: no"),
        (65, json.dumps({"reason": "UserError", "message": "--data: no files"}), "", 1, "--data: no files"),
        (137, "Killed", "", 3, ""),
        (0, "not JSON", "", 3, ""),
        (0, found(("mmlu", "acc", float("nan"))), "", 3, ""),
        (1, "", "DeadlineExceeded", 1, "It took longer than evaluation.timeoutSeconds, 7200 s."),
    ],
)
def test_a_failed_evaluation_is_tried_again_a_few_times_and_never_touches_training(
    code: int, message: str, reason: str, tries: int, says: str
) -> None:
    job = world()
    workers = dict(job.pods)
    save(job, 50)
    for attempt in range(1, tries + 1):
        assert list(job.evaluations) == [f"job-evaluation-50-{attempt}"]
        job.end_evaluation(code, message, reason)
        job.settle()
    assert "step" not in state(job)
    assert says in state(job)["message"]
    assert state(job)["message"]
    assert job.events[-1].reason == "EvaluationFailed"
    assert (job.phase, job.pods.keys()) == ("Running", workers.keys())
    assert job.status["restarts"] == 0
    save(job, 100)
    assert list(job.evaluations) == ["job-evaluation-100-1"]
    job.end_evaluation(0, found(("mmlu", "acc", 1.0)))
    job.settle()
    assert "message" not in state(job) or not state(job)["message"]


def test_a_pod_that_is_refused_is_a_failed_try() -> None:
    job = world()
    job.refused = Refusal(400, "exceeded quota")
    job.wait(10)
    checkpoint = {"step": 50, "uri": "s3://b/checkpoints/step-50", "time": "2026-01-01T00:00:00Z"}
    job.tell(make_report(1, 50, checkpoint=checkpoint))
    for attempt in (1, 2, 3):
        plan = job.step()
        assert state(job)["attempt"] == attempt
        assert plan.wake_after is not None
        job.wait(MISSING_SECONDS)
    job.step()
    assert "gone, or could not be made" in state(job)["message"]
    assert "step" not in state(job)
    assert (job.phase, len(job.pods)) == ("Running", 2)


def test_a_pod_that_was_not_made_when_the_operator_died_is_made_by_the_next_one() -> None:
    job = world()
    checkpoint = {"step": 50, "uri": "s3://b/checkpoints/step-50", "time": "2026-01-01T00:00:00Z"}
    job.wait(10)
    job.tell(make_report(1, 50, checkpoint=checkpoint))
    job.step(actions=0)
    assert not job.evaluations
    job.settle()
    assert list(job.evaluations) == ["job-evaluation-50-1"]


def test_a_suspended_job_evaluates_nothing_and_goes_on_later() -> None:
    job = world()
    save(job, 50)
    job.edit(suspend=True)
    job.step()
    assert not job.evaluations
    job.reap()
    job.settle()
    assert job.phase == "Suspended"
    assert not job.evaluations
    job.edit(suspend=False)
    job.settle()
    assert list(job.evaluations) == ["job-evaluation-50-1"]


def test_a_job_that_does_not_ask_is_not_evaluated() -> None:
    job = World()
    job.start()
    save(job, 50)
    assert not job.evaluations
    assert "evaluation" not in job.status


def test_results_are_bounded() -> None:
    job = world()
    many = [(f"task{n}", "acc", n / 100) for n in range(60)]
    for step in (50, 60):
        save(job, step)
        job.end_evaluation(0, found(*many))
        job.settle()
    assert len(state(job)["results"]) == MAX_RESULTS
    assert state(job)["results"][-1]["task"] == "task59"


def test_the_pod_is_no_worker_and_has_neither_token_nor_adapters() -> None:
    credentials = [{"secretRef": {"name": "s3"}}]
    container = {"name": "trainer", "envFrom": credentials, "resources": {"limits": {"nvidia.com/gpu": "8"}}}
    job = world(
        {"resources": {"limits": {"memory": "8Gi"}}, "timeoutSeconds": 60},
        gpusPerNode=2,
        network={"hostNetwork": True, "rdma": {"resourceName": "rdma/hca"}},
        template={"spec": {"containers": [container]}},
    )
    save(job, 50)
    pod = only(job)
    assert objects.evaluates(pod)
    assert failures.index_of(pod) == -1
    labels, spec = pod["metadata"]["labels"], pod["spec"]
    assert (labels[objects.JOB_LABEL], objects.ATTEMPT_LABEL in labels) == ("job", False)
    assert spec["activeDeadlineSeconds"] == 60
    assert not {"hostname", "subdomain", "hostNetwork"} & spec.keys()
    assert "token" not in json.dumps(spec["volumes"]).lower()
    (container,) = spec["containers"]
    assert container["command"][-1] == "internlm_trainer.evaluator"
    assert container["resources"] == {"limits": {"memory": "8Gi"}}
    assert container["envFrom"] == credentials
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    names = {one["name"]: one["value"] for one in container["env"]}
    assert names["CUDA_VISIBLE_DEVICES"] == ""
    assert (
        not {"INTERNLM_REPORT_TOKEN_FILE", "INTERNLM_ATTEMPT", "KUBEFLOW_TRAINER_SERVER_TOKEN"} & names.keys()
    )
    assert pod["metadata"]["ownerReferences"][0]["kind"] == "InternLMJob"


def test_with_a_gpu_of_its_own_it_sees_it() -> None:
    job = world({"resources": {"limits": {"nvidia.com/gpu": 1}}})
    save(job, 50)
    (container,) = only(job)["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert "CUDA_VISIBLE_DEVICES" not in [one["name"] for one in container["env"]]


def test_a_budget_counts_workers_only() -> None:
    job = world(recovery={"podDisruptionBudget": True})
    budget = next(o for o in objects.shared_objects(job.job, SETTINGS) if o["kind"] == "PodDisruptionBudget")
    save(job, 50)
    (wanted,) = budget["spec"]["selector"]["matchExpressions"]
    assert wanted == {"key": objects.INDEX_LABEL, "operator": "Exists"}
    assert objects.INDEX_LABEL not in only(job)["metadata"]["labels"]


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ({}, "spec.evaluation: give tasks, text, or both"),
        ({"tasks": ["mmlu"]}, "spec.evaluation.data: must be given with tasks"),
        ({"tasks": ["mmul"], "data": "d"}, "spec.evaluation.tasks[0]: "),
    ],
)
def test_mistakes_are_sentences(evaluation: dict[str, Any], says: str) -> None:
    with pytest.raises(JobError) as refused:
        parse_spec(World().job["spec"] | {"evaluation": evaluation})
    assert says in str(refused.value)


def test_the_tasks_are_those_of_the_command() -> None:
    from typing import get_args

    from internlm_trainer.config.evaluation import TaskName
    from internlm_trainer.evaluation.tasks import TASKS, Writing

    safe = {name for name, task in TASKS.items() if not (isinstance(task, Writing) and task.program)}
    assert set(get_args(TaskName)) == safe


def test_names_stay_within_what_kubernetes_allows() -> None:
    from internlm_operator.api import MAX_NAME_LENGTH, Evaluation

    assert len(pod_name("x" * MAX_NAME_LENGTH, Evaluation(step=2**53, attempt=3))) <= 253
    assert reconcile(World().job, World().observed(), World().now).actions
