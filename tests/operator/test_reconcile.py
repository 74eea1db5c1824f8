"""What the operator decides from the start of a job to its end, one sentence a case."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import START, World, make_report, message

from internlm_operator import objects
from internlm_operator.plan import BURST, Apply, Create, Delete
from internlm_operator.times import stamp
from internlm_operator.waits import Refusal


def actions(plan: Any, kind: type) -> list[Any]:
    return [action for action in plan.actions if isinstance(action, kind)]


# The start


def test_a_new_job_gets_a_service_a_config_map_and_all_its_workers() -> None:
    plan = World(nodes=3).step()
    assert [a.object["kind"] for a in actions(plan, Apply)] == ["Service", "ConfigMap"]
    assert [a.object["metadata"]["name"] for a in actions(plan, Create)] == [
        "job-worker-0",
        "job-worker-1",
        "job-worker-2",
    ]
    kinds = [type(action) for action in plan.actions]
    assert kinds.index(Apply) < kinds.index(Create), "a pod mounts the ConfigMap: it must be there first"


def test_the_attempt_is_in_the_status_before_its_first_pod_exists() -> None:
    world = World()
    plan = world.step(actions=0)
    assert plan.status is not None
    assert plan.status["attempts"][0]["number"] == 1
    assert not world.pods


def test_a_new_job_is_pending_and_every_condition_is_known() -> None:
    world = World()
    world.step()
    assert world.phase == "Pending"
    assert {c["type"]: c["status"] for c in world.status["conditions"]} == {
        "Queued": "True",
        "Starting": "False",
        "Running": "False",
        "Restarting": "False",
        "Suspended": "False",
        "CheckpointStale": "False",
        "ProgressStalled": "False",
        "Succeeded": "False",
        "Failed": "False",
    }
    assert world.status["startTime"] == stamp(START)
    assert world.status["workers"] == {"desired": 2, "ready": 0}


def test_the_phase_is_starting_once_every_worker_has_a_node() -> None:
    world = World()
    world.settle()
    world.schedule(0)
    world.settle()
    assert world.phase == "Pending"
    assert world.condition("Queued")["status"] == "True"
    world.schedule(1)
    world.settle()
    assert world.phase == "Starting"
    assert world.condition("Starting")["status"] == "True"
    assert world.condition("Running")["reason"] == "WorkersStarting"


def test_a_job_runs_when_all_its_workers_run() -> None:
    world = World()
    world.settle()
    world.run(0)
    world.settle()
    assert world.phase == "Pending"
    world.run(1)
    world.settle()
    assert world.phase == "Running"
    assert world.condition("Running")["reason"] == "WorkersRunning"
    assert world.status["workers"]["ready"] == 2


def test_a_worker_that_was_not_made_yet_is_made() -> None:
    world = World(nodes=3)
    plan = world.plan()
    first_pod = next(i for i, a in enumerate(plan.actions) if isinstance(a, Create))
    world.carry_out(plan, first_pod + 1)
    assert list(world.pods) == ["job-worker-0"]
    world.settle()
    assert len(world.pods) == 3
    assert world.status["restarts"] == 0


def test_a_plan_that_was_carried_out_is_not_made_again() -> None:
    world = World()
    world.start()
    plan = world.plan()
    assert plan.status is None
    assert plan.actions == []


def test_a_restarted_operator_only_applies_what_it_cannot_remember() -> None:
    world = World()
    world.start()
    world.tell(make_report())
    world.settle()
    world.report, world.applied = None, ""
    plan = world.plan()
    assert plan.status is None
    assert [type(action) for action in plan.actions] == [Apply, Apply]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                             "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."}]},
            "Unschedulable",
        ),
        (
            {"containerStatuses": [{"name": "trainer", "state": {"waiting": {
                "reason": "ImagePullBackOff",
                "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."}}}]},
            "ImagePullBackOff",
        ),
        (
            {"initContainerStatuses": [{"name": "fetch", "state": {"waiting": {
                "reason": "CreateContainerConfigError",
                "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."}}}]},
            "CreateContainerConfigError",
        ),
    ],
)  # fmt: skip
def test_what_keeps_a_worker_from_starting_is_said_in_the_words_of_who_saw_it(
    status: dict[str, Any], reason: str
) -> None:
    world = World()
    world.settle()
    world.pod(1)["status"] |= status
    world.settle()
    assert world.condition("Running")["reason"] == reason
    assert "job-worker-1: 0/2 nodes are available" in world.condition("Running")["message"]
    for other in ("ErrImagePull", "ImagePullBackOff"):  # as the kubelet says by turns: no new Event each time
        world.pod(1)["status"]["containerStatuses"] = [
            {"name": "trainer", "state": {"waiting": {"reason": other}}}
        ]
        world.settle()
    assert [event.reason for event in world.events if event.type == "Warning"] == [reason]
    world.run(0, 1)
    world.settle()
    assert world.condition("Running")["status"] == "True"


@pytest.mark.parametrize(
    ("code", "sentence", "reason"),
    [
        (403, 'pods "job-worker-0" is forbidden: exceeded quota: team-a', "QuotaExceeded"),
        (403, "unable to create new content in namespace a because it is being terminated",
         "NamespaceTerminating"),
        (403, 'violates PodSecurity "restricted:latest": host namespaces', "PodSecurityViolated"),
        (409, "Pod job-worker-0 exists and is not this job's", "NameTaken"),
        (422, """pods "job-worker-0" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'all' """
              "denied request: no GPUs at night", "PolicyDenied"),
        (400, 'admission webhook "gpus.example.com" denied the request: no GPUs at night', "PolicyDenied"),
        (403, 'admission webhook "gpus.example.com" denied the request without explanation', "PolicyDenied"),
        (403, "no PriorityClass with name train was found", "PodsRefused"),
    ],
)  # fmt: skip
def test_pods_that_are_refused_for_now_are_shown_and_tried_again(
    code: int, sentence: str, reason: str
) -> None:
    world = World()
    world.step(actions=0)
    world.refused = Refusal(code, sentence)
    plan = world.step(actions=0)
    assert world.condition("Queued")["status"] == "True"
    for type in ("Queued", "Starting", "Running"):
        assert (world.condition(type)["reason"], world.condition(type)["message"]) == (reason, sentence)
    assert len(actions(plan, Create)) == 2
    assert plan.wake_after == 10
    world.refused = None
    world.start()
    assert world.phase == "Running"


@pytest.mark.parametrize("code", [400, 422])
def test_a_template_that_makes_no_valid_pod_fails_the_job_with_the_servers_sentence(code: int) -> None:
    world = World()
    world.step(actions=0)
    world.refused = Refusal(code, 'Pod "job-worker-0" is invalid: spec.volumes[4].name: Required value')
    world.settle()
    assert world.phase == "Failed"
    assert world.condition("Failed")["reason"] == "InvalidTemplate"
    assert "spec.volumes[4].name" in world.condition("Failed")["message"]


def test_a_pod_that_becomes_invalid_while_the_job_lives_is_shown_and_tried_until_it_is_valid() -> None:
    world = World()
    world.start()
    world.refused = Refusal(422, 'Pod "job-worker-0" is invalid: spec.containers: Too long')
    world.end(0, 1)
    world.settle()
    world.reap()
    world.step()
    plan = world.step()
    assert world.phase == "Restarting"
    assert world.condition("Queued")["reason"] == "InvalidTemplate"
    assert "spec.template: makes a pod that is not valid: Pod" in world.condition("Queued")["message"]
    assert plan.wake_after == 10
    world.refused = None
    world.start()
    assert world.phase == "Running"


def test_another_owners_pod_with_the_jobs_label_is_left_alone() -> None:
    world = World()
    world.start()
    stranger = {"metadata": {"name": "x", "uid": "x", "labels": {objects.JOB_LABEL: "job"}}, "status": {}}
    world.pods["x"] = stranger
    assert world.plan().actions == []


# The end


def test_a_job_succeeds_when_every_worker_completed() -> None:
    world = World()
    world.start()
    world.complete(0)
    world.settle()
    assert world.phase == "Running"
    world.complete(1)
    world.settle()
    assert world.phase == "Succeeded"
    assert world.condition("Succeeded")["status"] == "True"
    assert world.status["completionTime"] == stamp(world.now)
    assert world.status["attempts"][-1]["reason"] == "Completed"
    assert [event.reason for event in world.events][-1] == "Succeeded"


def test_the_last_step_is_known_even_if_its_report_was_not_written() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=390))
    world.settle()
    world.complete(0, 1, step=400)
    world.settle()
    assert world.status["progressText"] == "400/400"
    assert world.status["progress"]["step"] == 400
    assert "400/400" in world.condition("Succeeded")["message"]


def test_finished_pods_stay_for_their_logs() -> None:
    world = World()
    world.start()
    world.complete(0, 1)
    plan = world.settle()
    assert len(world.pods) == 2
    assert plan.wake_after is None


def test_a_pod_whose_containers_ended_stays_though_the_kubelet_is_not_done_with_it() -> None:
    world = World()
    world.start()
    world.complete(0, 1)
    for index in range(2):
        world.pod(index)["status"]["phase"] = "Running"
    world.settle()
    assert world.phase == "Succeeded"
    assert [pod["metadata"].get("deletionTimestamp") for pod in world.pods.values()] == [None, None]


def test_a_pod_in_which_a_side_container_still_runs_is_removed_at_the_end() -> None:
    world = World()
    world.start()
    world.complete(0, 1)
    world.pod(1)["status"]["phase"] = "Running"
    world.pod(1)["status"]["containerStatuses"].append({"name": "proxy", "state": {"running": {}}})
    world.settle()
    assert world.phase == "Succeeded"
    assert "deletionTimestamp" in world.pod(1)["metadata"]


def test_a_finished_job_is_never_started_again() -> None:
    world = World()
    world.start()
    world.complete(0, 1)
    world.settle()
    before = world.status
    world.vanish(0)
    world.vanish(1)
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert not world.pods
    assert world.phase == "Succeeded"
    then, now = (
        [c | {"observedGeneration": 0} for c in status["conditions"]] for status in (before, world.status)
    )
    assert now == then


def test_running_pods_of_a_failed_job_are_removed_and_ended_ones_stay() -> None:
    world = World()
    world.start()
    world.end(0, 1, message("UserError", "no such bucket"))
    world.settle()
    assert world.overdue("job-worker-1") is False
    assert "deletionTimestamp" in world.pod(1)["metadata"]
    assert "deletionTimestamp" not in world.pod(0)["metadata"]


def test_a_finished_job_is_deleted_after_its_ttl() -> None:
    world = World(ttlSecondsAfterFinished=60)
    world.start()
    world.complete(0, 1)
    world.settle()
    world.wait(20)
    assert world.plan().wake_after == 40
    world.wait(40)
    plan = world.plan()
    assert plan.actions == [Delete("InternLMJob", "job", "job-uid")]


def test_a_job_that_is_being_deleted_is_left_to_kubernetes() -> None:
    world = World()
    world.start()
    world.job["metadata"]["deletionTimestamp"] = stamp(world.now)
    world.vanish(0)
    plan = world.plan()
    assert plan.actions == []
    assert plan.status is None


# Conditions


def test_a_condition_keeps_its_time_until_its_value_changes() -> None:
    world = World()
    world.settle()
    since = world.condition("Running")["lastTransitionTime"]
    world.wait(10)
    world.schedule(0)
    world.settle()
    assert world.condition("Running")["lastTransitionTime"] == since
    world.run(0, 1)
    world.settle()
    assert world.condition("Running")["lastTransitionTime"] == stamp(world.now)


def test_the_status_says_which_generation_of_the_spec_it_is_about() -> None:
    world = World()
    world.start()
    world.edit(ttlSecondsAfterFinished=5)
    world.settle()
    assert world.status["observedGeneration"] == 2
    assert {c["observedGeneration"] for c in world.status["conditions"]} <= {1, 2}
    assert world.condition("Running")["observedGeneration"] == 2


def test_a_status_that_somebody_broke_is_made_whole_again() -> None:
    world = World()
    world.start()
    world.job["status"] = {"attempts": "gone", "conditions": [{"type": "Running"}], "restarts": 3}
    world.settle()
    world.reap()
    world.start()
    assert world.phase == "Running"
    assert world.status["restarts"] == 3


# Thousands of workers


def test_a_big_gang_is_made_and_removed_in_parts_and_each_look_goes_on_where_the_last_one_ended() -> None:
    world = World(nodes=2 * BURST + 1)
    for part, looks_again in ((BURST, True), (BURST, True), (1, False)):
        plan = world.step()
        assert len(actions(plan, Create)) == part
        assert (plan.wake_after == 0) is looks_again
    world.start()
    assert world.phase == "Running"
    world.edit(suspend=True)
    for part, looks_again in ((BURST, True), (BURST, True), (1, False)):
        plan = world.step()
        assert len(actions(plan, Delete)) == part
        assert (plan.wake_after == 0) is looks_again
    world.reap()
    world.settle()
    assert world.phase == "Suspended"


def test_a_big_gang_whose_pods_are_refused_is_not_tried_without_a_pause() -> None:
    world = World(nodes=BURST + 1)
    world.refused = Refusal(403, "exceeded quota")
    world.step()
    plan = world.plan()
    assert len(actions(plan, Create)) == BURST
    assert plan.wake_after == 10


def test_a_pod_that_only_a_finalizer_holds_is_not_deleted_again_and_again() -> None:
    world = World()
    world.start()
    world.pod(0)["metadata"] |= {"deletionTimestamp": stamp(START), "deletionGracePeriodSeconds": 0}
    world.wait(1000)
    plan = world.plan()
    assert [action.name for action in actions(plan, Delete)] == ["job-worker-1"]
