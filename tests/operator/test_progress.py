"""What the operator keeps of the reports, and how often it writes it, one sentence a case."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from operator_world import World, make_report

from internlm_operator.api import JobStatus
from internlm_operator.failures import MAX_MESSAGE
from internlm_operator.status import set_condition
from internlm_operator.times import stamp

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
        "verified": True,
    }
    speed = {"tokensPerSecond": 8100.0, "tokensPerGpuPerSecond": 4050.0, "tflopsPerGpu": 181.5}
    world.tell(make_report(step=120, **speed, etaSeconds=95, failedSaves=2, checkpoint=checkpoint))
    world.settle()
    assert world.status["progressText"] == "120/400"
    assert world.status["progress"] == {
        "step": 120,
        "totalSteps": 400,
        "tokens": 491520,
        "skippedSteps": 0,
        "failedSaves": 2,
        "loss": 3.0,
        **speed,
        "etaSeconds": 95,
        "eta": "1m35s",
        "lastReportTime": stamp(world.now),
    }
    assert world.status["checkpoint"] == checkpoint
    assert world.status["attempts"][-1]["endStep"] == 120


def test_a_straggler_is_in_the_status_while_it_is_reported() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=120, stragglerRank=3, stragglerScore=1.41421356))
    world.settle()
    progress = world.status["progress"]
    assert (progress["stragglerRank"], progress["stragglerScore"]) == (3, 1.4142)
    world.wait(10)
    world.tell(make_report(step=130, stragglerRank=None, stragglerScore=None))
    world.settle()
    assert not {"stragglerRank", "stragglerScore"} & world.status["progress"].keys()


def test_the_status_holds_no_more_digits_than_a_person_reads() -> None:
    world = World()
    world.start()
    world.tell(make_report(loss=3.3465030193328857, tokensPerSecond=8123.456789))
    world.settle()
    assert world.status["progress"]["loss"] == 3.3465
    assert world.status["progress"]["tokensPerSecond"] == 8123.4568


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


def saved(step: int) -> dict[str, Any]:
    return {"step": step, "uri": f"s3://b/step-{step}", "time": "2026-01-01T00:00:00Z"}


def restart(world: World) -> None:
    world.end(0, 1)
    world.settle()
    world.reap()
    world.wait(world.settle().wake_after or 0)
    world.start()


def test_progress_may_go_back_after_a_restart_but_not_the_checkpoint_from_which_it_began() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=120, checkpoint=saved(100)))
    restart(world)
    world.tell(make_report(attempt=2, step=110, startStep=100, checkpoint=saved(100)))
    world.settle()
    assert world.status["progressText"] == "110/400"
    assert world.status["checkpoint"]["step"] == 100
    assert [(a["startStep"], a["endStep"]) for a in world.status["attempts"]] == [(0, 120), (100, 110)]
    world.tell(make_report(attempt=2, step=110, startStep=100, checkpoint=saved(90)))
    world.settle()
    assert world.status["checkpoint"]["step"] == 100, "a report that another one overtook"


def test_a_checkpoint_that_the_next_attempt_could_not_use_is_not_in_the_status_any_more() -> None:
    world = World(checkpoint={"path": "s3://b/c", "everySteps": 10})
    world.start()
    world.tell(make_report(step=120, checkpoint=saved(100)))
    restart(world)
    restart(world)
    assert world.status["attemptsWithoutProgress"] == 1
    world.tell(make_report(attempt=3, step=61, startStep=50, checkpoint=saved(50)))
    world.settle()
    assert world.status["checkpoint"] == saved(50) | {"bytes": 0, "digest": "", "verified": False}
    world.wait(10)
    world.tell(make_report(attempt=3, step=71, startStep=50, checkpoint=saved(50)))
    world.settle()
    assert world.condition("CheckpointStale")["status"] == "True"
    world.wait(10)
    world.tell(make_report(attempt=3, step=75, startStep=50, checkpoint=saved(70)))
    world.settle()
    assert world.status["checkpoint"]["step"] == world.status["attempts"][-1]["checkpointStep"] == 70
    assert world.condition("CheckpointStale")["status"] == "False"
    assert world.status["attemptsWithoutProgress"] == 0


def test_a_job_that_begins_afresh_in_another_place_has_no_checkpoint_until_it_saves() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=120, checkpoint=saved(100)))
    world.settle()
    world.edit(suspend=True)
    world.settle()
    world.reap()
    world.edit(suspend=False, checkpoint={"path": "s3://b/elsewhere"})
    world.start()
    assert world.status["checkpoint"]["step"] == 100
    world.tell(make_report(attempt=2, step=10))
    world.settle()
    assert "checkpoint" not in world.status


def test_a_job_whose_checkpoints_prove_damaged_again_and_again_comes_to_an_end() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=120, checkpoint=saved(100)))
    for number in range(2, 6):
        restart(world)
        world.tell(make_report(attempt=number, step=120, startStep=50, checkpoint=saved(100)))
        world.settle()
        assert world.status["checkpoint"]["step"] == 100
    world.end(0, 1)
    world.settle()
    assert world.condition("Failed")["reason"] == "NoProgress"


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


def test_no_end_is_foreseen_of_workers_that_do_not_run() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=120, etaSeconds=95, tokensPerSecond=8100.0))
    world.settle()
    world.edit(suspend=True)
    world.settle()
    assert world.status["phase"] in ("Suspending", "Suspended")
    assert "etaSeconds" not in world.status["progress"]
    assert world.status["progress"]["tokensPerSecond"] == 8100.0


def test_others_words_are_bounded_in_a_condition() -> None:
    status = JobStatus()
    set_condition(
        status, "Queued", True, "PodsRefused", "a webhook's\n" + "word " * 10_000, 1, datetime.now(UTC)
    )
    [found] = status.conditions
    assert found.message.startswith("a webhook's word word")
    assert len(found.message) <= MAX_MESSAGE
