"""A store that refuses a save, on a real S3 server behind a proxy that answers errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from trainer.conftest import FaultProxy, Minio
from trainer.loop.jobs import TinyJob

Make = Callable[..., TinyJob]


def fail(method_of: set[str], part: str) -> Callable[[str, str], int | None]:
    """A fault: 500 for requests of these methods whose path has `part`."""
    return lambda method, path: 500 if method in method_of and part in path else None


@pytest.fixture
def saving(tiny: Make, minio: Minio) -> TinyJob:
    """A job of 30 steps that saves every 10 to S3."""
    return tiny(
        processes=1,
        zero=(1, 1, 1),
        training={"steps": 30},
        checkpoint={"path": f"{minio.bucket()}/run", "everySteps": 10, "retrySeconds": 1, "async": True},
    )


def test_a_save_that_fails_is_told_and_training_goes_on(saving: TinyJob, fault_proxy: FaultProxy) -> None:
    fault_proxy.fault = fail({"PUT", "POST"}, "step-00000010")
    run = saving.alone()
    assert run.end() == 0, run.log
    assert "checkpoint step-00000010 could not be saved" in run.log
    assert "training goes on" in run.log
    assert run.log.count("could not be saved") == 1
    assert "saved " in run.log.split("training goes on")[1]
    assert run.message["reason"] == "Completed"


def test_the_last_save_failing_fails_the_job_and_the_next_run_makes_it_good(
    saving: TinyJob, fault_proxy: FaultProxy
) -> None:
    fault_proxy.fault = fail({"PUT", "POST"}, "step-00000030")
    run = saving.alone()
    assert run.end() == 1, run.log
    assert run.message["reason"] == "Error"
    assert run.message["message"].startswith("checkpoint step-00000030 could not be saved")
    assert "Traceback" not in run.log
    fault_proxy.fault = lambda _method, _path: None
    again = saving.alone()
    assert again.end() == 0, again.log
    # Where a save outlasts ten steps, the one due at step 20 is taken a step later.
    newest = re.findall(r"saved \S+/step-0*(\d+) ", run.log)[-1]
    assert int(newest) >= 20
    assert f"resuming from step {newest} " in again.log
