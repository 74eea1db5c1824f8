"""What the operator decides, one sentence a case."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import START, World, make_report, message

from internlm_operator import objects
from internlm_operator.plan import Apply, Create, Delete, Event, Refusal
from internlm_operator.times import stamp


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
        "Running": "False",
        "Restarting": "False",
        "Suspended": "False",
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
    world.schedule(1)
    world.settle()
    assert world.phase == "Starting"
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
    world.run(0, 1)
    world.settle()
    assert world.condition("Running")["status"] == "True"


def test_pods_that_are_refused_for_now_are_shown_and_tried_again() -> None:
    world = World()
    world.step(actions=0)
    world.refused = Refusal(403, "exceeded quota: team-a")
    plan = world.step(actions=0)
    assert world.condition("Running")["reason"] == "PodsRefused"
    assert world.condition("Running")["message"] == "exceeded quota: team-a"
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
    assert world.status["conditions"] == before["conditions"]


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


def test_a_description_that_is_not_valid_fails_the_job_with_a_sentence_for_each_mistake() -> None:
    world = World(nodes=0, gpusPerNode="two")
    world.settle()
    assert world.phase == "Failed"
    failed = world.condition("Failed")
    assert failed["reason"] == "InvalidSpec"
    assert "spec.nodes" in failed["message"]
    assert "spec.gpusPerNode" in failed["message"]
    assert not world.pods


# Failure and restart


def test_the_first_failed_worker_restarts_the_whole_gang() -> None:
    world = World(nodes=3)
    world.start()
    world.end(1, 137)
    plan = world.step()
    assert world.phase == "Restarting"
    assert world.status["restarts"] == 1
    assert {a.name for a in actions(plan, Delete)} == {f"job-worker-{i}" for i in range(3)}
    assert world.condition("Restarting")["reason"] == "Killed"
    assert world.status["lastFailure"] == {
        "attempt": 1,
        "reason": "Killed",
        "message": "A training process was ended by signal 9.",
        "pod": "job-worker-1",
        "node": "node-1",
        "exitCode": 137,
        "signal": 9,
        "time": stamp(world.now),
    }


def test_no_pod_of_the_next_attempt_is_made_before_the_last_one_is_gone() -> None:
    world = World(nodes=3)
    world.start()
    world.end(1, 1)
    world.settle()
    assert "job-worker-1" in world.pods
    world.pods.pop("job-worker-1")
    world.settle()
    assert "job-worker-1" not in world.pods
    assert world.condition("Running")["reason"] == "OldWorkersTerminating"
    world.reap()
    world.settle()
    assert {world.attempt_of(i) for i in range(3)} == {"2"}


def test_a_restarted_gang_is_restarting_until_all_of_it_runs() -> None:
    world = World()
    world.start()
    world.end(0, 1)
    world.settle()
    world.reap()
    world.settle()
    assert world.phase == "Restarting"
    world.run(0, 1)
    world.settle()
    assert world.phase == "Running"
    assert world.condition("Restarting")["status"] == "False"
    assert world.status["restarts"] == 1


def test_a_crashed_gang_gets_a_short_grace_and_an_evicted_one_its_whole() -> None:
    crashed, evicted = World(), World()
    for world in (crashed, evicted):
        world.start()
    crashed.end(0, 1)
    evicted.delete("job-worker-0")
    assert {a.grace_seconds for a in actions(crashed.step(), Delete)} == {15}
    assert {a.grace_seconds for a in actions(evicted.step(), Delete)} == {None}


def test_a_worker_of_a_formed_gang_that_vanishes_is_a_failure() -> None:
    world = World()
    world.start()
    world.vanish(1)
    world.step()
    assert world.status["lastFailure"]["reason"] == "PodLost"
    assert world.status["lastFailure"]["pod"] == "job-worker-1"
    assert world.status["restarts"] == 1


def test_a_worker_of_a_gang_that_never_formed_is_simply_made_again() -> None:
    world = World()
    plan = world.plan()
    world.carry_out(plan, len(plan.actions) - 1)
    world.vanish(0)
    world.settle()
    assert len(world.pods) == 2
    assert world.status["restarts"] == 0


def test_a_worker_that_is_being_deleted_ends_the_attempt_while_it_still_can_save() -> None:
    world = World()
    world.start()
    world.delete("job-worker-1")
    plan = world.step()
    assert world.status["lastFailure"]["reason"] == "PodDeleted"
    assert [a.name for a in actions(plan, Delete)] == ["job-worker-0"]


def test_a_pod_whose_node_is_gone_is_not_waited_for_forever() -> None:
    world = World()
    world.start()
    world.delete("job-worker-1")
    world.settle()
    world.pods.pop("job-worker-0")
    plan = world.settle()
    assert plan.wake_after == 90
    world.wait(90)
    plan = world.step()
    assert [(a.name, a.grace_seconds) for a in actions(plan, Delete)] == [("job-worker-1", 0)]
    world.settle()
    assert world.attempt_of(1) == "2"


def test_a_users_mistake_fails_the_job_at_once_in_the_trainers_words() -> None:
    world = World()
    world.start()
    sentence = "data.train[0].path: s3://b/train holds no .bin file; point it at a tokenized folder"
    world.end(1, 1, message("UserError", sentence))
    world.settle()
    assert world.phase == "Failed"
    assert world.condition("Failed")["reason"] == "UserError"
    assert world.condition("Failed")["message"] == sentence
    assert Event("Warning", "UserError", sentence) in world.events
    assert world.status["restarts"] == 0
    assert world.status["lastFailure"]["pod"] == "job-worker-1"


def test_a_job_fails_when_its_restarts_are_used_up_and_says_what_failed_last() -> None:
    world = World(recovery={"maxRestarts": 2, "windowSeconds": 3600})
    for _ in range(3):
        world.start()
        world.end(0, 1, message("Error", "CUDA error: an illegal memory access was encountered"))
        world.settle()
        world.reap()
        world.wait(60)
    assert world.phase == "Failed"
    failed = world.condition("Failed")
    assert failed["reason"] == "RestartLimitExceeded"
    assert "illegal memory access" in failed["message"]
    assert "recovery.maxRestarts" in failed["message"]
    assert world.status["restarts"] == 2
    assert world.status["attempts"][-1]["number"] == 3


def test_restarts_outside_the_window_do_not_count() -> None:
    world = World(recovery={"maxRestarts": 1, "windowSeconds": 600})
    for _ in range(5):
        world.start()
        world.end(0, 1)
        world.settle()
        world.reap()
        world.wait(601)
    world.start()
    assert world.phase == "Running"
    assert world.status["restarts"] == 5


def test_without_restarts_the_first_failure_is_the_end() -> None:
    world = World(recovery={"maxRestarts": 0})
    world.start()
    world.end(0, 1)
    world.settle()
    assert world.phase == "Failed"


def test_the_history_of_attempts_is_bounded_and_the_count_of_restarts_is_not() -> None:
    world = World(recovery={"maxRestarts": 100})
    for number in range(1, 31):
        world.start()
        world.tell(make_report(number, step=number * 10, startStep=number * 10 - 10))
        world.end(0, 1)
        world.settle()
        world.reap()
        world.wait(1)
    world.settle()
    assert [a["number"] for a in world.status["attempts"]] == list(range(22, 32))
    assert world.status["restarts"] == 30


def test_a_gang_that_fails_again_and_again_without_a_step_waits_longer_each_time() -> None:
    world = World(recovery={"maxRestarts": 100})
    waits = []
    for _ in range(8):
        world.start()
        world.end(0, 1)
        world.settle()
        world.reap()
        plan = world.settle()
        waits.append(plan.wake_after or 0.0)
        world.wait(waits[-1])
    assert waits == [0, 10, 20, 40, 80, 160, 300, 300]


def test_a_gang_that_trained_restarts_at_once() -> None:
    world = World()
    for number in range(1, 6):
        world.start()
        world.tell(make_report(number, step=number * 100, startStep=number * 100 - 100))
        world.settle()
        world.end(0, 1)
        world.settle()
        world.reap()
        assert world.settle().wake_after is None


def test_the_worker_that_failed_by_itself_is_named_and_not_the_one_that_lost_it() -> None:
    world = World()
    world.start()
    world.end(1, 1, message("Error", "RuntimeError: Connection closed by peer [10.0.0.7]:40112"))
    plan = world.step()
    assert world.phase == "Running", "the other worker's status may still be on the way"
    assert plan.wake_after == 3
    world.wait(1)
    world.end(0, 1, message("Error", "ZeroDivisionError: division by zero"))
    world.step()
    assert world.status["lastFailure"]["pod"] == "job-worker-0"


def test_a_lost_peer_is_waited_for_only_a_moment() -> None:
    world = World()
    world.start()
    world.end(1, 1, message("Error", "Connection reset by peer"))
    world.step()
    world.wait(3)
    world.step()
    assert world.phase == "Restarting"
    assert world.status["lastFailure"]["pod"] == "job-worker-1"


# Suspension


def test_suspending_removes_the_workers_gracefully_and_is_done_when_they_are_gone() -> None:
    world = World()
    world.start()
    world.edit(suspend=True)
    plan = world.step()
    assert {a.grace_seconds for a in actions(plan, Delete)} == {None}
    world.settle()
    assert world.phase == "Suspending"
    assert world.condition("Suspended")["status"] == "False"
    world.reap()
    world.settle()
    assert world.phase == "Suspended"
    assert world.condition("Suspended")["status"] == "True"
    assert world.condition("Running")["reason"] == "Suspended"


def test_the_step_that_was_saved_on_suspension_is_in_the_status() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=100))
    world.settle()
    world.edit(suspend=True)
    world.settle()
    world.end(0, 1, message("Stopped", "saved", 105))
    world.settle()
    world.reap()
    world.settle()
    assert world.status["progressText"] == "105/400"
    assert world.status["attempts"][-1]["endStep"] == 105


def test_a_resumed_job_gets_a_new_attempt_that_is_no_restart() -> None:
    world = World()
    world.start()
    world.edit(suspend=True)
    world.settle()
    world.reap()
    world.settle()
    world.edit(suspend=False, nodes=3)
    world.start()
    assert world.phase == "Running"
    assert {world.attempt_of(i) for i in range(3)} == {"2"}
    assert world.status["restarts"] == 0
    assert world.condition("Suspended")["status"] == "False"


def test_a_job_resumed_before_its_workers_are_gone_waits_for_them() -> None:
    world = World()
    world.start()
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert {world.attempt_of(i) for i in range(2)} == {"1"}
    world.reap()
    world.settle()
    assert {world.attempt_of(i) for i in range(2)} == {"2"}


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_job_edited_between_two_looks_of_the_operator_gets_a_gang_of_the_new_size(nodes: int) -> None:
    world = World()
    world.start()
    world.edit(suspend=True)
    world.edit(suspend=False, nodes=nodes)
    world.settle()
    world.reap()
    world.start()
    assert world.phase == "Running"
    assert len(world.pods) == nodes
    assert world.status["restarts"] == 0
    assert world.status["attempts"][0]["reason"] == "SpecChanged"


def test_a_job_made_suspended_starts_nothing() -> None:
    world = World(suspend=True)
    world.settle()
    assert world.phase == "Suspended"
    assert not world.pods
    assert world.status["attempts"] == []


def test_a_job_that_completed_while_it_was_suspended_has_succeeded() -> None:
    world = World()
    world.start()
    world.complete(0, 1)
    world.edit(suspend=True)
    world.settle()
    assert world.phase == "Succeeded"


# Progress


def test_a_report_becomes_progress_and_checkpoint() -> None:
    world = World()
    world.start()
    checkpoint = {
        "step": 100,
        "uri": "s3://b/step-100",
        "time": "2026-01-01T00:00:00Z",
        "bytes": 9,
        "digest": "x",
    }
    world.tell(make_report(step=120, tokensPerSecond=8100.0, etaSeconds=95, checkpoint=checkpoint))
    world.settle()
    assert world.status["progressText"] == "120/400"
    assert world.status["progress"] == {
        "step": 120,
        "totalSteps": 400,
        "tokens": 491520,
        "loss": 3.0,
        "tokensPerSecond": 8100.0,
        "etaSeconds": 95,
        "lastReportTime": stamp(world.now),
    }
    assert world.status["checkpoint"] == checkpoint
    assert world.status["attempts"][-1]["endStep"] == 120


def test_a_report_of_another_attempt_is_ignored() -> None:
    world = World()
    world.start()
    world.tell(make_report(attempt=2))
    assert world.plan().status is None


def test_progress_alone_is_written_every_five_seconds_at_most() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=1))
    world.settle()
    written = []
    for step in range(2, 22):
        world.wait(1)
        world.tell(make_report(step=step))
        plan = world.step()
        assert not plan.important
        if plan.status is not None:
            written.append(step)
        else:
            assert plan.wake_after is not None
    assert written == [6, 11, 16, 21]


def test_a_failure_is_written_at_once_with_the_progress_that_waited() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=10))
    world.settle()
    world.wait(1)
    world.tell(make_report(step=11))
    world.end(0, 1)
    plan = world.step()
    assert plan.important
    assert world.status["progressText"] == "11/400"
    assert world.status["attempts"][-1]["endStep"] == 11


def test_progress_may_go_back_after_a_restart_but_the_checkpoint_never() -> None:
    world = World()
    world.start()
    newer = {"step": 100, "uri": "s3://b/step-100", "time": "2026-01-01T00:00:00Z"}
    world.tell(make_report(step=120, checkpoint=newer))
    world.end(0, 1)
    world.settle()
    world.reap()
    world.wait(10)
    world.start()
    older = {"step": 50, "uri": "s3://b/step-50", "time": "2026-01-01T00:00:00Z"}
    world.tell(make_report(attempt=2, step=60, startStep=50, checkpoint=older))
    world.settle()
    assert world.status["progressText"] == "60/400"
    assert world.status["checkpoint"]["step"] == 100
    assert [(a["startStep"], a["endStep"]) for a in world.status["attempts"]] == [(0, 120), (50, 60)]


def test_what_is_known_of_the_training_survives_an_operator_without_reports() -> None:
    world = World()
    world.start()
    world.tell(make_report())
    world.settle()
    before = world.status
    world.report = None
    world.wait(100)
    world.end(0, 1)
    world.settle()
    assert world.status["progress"] == before["progress"]
    assert world.status["progressText"] == before["progressText"]


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
