"""Training that meets spikes and numbers that are none: it skips, goes on, and ends where it cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.loop.conftest import Channel
from trainer.loop.jobs import Running, TinyJob, losses, steps, weights

Make = Callable[..., TinyJob]
# Small batches, and a threshold that ordinary steps reach.
LAST = 80
SPIKY = {
    "steps": LAST,
    "globalBatchTokens": 256,
    "skip": {"window": 16, "spikeThreshold": 4, "maxInARow": 40},
}


def skips(run: Running) -> list[int]:
    """The steps that a log says were skipped."""
    return [int(step) for step in re.findall(r"step (\d+): the update was skipped", run.log)]


def test_a_job_with_spikes_skips_them_and_ends_with_the_same_bits_though_it_is_killed(
    tiny: Make, channel: Channel, tmp_path: Path
) -> None:
    alone = {"processes": 1, "zero": (1, 1, 1), "training": SPIKY}
    whole = tiny(folder=tmp_path / "whole", **alone)
    run = whole.alone(**channel.environment)
    assert run.end() == 0, run.log
    reported = channel.reports[-1]["skippedSteps"]
    assert 2 <= reported < LAST / 2

    job = tiny(**alone)
    killed = job.alone()
    killed.wait_for("step 45/")
    os.kill(killed.process.pid, signal.SIGKILL)
    assert killed.end() != 0
    resumed = steps(job.checkpoints)[-1]
    # Something was skipped before and after, so that both counts and window mattered.
    again = job.alone()
    assert again.end() == 0, again.log
    before, after = [step for step in skips(killed) if step <= resumed], skips(again)
    assert before
    assert after
    assert min(after) > resumed
    assert len(before) + len(after) == reported
    assert weights(job.checkpoints, LAST) == weights(whole.checkpoints, LAST)


def test_steps_that_are_skipped_without_end_end_the_job_before_its_next_checkpoint(tiny: Make) -> None:
    job = tiny(processes=1, zero=(1, 1, 1), training={"steps": 4, "schedule": {}})
    first = job.alone()
    assert first.end() == 0, first.log
    kept = {file: file.read_bytes() for file in job.checkpoints.glob("step-*/*")}
    job.training = {"schedule": {}, "optimizer": {"lr": 1.0, "weightDecay": 0.0}, "logEverySteps": 5}
    job.training["skip"] = {"window": 8, "spikeThreshold": 1, "maxInARow": 3}
    job.checkpoint = {"everySteps": 1000}
    run = job.alone()
    assert run.end() == 1, run.log
    assert run.message["reason"] == "Diverged"
    assert re.search(r"the last \d+ steps up to \d+ were skipped", run.message["message"])
    assert "training.skip.maxInARow (3)" in run.message["message"]
    assert "Traceback" not in run.log
    assert {file: file.read_bytes() for file in job.checkpoints.glob("step-*/*")} == kept


def test_every_state_of_scale_moments_and_momentum_is_in_a_checkpoint_for_this_and_other_layouts(
    tiny: Make, tmp_path: Path
) -> None:
    optimizer = {"name": "muon", "lr": 0.01, "stateType": "bf16"}
    ramp = {"startTokens": 256, "incrementTokens": 256, "overTokens": "2.56k"}
    training = {"steps": 40, "precision": "fp16", "optimizer": optimizer, "batchRampUp": ramp}
    # A first scale that overflows, and that has grown again by the time of the checkpoint.
    training |= {"lossScale": {"initial": 2**30, "growthSteps": 4}}
    whole = tiny(folder=tmp_path / "whole", training=training)
    run = whole.torchrun()
    assert run.end() == 0, run.log
    expected = losses(run.log)
    assert 1 in skips(run)
    assert expected[40] < expected[1] - 0.5
    for processes, zero in ((2, (1, 1, 2)), (1, (1, 1, 1))):
        job = tiny(folder=tmp_path / f"on-{processes}", training=training, processes=processes, zero=zero)
        shutil.copytree(whole.checkpoints / "step-00000020", job.checkpoints / "step-00000020")
        run = job.torchrun() if processes > 1 else job.alone()
        assert run.end() == 0, run.log
        found = losses(run.log)
        assert sorted(found) == list(range(21, 41))
        if processes == 2:
            assert weights(job.checkpoints, 40) == weights(whole.checkpoints, 40)
        else:
            # fp16 has 11 bits; 20 steps of it.
            assert [found[step] for step in found] == pytest.approx(
                [expected[step] for step in found], abs=0.05
            )


def test_a_job_that_asks_for_apex_where_it_is_not_is_refused(tiny: Make) -> None:
    job = tiny(processes=1, zero=(1, 1, 1), training={"optimizer": {"lr": 0.01, "backend": "apex"}})
    run = job.alone()
    assert run.end() == 65, run.log
    assert "spec.training.optimizer.backend: apex" in run.message["message"]
    assert "Traceback" not in run.log
