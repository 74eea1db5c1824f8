"""What a job may ask of its life: who runs it, how long, what is left of it; and what its health says of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from operator_world import START, World, make_report, message

from internlm_operator.plan import Create
from internlm_operator.times import duration, stamp


def condition(world: World, type: str) -> tuple[str, str]:
    found = world.condition(type)
    return found["status"], found["reason"]


def grace(world: World, index: int) -> int:
    return int(world.pod(index)["metadata"]["deletionGracePeriodSeconds"])


# Another controller's job


def test_a_job_of_another_controller_is_left_alone() -> None:
    world = World(managedBy="kueue.x-k8s.io/multikueue")
    plan = world.plan()
    assert (plan.status, plan.actions, plan.wake_after) == (None, [], None)
    world.job["status"] = {"phase": "Running", "attempts": "as the other one likes"}
    assert world.plan().status is None


def test_a_job_that_names_this_operator_is_run() -> None:
    assert any(
        isinstance(action, Create)
        for action in World(managedBy="training.internlm.io/internlm-operator").plan().actions
    )


# Deadlines


def test_a_job_fails_at_its_deadline_and_its_workers_have_time_to_save() -> None:
    world = World(activeDeadlineSeconds=100)
    world.start()
    world.wait(40)
    assert world.plan().wake_after == 60
    world.wait(60)
    world.settle()
    assert condition(world, "Failed") == ("True", "DeadlineExceeded")
    assert "activeDeadlineSeconds" in world.condition("Failed")["message"]
    assert grace(world, 0) == 60
    checkpoint = {"step": 130, "uri": "s3://b/c", "time": stamp(world.now)}
    world.tell(make_report(step=130, checkpoint=checkpoint))
    world.settle()
    assert world.status["checkpoint"]["step"] == 130, "what was saved then is known"


def test_the_deadline_counts_what_a_job_waits_and_begins_anew_when_it_is_resumed() -> None:
    world = World(activeDeadlineSeconds=100)
    world.settle()
    world.wait(90)
    world.edit(suspend=True)
    world.settle()
    world.wait(1000)
    world.settle()
    assert world.phase == "Suspended"
    world.edit(suspend=False)
    world.start()
    world.wait(90)
    world.settle()
    assert world.phase == "Running"
    world.wait(10)
    world.settle()
    assert world.phase == "Failed"


def test_a_job_that_has_completed_at_its_deadline_succeeds() -> None:
    world = World(activeDeadlineSeconds=100)
    world.start()
    world.complete(0, 1)
    world.wait(200)
    world.settle()
    assert world.phase == "Succeeded"


def test_workers_that_do_not_start_in_time_are_made_anew_and_say_why() -> None:
    world = World(startupDeadlineSeconds=60)
    world.settle()
    world.wait(1000)
    world.settle()
    assert world.status["restarts"] == 0, "waiting for a node is no start"
    world.schedule(0)
    waiting = {"reason": "ImagePullBackOff", "message": "no such image: trainer:1"}
    world.set_state(1, "Pending", waiting=waiting)
    world.settle()
    assert condition(world, "Starting") == ("True", "ImagePullBackOff")
    assert world.plan().wake_after == 60
    world.wait(60)
    world.settle()
    assert world.status["lastFailure"]["reason"] == "StartupDeadlineExceeded"
    assert world.status["lastFailure"]["node"] == "node-0"
    assert "startupDeadlineSeconds" in world.status["lastFailure"]["message"]
    world.reap()
    world.start()
    assert (world.phase, world.status["restarts"]) == ("Running", 1)
    world.wait(1000)
    world.settle()
    assert world.phase == "Running", "it is no limit for what runs"


# The end


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        ("Running", {"job-worker-1": False}),
        ("All", {}),
        ("None", {"job-worker-0": True, "job-worker-1": False}),
    ],
)
def test_what_is_left_of_a_failed_job_is_as_its_policy_says(policy: str, left: dict[str, bool]) -> None:
    world = World(cleanPodPolicy=policy)
    world.start()
    world.end(1, 1, message("UserError", "no such bucket"))
    world.settle()
    assert world.phase == "Failed"
    world.reap()
    world.settle()
    running = {
        name: "running" in pod["status"]["containerStatuses"][0]["state"] for name, pod in world.pods.items()
    }
    assert running == left


# Suspension


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        (150, "Set spec.suspend to false to go on from step 150."),
        (100, "50 steps after it were not saved; if the workers had too little time, make "
         "spec.template.spec.terminationGracePeriodSeconds longer."),
    ],
)  # fmt: skip
def test_a_suspended_job_says_where_it_goes_on_and_what_was_lost(saved: int, sentence: str) -> None:
    world = World()
    world.start()
    world.edit(suspend=True)
    world.settle()
    assert grace(world, 0) == 60, "the pods' own, in which the trainer saves"
    checkpoint = {"step": saved, "uri": "s3://b/c", "time": stamp(world.now)}
    world.tell(make_report(step=150, checkpoint=checkpoint))
    for index in (0, 1):
        world.end(index, 75, message("Stopped", "stopped after step 150, which is saved", 150))
    world.settle()
    world.reap()
    world.settle()
    assert condition(world, "Suspended") == ("True", "SuspendRequested")
    assert world.condition("Suspended")["message"].endswith(sentence)
    assert world.events[-1].message.endswith(sentence)


# Health


def report_at(world: World, step: int, **fields: Any) -> None:
    world.tell(make_report(step=step, **fields))
    world.settle()


def test_a_checkpoint_is_stale_when_two_saves_are_missing() -> None:
    world = World(checkpoint={"path": "s3://b/c", "everySteps": 50})
    world.start()
    assert condition(world, "CheckpointStale") == ("False", "SettingUp")
    saved = {"step": 50, "uri": "s3://b/c", "time": stamp(START)}
    report_at(world, 150, checkpoint=saved)
    assert condition(world, "CheckpointStale") == ("False", "Fresh")
    report_at(world, 151, checkpoint=saved)
    assert condition(world, "CheckpointStale") == ("True", "SaveOverdue")
    assert "step 50" in world.condition("CheckpointStale")["message"]
    report_at(world, 160, checkpoint=saved, failedSaves=2)
    assert condition(world, "CheckpointStale") == ("True", "SavesFail")
    assert [event.reason for event in world.events].count("CheckpointStale") == 1
    world.wait(10)
    report_at(world, 201, checkpoint=saved | {"step": 200})
    assert condition(world, "CheckpointStale") == ("False", "Fresh")


def test_a_stale_checkpoint_is_not_written_again_with_every_report() -> None:
    world = World(checkpoint={"path": "s3://b/c", "everySteps": 10})
    world.start()
    report_at(world, 100)
    world.wait(1)
    world.tell(make_report(step=110))
    assert world.plan().status is None, "progress alone waits a few seconds"


def test_progress_is_stalled_when_no_report_comes_for_long() -> None:
    world = World()
    world.start()
    world.wait(7200)
    world.settle()
    assert condition(world, "ProgressStalled") == ("False", "SettingUp"), "data may be made first"
    report_at(world, 120)
    assert condition(world, "ProgressStalled") == ("False", "Progressing")
    assert world.plan().wake_after == 600
    world.wait(600)
    world.settle()
    assert condition(world, "ProgressStalled") == ("True", "NoReport")
    assert "after step 120" in world.condition("ProgressStalled")["message"]
    assert world.events[-1].reason == "ProgressStalled"
    report_at(world, 130)
    assert condition(world, "ProgressStalled") == ("False", "Progressing")
    world.end(0, 1)
    world.settle()
    assert condition(world, "ProgressStalled") == ("False", "NotRunning")


def test_slow_steps_may_be_silent_for_longer() -> None:
    world = World()
    world.start()
    report_at(world, 100, etaSeconds=300 * 60)  # a minute a step, a report every 10 steps
    world.wait(6000 - 1)
    world.settle()
    assert condition(world, "ProgressStalled") == ("False", "Progressing")
    world.wait(1)
    world.settle()
    assert condition(world, "ProgressStalled") == ("True", "NoReport")


def test_an_operator_that_was_away_does_not_take_its_own_silence_for_the_jobs() -> None:
    world = World()
    world.start()
    report_at(world, 120)
    world.wait(5000)
    world.report, world.listening_since = None, world.now - timedelta(seconds=5)
    world.settle()
    assert condition(world, "ProgressStalled") == ("False", "Progressing")
    world.wait(600)
    world.settle()
    assert condition(world, "ProgressStalled") == ("True", "NoReport")


# What kubectl prints


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (-3, "0s"),
        (59.6, "59s"),
        (270, "4m30s"),
        (3600, "1h"),
        (18420, "5h7m"),
        (331200, "3d20h"),
        (90000, "1d1h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_the_status_has_the_layout_and_the_selector_of_the_columns_and_of_scale() -> None:
    world = World(parallel={"zero": {"parameters": 2, "gradients": 4, "optimizer": -1}})
    world.start()
    assert world.status["layout"] == "zero 2/4/4"
    assert world.status["selector"] == "training.internlm.io/job-name=job"


# What people and other versions do to a job


def test_a_description_that_this_operator_does_not_know_waits_for_an_edit() -> None:
    world = World(nodes=0, gpusPerNode="two")
    world.settle()
    assert (world.phase, condition(world, "Running")) == ("Pending", ("False", "InvalidSpec"))
    assert "spec.nodes" in world.condition("Running")["message"]
    assert "spec.gpusPerNode" in world.condition("Running")["message"]
    assert not world.pods
    assert [event.reason for event in world.events] == ["InvalidSpec"]
    assert condition(world, "Restarting") == ("False", "NotRestarting")
    world.edit(nodes=2, gpusPerNode=0)
    world.start()
    assert world.phase == "Running"


def test_workers_of_a_description_that_became_unknown_go_on_to_the_end() -> None:
    world = World()
    world.start()
    world.edit(optimiser="adam")
    world.settle()
    assert condition(world, "Running") == ("True", "InvalidSpec")
    assert "optimiser: unknown field" in world.condition("Running")["message"]
    world.complete(0, 1)
    world.settle()
    assert world.phase == "Succeeded"


def test_a_worker_that_fails_under_an_unknown_description_is_restarted_after_the_edit() -> None:
    world = World()
    world.start()
    world.edit(optimiser="adam")
    world.end(1, 1)
    world.settle()
    assert condition(world, "Running") == ("False", "InvalidSpec")
    assert (world.phase, len(world.pods)) == ("Pending", 2)
    del world.job["spec"]["optimiser"]
    world.settle()
    world.reap()
    world.start()
    assert (world.phase, world.status["restarts"]) == ("Running", 1)


def test_a_job_whose_description_is_unknown_can_be_suspended_to_edit_it() -> None:
    world = World()
    world.start()
    world.edit(optimiser="adam", suspend=True)
    world.settle()
    world.reap()
    world.settle()
    assert world.phase == "Suspended"


def lives() -> dict[str, World]:
    """Jobs in the states that they may be in for long."""
    made = {name: World() for name in ("Running", "Succeeded", "Failed", "Suspended")}
    for world in made.values():
        world.start()
        world.tell(make_report(step=120))
        world.settle()
    made["Succeeded"].complete(0, 1)
    made["Failed"].end(0, 65, message("UserError", "no such file"))
    made["Suspended"].edit(suspend=True)
    for world in made.values():
        world.settle()
        world.reap()
        world.settle()
    return made


def edits(status: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The status with any one field taken out or emptied, or any one condition taken out or turned."""
    for name, value in status.items():
        yield {key: other for key, other in status.items() if key != name}
        yield status | {name: type(value)()}
    for index, condition in enumerate(status["conditions"]):
        others = status["conditions"][:index] + status["conditions"][index + 1 :]
        turned = condition | {"status": "False" if condition["status"] == "True" else "True"}
        yield status | {"conditions": others}
        yield status | {"conditions": [*others, turned]}
    yield status | {"completionTime": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize("phase", ["Running", "Succeeded", "Failed"])
def test_a_status_that_somebody_edited_is_corrected_and_the_job_goes_on_or_stays_finished(phase: str) -> None:
    before = lives()[phase]
    assert before.phase == phase
    for status in edits(before.status):
        world = copy.deepcopy(before)
        world.job["status"] = copy.deepcopy(status)
        world.settle()
        world.wait(400)
        world.settle()
        changed = {key for key in status | before.status if status.get(key) != before.status.get(key)}
        assert world.phase == phase, changed
        assert world.pods.keys() == before.pods.keys(), changed
        assert bool(world.status["completionTime"]) == (phase != "Running"), changed
        then, now = (
            {c["type"]: c["status"] for c in status["conditions"]} for status in (before.status, world.status)
        )
        assert now == then, changed


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_finished_job_whose_status_somebody_emptied_is_finished_again_by_what_its_pods_say(
    phase: str,
) -> None:
    world = lives()[phase]
    pods = set(world.pods)
    del world.job["status"]
    world.settle()
    assert world.phase == phase
    assert set(world.pods) == pods
    assert len(world.status["attempts"]) == 1


def test_a_finished_job_whose_status_was_emptied_and_whose_pods_are_gone_is_a_new_one() -> None:
    world = World(cleanPodPolicy="All")
    world.start()
    world.complete(0, 1)
    world.settle()
    world.reap()
    del world.job["status"]
    world.settle()
    assert (world.phase, len(world.pods)) == ("Pending", 2)


def test_a_status_that_somebody_emptied_is_made_anew_around_the_gang_that_is_there() -> None:
    world = World()
    world.start()
    world.end(0, 1)
    world.settle()
    world.reap()
    world.start()
    assert world.attempt_of(0) == "2"
    del world.job["status"]
    world.settle()
    assert world.phase == "Running"
    assert [attempt["number"] for attempt in world.status["attempts"]] == [2]
    world.complete(0, 1)
    world.settle()
    assert world.phase == "Succeeded"
