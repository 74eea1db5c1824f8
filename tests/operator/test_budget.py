"""What a failure costs, where the next gang goes, and when it is enough; one sentence a case."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import World, make_report, message

from internlm_operator.api import ExcludedNode
from internlm_operator.nodes import GONE, NodeHealth
from internlm_operator.plan import Apply, Delete
from internlm_operator.times import stamp


def actions(plan: Any, kind: type) -> list[Any]:
    return [action for action in plan.actions if isinstance(action, kind)]


# The budget


def fail(
    world: World, index: int = 0, reason: str = "Error", text: str = "ZeroDivisionError", **report: Any
) -> None:
    """Start the next gang, report, and let one worker fail."""
    world.reap()
    world.wait(world.settle().wake_after or 0)
    world.start()
    if report:
        number = int(world.attempt_of(index))
        world.tell(make_report(number, **report))
        world.settle()
    world.end(index, 1, message(reason, text))
    world.settle()


def saved(step: int) -> dict[str, Any]:
    return {"step": step, "checkpoint": {"step": step, "uri": "s3://b/c", "time": "2026-01-01T00:00:00Z"}}


def test_three_attempts_without_a_checkpoint_end_the_job() -> None:
    world = World()
    fail(world)
    fail(world)
    assert world.phase == "Restarting"
    assert world.status["attemptsWithoutProgress"] == 2
    fail(world, step=30)
    assert world.phase == "Failed"
    assert world.condition("Failed")["reason"] == "NoProgress"
    assert "ZeroDivisionError" in world.condition("Failed")["message"]
    assert world.status["lastFailure"]["action"] == "Fail"


def test_restarts_are_free_while_checkpoints_advance() -> None:
    world = World(recovery={"maxRestarts": 1})
    for number in range(1, 21):
        fail(world, **saved(number * 10), startStep=(number - 1) * 10)
    assert world.phase == "Restarting"
    assert world.status["restarts"] == 20
    assert "recentRestarts" not in world.status or world.status["recentRestarts"] == []
    fail(world)
    assert world.phase == "Restarting"
    fail(world)
    assert world.phase == "Failed"


def test_a_checkpoint_that_was_there_before_is_no_progress() -> None:
    world = World()
    for _ in range(3):
        fail(world, **saved(10), startStep=10)
    assert world.phase == "Failed"


def test_a_checkpoint_whose_report_was_lost_shows_in_where_the_next_attempt_begins() -> None:
    world = World()
    fail(world)
    fail(world)
    world.reap()
    world.wait(world.settle().wake_after or 0)
    world.start()
    world.tell(make_report(3, step=50, startStep=50))
    world.settle()
    assert world.status["attemptsWithoutProgress"] == 0


def test_the_clusters_failures_do_not_use_up_the_jobs_attempts_but_its_restarts() -> None:
    world = World(recovery={"maxRestarts": 5})
    for _ in range(5):
        fail(world, reason="StorageUnreachable", text="s3://b does not answer")
        assert world.phase == "Restarting"
    fail(world, reason="StorageUnreachable", text="s3://b does not answer")
    assert world.condition("Failed")["reason"] == "RestartLimitExceeded"
    assert world.status["attemptsWithoutProgress"] == 0


@pytest.mark.parametrize(
    ("trains", "waits"),
    [(True, [None, None, None, None, None]), (False, [None, 10, 20, 40, 80])],
)
def test_an_eviction_is_free_and_its_gang_is_made_again_after_a_pause_where_none_gets_to_train(
    trains: bool, waits: list[float | None]
) -> None:
    world, found = World(recovery={"maxRestarts": 0}), []
    for number in range(1, 6):
        world.start()
        assert world.attempt_of(0) == str(number)
        if trains:
            world.tell(make_report(number, step=number))
            world.settle()
        world.delete("job-worker-1")
        world.settle()
        failure = world.status["lastFailure"]
        assert (failure["class"], failure["action"]) == ("Preemption", "Reschedule")
        world.reap()
        found.append(world.settle().wake_after)
        world.wait(found[-1] or 0)
    assert found == waits
    assert world.status["restarts"] == 5
    assert world.status["attemptsWithoutProgress"] == 0


def test_a_gang_that_is_evicted_since_it_fills_its_own_storage_is_not_made_again_for_ever() -> None:
    world = World()
    for _ in range(3):
        world.reap()
        world.wait(world.settle().wake_after or 0)
        world.start()
        limit = 'Usage of EmptyDir volume "cache" exceeds the limit "1Gi". '
        world.pod(1)["status"] = {"phase": "Failed", "reason": "Evicted", "message": limit}
        world.settle()
    assert world.phase == "Failed"
    failed = world.condition("Failed")
    assert failed["reason"] == "NoProgress"
    assert "emptyDir.sizeLimit of this volume in spec.template" in failed["message"]


def test_a_person_who_resumes_the_job_gives_it_a_new_budget() -> None:
    world = World()
    fail(world)
    fail(world)
    world.edit(suspend=True)
    world.settle()
    world.reap()
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert world.status["attemptsWithoutProgress"] == 0


def test_the_backoff_is_the_jobs_own() -> None:
    world = World(recovery={"backoffSeconds": 3, "maxBackoffSeconds": 5, "maxAttemptsWithoutProgress": 100})
    waits = []
    for _ in range(5):
        fail(world)
        world.reap()
        waits.append(world.settle().wake_after)
    assert waits == [None, 3, 5, 5, 5]


# Away from the node that is to blame

XID = "Xid 79: GPU has fallen off the bus"


def affinity(world: World, index: int = 0) -> list[str]:
    terms = world.pod(index)["spec"].get("affinity", {}).get("nodeAffinity", {})
    required = terms.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [{}])
    return [name for field in required[0].get("matchFields", []) for name in field["values"]]


def test_the_next_gang_keeps_off_a_node_whose_hardware_failed_until_that_expires() -> None:
    world = World(recovery={"excludeNodeSeconds": 600})
    fail(world, 1, text=XID)
    failure = world.status["lastFailure"]
    assert (failure["class"], failure["action"]) == ("Hardware", "GangRestartAvoidingNode")
    assert "Xid 79" in failure["evidence"]
    [entry] = world.status["excludedNodes"]
    assert (entry["node"], entry["class"]) == ("node-1", "Hardware")
    assert "NodeExcluded" in [event.reason for event in world.events]
    world.reap()
    world.start()
    assert affinity(world) == affinity(world, 1) == ["node-1"]
    assert world.status["attempts"][-1]["excludedNodes"] == ["node-1"]
    world.wait(600)
    fail(world)
    world.reap()
    world.wait(10)
    world.start()
    assert affinity(world) == []


def test_a_failure_that_nobody_can_explain_is_the_nodes_when_it_happens_there_again() -> None:
    world = World()
    fail(world, 1)
    assert world.status["lastFailure"]["action"] == "GangRestart"
    fail(world, 1)
    assert world.status["lastFailure"]["action"] == "GangRestartAvoidingNode"
    world.reap()
    world.wait(10)
    world.start()
    assert affinity(world) == ["node-1"]


@pytest.mark.parametrize(("class_", "kept_off"), [("Hardware", ["node-1"]), ("Unknown", [])])
def test_other_jobs_keep_off_failed_hardware_only(class_: str, kept_off: list[str]) -> None:
    world = World()
    world.excluded = [
        ExcludedNode.model_validate(
            {"node": "node-1", "class": class_, "since": stamp(world.now), "until": "2027-01-01T00:00:00Z"}
        )
    ]
    world.start()
    assert affinity(world) == kept_off


def test_a_node_with_a_sign_of_failed_hardware_is_avoided_from_the_start() -> None:
    world = World()
    world.nodes = {f"node-{i}": NodeHealth() for i in range(10)} | {"bad": NodeHealth(fault="taint x")}
    world.start()
    assert affinity(world) == ["bad"]


def test_no_more_nodes_are_left_out_than_the_cap_allows() -> None:
    world = World()
    world.nodes = {f"node-{i}": NodeHealth(fault="taint x") for i in range(20)}
    world.start()
    assert affinity(world) == ["node-0", "node-1"], "a tenth of twenty"


def test_a_gang_that_finds_no_other_node_may_use_the_suspect_after_a_while() -> None:
    world = World()
    fail(world, 1, text=XID)
    world.reap()
    world.settle()
    blocked = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
    for pod in world.pods.values():
        pod["status"]["conditions"] = [blocked]
    assert world.settle().wake_after == 120
    world.wait(120)
    world.settle()
    assert world.attempt_of(0) == "3"
    assert affinity(world) == []
    assert world.status["restarts"] == 1, "finding no node is no failure"
    assert "NodesReadmitted" in [event.reason for event in world.events]


def test_a_gang_that_finds_no_other_node_never_goes_back_to_one_with_a_sign_of_failed_hardware() -> None:
    world = World()
    world.nodes = {f"node-{i}": NodeHealth() for i in range(20)}
    fail(world, 1, text=XID)
    world.nodes["bad"] = NodeHealth(fault="taint x")
    world.reap()
    world.settle()
    assert affinity(world) == ["bad", "node-1"]
    blocked = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
    for attempt in ("3", "3"):
        for pod in world.pods.values():
            pod["status"]["conditions"] = [blocked]
        world.wait(120)
        world.settle()
        assert (world.attempt_of(0), affinity(world)) == (attempt, ["bad"])
    readmitted = [event.message for event in world.events if event.reason == "NodesReadmitted"]
    assert readmitted == ["There are no nodes but node-1: the next attempt may use them."]
    world.nodes["bad"] = NodeHealth()
    world.settle()
    assert (world.attempt_of(0), affinity(world)) == ("4", []), "it was repaired"


# Nodes that are gone


def test_a_pod_on_a_deleted_node_has_failed_and_is_not_waited_for() -> None:
    world = World()
    world.start()
    world.nodes = {"node-1": GONE, "node-0": NodeHealth()}
    plan = world.step()
    assert (world.status["lastFailure"]["class"], world.status["lastFailure"]["reason"]) == (
        "Infrastructure",
        "NodeLost",
    )
    grace = {a.name: a.grace_seconds for a in actions(plan, Delete)}
    assert grace == {"job-worker-0": 15, "job-worker-1": 0}


def test_what_is_left_of_a_gang_that_lost_a_node_cannot_save_and_gets_a_short_grace() -> None:
    world = World()
    world.start()
    world.nodes = {"node-1": NodeHealth(ready=False)}
    why = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "DeletionByTaintManager",
        "message": "lost",
    }
    world.pod(1)["status"]["conditions"] = [why]
    world.delete("job-worker-1")
    plan = world.step()
    assert world.status["lastFailure"]["class"] == "Infrastructure"
    # Worker 1's own grace, which no kubelet keeps any more, is shortened, too.
    assert {a.name: a.grace_seconds for a in actions(plan, Delete)} == {
        "job-worker-0": 15,
        "job-worker-1": 15,
    }


def test_a_worker_that_finished_on_a_node_that_is_gone_has_finished() -> None:
    world = World()
    world.start()
    world.complete(0, 1)
    world.nodes = {"node-1": GONE}
    world.settle()
    assert world.phase == "Succeeded"


# The disruption budget


def test_a_disruption_budget_is_made_only_when_asked_for_and_later_refuses_nothing() -> None:
    def budget(world: World) -> list[int]:
        made = [a.object for a in actions(world.plan(), Apply)]
        return [o["spec"]["minAvailable"] for o in made if o["kind"] == "PodDisruptionBudget"]

    assert budget(World()) == []
    world = World(recovery={"podDisruptionBudget": True})
    assert budget(world) == [2]
    world.start()
    world.edit(recovery={})
    assert budget(world) == [0]
