"""Restarts in place: what the operator decides when the processes of pods end and the pods do not."""

from __future__ import annotations

from datetime import timedelta

import pytest
from operator_world import World, make_report, message

from internlm_operator.inplace import HEARD_SECONDS, READY_SECONDS
from internlm_operator.nodes import NodeHealth
from internlm_operator.plan import Create, Delete

HUNG = message("Hung", "rank 3 hangs in step 41, fwd_bwd for 12 s")


def started(nodes: int = 2) -> World:
    """A gang that runs, with its agents."""
    world = World(nodes=nodes, recovery={"maxAttemptsWithoutProgress": 10})
    world.start()
    world.agents_tell(1, *range(nodes))
    world.tell(make_report(step=120))
    world.settle()
    return world


def touched(world: World) -> bool:
    """Whether any pod is to be made or removed."""
    return any(isinstance(action, Create | Delete) for action in world.plan().actions)


def test_where_processes_end_and_all_pods_stay_the_next_attempt_uses_the_same_pods() -> None:
    world = started()
    pods = {name: pod["metadata"]["uid"] for name, pod in world.pods.items()}
    world.agents_tell(1, 1, ended=(70, HUNG))
    world.settle()
    first, second = world.status["attempts"]
    assert (first["reason"], second["number"], second["gang"]) == ("Hung", 2, 1)
    assert world.status["lastFailure"]["pod"] == "job-worker-1"
    assert world.status["lastFailure"]["message"] == "rank 3 hangs in step 41, fwd_bwd for 12 s"
    assert world.status["restarts"] == 1
    assert world.phase == "Restarting"
    assert world.condition("Running")["reason"] == "RestartingInPlace"
    world.agents_tell(2, 0)
    world.settle()
    assert world.phase == "Restarting"
    world.agents_tell(2, 1)
    world.settle()
    assert world.phase == "Running"
    assert {name: pod["metadata"]["uid"] for name, pod in world.pods.items()} == pods
    world.complete(0, 1)
    world.settle()
    assert world.phase == "Succeeded"


