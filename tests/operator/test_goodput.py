"""The ledger of a job's time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from operator_world import START, World, make_report, message

from internlm_operator.api import Goodput, JobStatus
from internlm_operator.goodput import KINDS, advance, total
from internlm_operator.times import stamp


def ledger(world: World) -> Goodput:
    return Goodput.model_validate(world.status["goodput"])


def spent(world: World) -> dict[str, int]:
    found = ledger(world)
    return {kind.removesuffix("_seconds"): seconds for kind in KINDS if (seconds := getattr(found, kind))}


def test_a_life_without_trouble_is_counted_to_the_second() -> None:
    world = World()
    world.wait(3)  # until the operator saw it
    world.settle()
    world.wait(7)
    world.schedule(0)
    world.schedule(1)
    world.settle()
    world.wait(20)
    world.run(0, 1)
    world.settle()
    world.wait(30)
    world.tell(make_report(step=0, loadSeconds=18.0))
    world.settle()
    world.wait(100)
    world.tell(make_report(step=200, loadSeconds=18.0, checkpointStallSeconds=4.0))
    world.settle()
    world.wait(50)
    world.complete(0, 1)
    world.settle()
    expected = {"queued": 3, "scheduling": 7, "image_pull": 20, "rendezvous": 12, "load": 18}
    assert spent(world) == expected | {"productive": 146, "checkpoint_stall": 4}
    assert total(ledger(world)) == 210
    world.wait(1000)
    world.settle()
    assert total(ledger(world)) == 210, "a finished job spends no time"


def test_steps_that_were_lost_are_redone_and_what_follows_is_productive_again() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=0))
    world.settle()
    world.wait(100)
    world.tell(make_report(step=100))
    world.settle()
    world.end(0, 1, message("Error", "why"))
    world.settle()
    world.wait(9)
    world.reap()
    world.start()
    world.tell(make_report(2, step=60, startStep=60))
    world.settle()
    world.wait(20)
    world.tell(make_report(2, step=80, startStep=60))
    world.settle()
    world.wait(40)
    world.tell(make_report(2, step=120, startStep=60))
    world.settle()
    assert spent(world) == {"productive": 120, "redone": 40, "restarting": 9}
    assert world.status["lastFailure"]["lostSteps"] == 40, "corrected by what the next attempt resumed from"


def test_a_failure_before_the_checkpoint_counts_the_steps_since_as_lost() -> None:
    world = World()
    world.start()
    checkpoint = {"step": 50, "uri": "s3://b/50", "time": "2026-01-01T00:00:00Z"}
    world.tell(make_report(step=70, checkpoint=checkpoint))
    world.settle()
    world.end(0, 1)
    world.settle()
    assert world.status["lastFailure"]["lostSteps"] == 20
    assert world.status["attempts"][0]["checkpointStep"] == 50


@pytest.mark.parametrize(
    ("prepare", "kind"),
    [
        (lambda world: world.edit(suspend=True), "suspended"),
        (lambda world: world.end(0, 1), "restarting"),
    ],
)
def test_time_between_gangs_is_named(prepare: Any, kind: str) -> None:
    world = World()
    world.start()
    prepare(world)
    world.settle()
    world.wait(40)
    world.reap()
    world.settle()
    assert spent(world)[kind] == 40


def test_a_ledger_that_a_hand_changed_begins_again_and_adds_up() -> None:
    world = World()
    world.start()
    world.wait(60)
    world.job["status"]["goodput"]["productiveSeconds"] = 999
    world.tell(make_report(step=10))
    world.settle()
    assert total(ledger(world)) == 60


def test_a_clock_that_is_behind_the_last_write_takes_nothing_back() -> None:
    world = World()
    world.wait(100)
    world.start()
    world.now -= timedelta(seconds=30)
    world.end(0, 1)
    world.settle()
    assert total(ledger(world)) == 100
    world.now = START + timedelta(seconds=130)
    world.reap()
    world.settle()
    assert total(ledger(world)) == 130


def test_time_alone_is_no_reason_to_write() -> None:
    world = World()
    world.start()
    world.wait(3600)
    assert world.plan().status is None


def test_the_time_from_the_last_step_to_the_end_of_a_hang_was_hung() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=100))
    world.settle()
    world.wait(300)
    world.end(0, 1, message("Hung", "rank 0 did not go on"))
    world.settle()
    assert spent(world) == {"hung": 300}


def test_steps_that_were_not_written_yet_when_it_hung_do_not_hide_the_hang() -> None:
    world = World()
    world.start()
    world.tell(make_report(step=100))
    world.settle()
    world.wait(2)
    world.tell(make_report(step=110))  # written with what follows
    world.wait(3)
    world.end(0, 1, message("Hung", "rank 0 was stopped by a signal"))
    world.settle()
    assert spent(world) == {"productive": 2, "hung": 3}


def running(step: int, stalled: bool, **goodput: Any) -> JobStatus:
    stall = {"type": "ProgressStalled", "status": str(stalled), "reason": "x", "lastTransitionTime": "x"}
    attempt = {"number": 1, "startTime": stamp(START), "endStep": step}
    return JobStatus.model_validate(
        {"phase": "Running", "conditions": [stall], "attempts": [attempt], "goodput": goodput}
    )


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ((10, False), (20, False), "productive"),
        ((10, False), (10, True), "hung"),
        ((10, True), (10, True), "hung"),
        ((10, True), (10, False), "hung"),
        ((10, True), (20, False), "productive"),  # its reports had been lost
    ],
)
def test_a_job_that_is_stalled_hangs_unless_its_steps_come_after_all(
    before: tuple[int, bool], after: tuple[int, bool], kind: str
) -> None:
    old, new = running(*before, asOf=stamp(START)), running(*after)
    found = advance(old, new, START, START + timedelta(seconds=50))
    assert getattr(found, f"{kind}_seconds") == total(found) == 50
