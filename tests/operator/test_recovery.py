"""What the operator decides when workers fail, or are to stop, one sentence a case."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import World, make_report, message

from internlm_operator.nodes import NodeHealth
from internlm_operator.objects import GRACE_SECONDS
from internlm_operator.plan import CRASH_GRACE_SECONDS, OVERDUE_SECONDS, Delete, Event
from internlm_operator.times import stamp


def actions(plan: Any, kind: type) -> list[Any]:
    return [action for action in plan.actions if isinstance(action, kind)]


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
        "class": "Unknown",
        "exitCode": 137,
        "signal": 9,
        "evidence": "signal 9",
        "action": "GangRestart",
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


def test_a_worker_on_a_dead_node_has_no_longer_grace_than_its_peers_that_crashed() -> None:
    world = World()
    world.start()
    world.nodes["node-1"] = NodeHealth(ready=False)
    world.pod(1)["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "why"}
    ]
    world.delete("job-worker-1")  # by Kubernetes, with the pod's own grace of a minute
    world.settle()
    assert world.status["lastFailure"]["class"] == "Infrastructure"
    assert world.pod(1)["metadata"]["deletionGracePeriodSeconds"] == CRASH_GRACE_SECONDS
    world.wait(CRASH_GRACE_SECONDS + OVERDUE_SECONDS)
    world.settle()
    assert world.attempt_of(1) == "2", "the old one was deleted by force"


def test_a_grace_that_workers_may_save_in_is_not_made_shorter() -> None:
    world = World()
    world.start()
    world.pod(1)["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "why"}
    ]
    world.delete("job-worker-1")
    world.settle()
    graces = {pod["metadata"]["deletionGracePeriodSeconds"] for pod in world.pods.values()}
    assert graces == {GRACE_SECONDS}


@pytest.mark.parametrize("reason", ["UserError", "Diverged"])
def test_what_a_restart_would_meet_again_fails_the_job_at_once_in_the_trainers_words(reason: str) -> None:
    world = World()
    world.start()
    sentence = "data.train[0].path: s3://b/train holds no .bin file; point it at a tokenized folder"
    world.end(1, 1, message(reason, sentence))
    world.settle()
    assert world.phase == "Failed"
    assert world.condition("Failed")["reason"] == reason
    assert world.condition("Failed")["message"] == sentence
    assert Event("Warning", reason, sentence) in world.events
    assert world.status["restarts"] == 0
    assert world.status["lastFailure"]["pod"] == "job-worker-1"


@pytest.mark.parametrize(("steps", "phase"), [(None, "Failed"), (9, "Failed"), (10, "Restarting")])
def test_memory_that_is_full_in_the_first_steps_fails_the_job_and_later_restarts_it(
    steps: int | None, phase: str
) -> None:
    world = World()
    world.start()
    if steps is not None:
        world.tell(make_report(step=40 + steps, startStep=40))
    world.end(1, 1, message("OutOfMemory", "make training.microBatchSize smaller"))
    world.step()
    assert world.phase == phase
    assert world.status["lastFailure"]["reason"] == "OutOfMemory"
    if phase == "Failed":
        assert world.condition("Failed")["reason"] == "OutOfMemory"
        assert world.condition("Failed")["message"] == "make training.microBatchSize smaller"


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
    world = World(recovery={"maxRestarts": 1, "windowSeconds": 600, "maxAttemptsWithoutProgress": 100})
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
    world = World(recovery={"maxRestarts": 100, "maxAttemptsWithoutProgress": 100})
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