@pytest.mark.parametrize(
    ("health", "class_", "action"),
    [
        ("Unhealthy", "Hardware", "GangRestartAvoidingNode"),
        ("Healthy", "Unknown", "InPlaceRestart"),
        ("Unknown", "Unknown", "InPlaceRestart"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_device_that_kubernetes_calls_unhealthy_is_to_blame_though_the_pods_stay(
    health: str, class_: str, action: str, in_place: bool
) -> None:
    world, attempt = started(), 1
    if in_place:
        world.agents_tell(1, 0, ended=(70, HUNG))
        world.settle()
        attempt = 2
        world.agents_tell(2, 0, 1)
        world.tell(make_report(2, step=160, startStep=120))
        world.settle()
    trainer = world.pod(1)["status"]["containerStatuses"][0]
    resources = [{"resourceID": "GPU-9", "health": health}]
    trainer["allocatedResourcesStatus"] = [{"name": "nvidia.com/gpu", "resources": resources}]
    world.pod(1)["status"]["containerStatuses"].insert(0, {"name": "sidecar", "state": {"running": {}}})
    world.agents_tell(attempt, 1, ended=(1, message("Error", "rank 3: RuntimeError: CUDA error")))
    world.settle()
    failure = world.status["lastFailure"]
    assert (failure["attempt"], failure["class"], failure["action"]) == (attempt, class_, action)
    assert ("nvidia.com/gpu GPU-9: Unhealthy" in failure["evidence"]) == (class_ == "Hardware")


def test_agents_that_do_not_start_again_in_time_have_their_gang_made_anew() -> None:
    world = started()
    world.agents_tell(1, 0, ended=(137, message("Killed", "rank 1 was ended by signal 9 (SIGKILL)")))
    world.settle()
    world.agents_tell(2, 0)
    world.wait(READY_SECONDS - 1)
    assert not touched(world)
    assert (world.step().wake_after or 0) <= 1
    world.wait(2)
    world.settle()
    assert world.status["lastFailure"]["reason"] == "InPlaceRestartFailed"
    assert "job-worker-1" in world.status["lastFailure"]["message"]
    world.reap()
    world.settle()
    assert {world.attempt_of(i) for i in range(2)} == {"3"}
    assert "gang" not in world.status["attempts"][-1]


def test_an_attempt_in_place_that_ends_without_a_step_is_not_followed_by_another() -> None:
    world = started()
    for attempt in (1, 2):
        world.agents_tell(attempt, 0, 1)
        world.settle()
        world.agents_tell(attempt, 0, ended=(1, message("Error", "rank 0: ValueError: x")))
        world.settle()
    assert all(pod["metadata"].get("deletionTimestamp") for pod in world.pods.values())


def test_an_attempt_in_place_that_trained_may_be_followed_by_another() -> None:
    world = started(nodes=3)
    for attempt in (1, 2, 3):
        world.agents_tell(attempt, 0, 1, 2)
        world.tell(make_report(attempt, step=120 + attempt, startStep=120))
        world.settle()
        # Another worker each time: what comes back on a node has the gang made anew elsewhere.
        world.agents_tell(attempt, attempt - 1, ended=(1, message("Error", "rank 0: ValueError: x")))
        world.settle()
    assert [attempt.get("gang") for attempt in world.status["attempts"]] == [None, 1, 1, 1]


def test_pods_that_are_gone_or_going_or_without_an_agent_are_made_anew() -> None:
    for happens in ("vanishes", "ends", "is deleted", "has no agent"):
        world = started()
        match happens:
            case "vanishes":
                world.vanish(0)
            case "ends":
                world.end(0, 1)
            case "is deleted":
                world.delete("job-worker-0")
            case "has no agent":
                del world.agents[0]
        world.agents_tell(1, 1, ended=(70, HUNG))
        world.settle()
        assert world.status["attempts"][-1]["number"] == 1, happens
        world.reap()
        world.pods.clear()
        world.settle()
        assert "gang" not in world.status["attempts"][-1], happens


WAITS = message("Hung", "rank 0 waits for the others in step 41, reduce for 13 s")


def test_a_worker_that_only_waits_for_one_on_a_silent_node_is_not_to_blame_and_pods_there_are_made_anew() -> (
    None
):
    world = started()
    world.nodes["node-1"] = NodeHealth(ready=False)
    world.agents_tell(1, 0, ended=(70, WAITS))
    world.settle()
    failure = world.status["lastFailure"]
    assert (failure["class"], failure["reason"]) == ("Infrastructure", "NodeLost")
    assert (failure["pod"], failure["node"]) == ("job-worker-1", "node-1")
    assert failure["message"] == "Node node-1 does not answer."
    assert failure["action"] == "GangRestart"


def test_an_attempt_in_place_waits_for_nobody_on_a_silent_node() -> None:
    world = started()
    lost = message("Error", "rank 0: RuntimeError: Connection reset by peer")
    world.agents_tell(1, 0, ended=(1, lost))  # its node was killed a moment ago, and nobody knows it yet
    world.wait(5)
    world.settle()
    assert world.status["lastFailure"]["action"] == "InPlaceRestart"
    world.agents_tell(2, 0)
    world.settle()
    assert world.status["restarts"] == 1
    world.nodes["node-1"] = NodeHealth(ready=False)
    world.settle()
    failure = world.status["lastFailure"]
    assert (failure["attempt"], failure["reason"], failure["pod"]) == (2, "NodeLost", "job-worker-1")
    assert failure["action"] == "GangRestart"


def test_where_all_nodes_answer_the_one_that_hangs_is_waited_for_and_named() -> None:
    world = started()
    world.agents_tell(1, 0, ended=(70, WAITS))
    world.settle()
    assert world.status["restarts"] == 0
    world.wait(1)
    world.agents_tell(1, 1, ended=(70, HUNG))
    world.settle()
    failure = world.status["lastFailure"]
    assert (failure["pod"], failure["reason"], failure["action"]) == (
        "job-worker-1",
        "Hung",
        "InPlaceRestart",
    )


def test_a_failure_of_its_own_is_not_blamed_on_a_silent_node() -> None:
    world = started()
    world.nodes["node-1"] = NodeHealth(ready=False)
    world.agents_tell(1, 0, ended=(137, message("Killed", "rank 0 was ended by signal 9 (SIGKILL)")))
    world.settle()
    assert world.status["lastFailure"]["pod"] == "job-worker-0"
    assert world.status["lastFailure"]["action"] == "GangRestart", "a silent node starts nothing in place"


def test_what_only_an_edit_helps_ends_the_job_and_its_pods_end_by_themselves() -> None:
    world = started()
    world.agents_tell(1, 0, ended=(65, message("UserError", "spec.data: no such file")))
    plan = world.step()
    assert world.phase == "Failed"
    assert [action.name for action in plan.actions if isinstance(action, Delete)] == ["job-worker-1"]
    world.end(0, 65, message("UserError", "spec.data: no such file"))
    world.wait(60)
    world.reap()
    world.settle()
    assert list(world.pods) == ["job-worker-0"]


def test_what_an_agent_says_of_another_attempt_or_gang_does_not_count() -> None:
    world = started()
    world.agents_tell(1, 1, ended=(70, HUNG))
    world.settle()
    assert len(world.status["attempts"]) == 2
    world.wait(1)
    world.settle()
    assert len(world.status["attempts"]) == 2
    world.vanish(0)
    world.settle()
    world.reap()
    world.settle()
    world.run(0, 1)
    assert world.attempt_of(0) == "3"
    world.settle()
    assert world.phase == "Running"


def test_an_operator_that_starts_anew_learns_of_the_agents_again() -> None:
    world = started()
    world.agents_tell(1, 1, ended=(70, HUNG))
    world.settle()
    world.agents.clear()
    world.settle()
    assert world.phase == "Restarting"
    world.now += timedelta(seconds=5)
    world.agents_tell(2, 0, 1)
    world.settle()
    world.agents.clear()
    world.wait(READY_SECONDS + 10)
    world.settle()
    assert world.phase == "Running"


def test_an_operator_that_takes_over_gives_an_attempt_in_place_the_whole_time_to_tell_it_that_it_began() -> (
    None
):
    world = started()
    world.agents_tell(1, 1, ended=(70, HUNG))
    world.settle()
    world.agents.clear()
    world.wait(READY_SECONDS + 10)
    world.listening_since = world.now
    assert not touched(world)
    world.wait(READY_SECONDS - 1)
    world.settle()
    assert not touched(world)
    world.agents_tell(2, 0, 1)
    world.settle()
    assert (world.phase, world.status["restarts"]) == ("Running", 1)


@pytest.mark.parametrize("heard", [True, False])
def test_an_operator_that_has_just_taken_over_hears_all_agents_before_it_judges(heard: bool) -> None:
    world = started()
    world.agents.clear()
    world.agents_tell(1, 1, ended=(70, HUNG))
    world.settle()
    assert world.phase == "Running"
    assert not touched(world)
    world.wait(HEARD_SECONDS - 1)
    if heard:
        world.agents_tell(1, 0)
    else:
        world.settle()
        assert world.phase == "Running"
        world.wait(1)
    world.settle()
    assert world.status["lastFailure"]["action"] == ("InPlaceRestart" if heard else "GangRestart")
