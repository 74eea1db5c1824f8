"""A job in fp8, on CPUs: it learns, is compared with bf16, goes back to bf16 for good, and resumes to the bit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.loop.jobs import Running, TinyJob, losses, weights

pytest.importorskip("triton", reason="Triton is not installed")

Make = Callable[..., TinyJob]
LAST, EVERY = 40, 20


def described(**fp8: Any) -> dict[str, Any]:
    return {
        "model": {"hiddenSize": 64},
        "training": {"steps": LAST, "precision": "fp8", "fp8": {"checkEverySteps": 10, **fp8}},
    }


def resumed(make: Make, whole: TinyJob, folder: Path, **fp8: Any) -> tuple[TinyJob, Running]:
    """The job, gone on from the checkpoint before the last one."""
    job = make(folder=folder, zero=whole.zero, **described(**fp8))
    shutil.copytree(whole.checkpoints, job.checkpoints)
    shutil.rmtree(job.checkpoints / f"step-{LAST:08d}")
    run = job.torchrun()
    assert run.end() == 0, run.log
    return job, run


@pytest.mark.parametrize("zero", [(1, 1, 2), (1, 2, 2)], ids=str)
def test_it_learns_near_bf16_and_resumes_to_the_bit(
    tiny: Make, tmp_path: Path, zero: tuple[int, int, int]
) -> None:
    whole = tiny(zero=zero, **described())
    run = whole.torchrun()
    assert run.end() == 0, run.log
    found = re.findall(r"fp8 beside bf16: loss ([+-][\d.]+)%, cosine of the gradients ([\d.]+)", run.log)
    assert len(found) == 3  # after steps 10, 20 and 30: the last one needs none
    assert all(abs(float(loss)) < 1 and float(cosine) > 0.95 for loss, cosine in found)
    learned = losses(run.log)
    assert learned[LAST] < learned[1] - 1
    exact = tiny(folder=tmp_path / "exact", zero=zero, **described())
    exact.training |= {"precision": "bf16"}
    reference = exact.torchrun()
    assert reference.end() == 0, reference.log
    assert learned[LAST] == pytest.approx(losses(reference.log)[LAST], rel=0.02)
    assert weights(exact.checkpoints, LAST) != weights(whole.checkpoints, LAST)
    job, again = resumed(tiny, whole, tmp_path / "again")
    assert "resuming from step 20" in again.log
    assert weights(job.checkpoints, LAST) == weights(whole.checkpoints, LAST)


def test_where_it_leaves_its_band_twice_training_goes_on_in_bf16_also_after_a_restart(
    tiny: Make, tmp_path: Path
) -> None:
    whole = tiny(**described(minGradientCosine=0.99999))
    run = whole.torchrun()
    assert run.end() == 0, run.log
    assert run.log.count("fp8 beside bf16") == 2
    assert "step 10: fp8 is far from bf16: the loss differs by" in run.log
    assert "step 20: fp8 is off from here on, training goes on in bf16: the loss differs by" in run.log
    job, again = resumed(tiny, whole, tmp_path / "again", minGradientCosine=0.99999)
    assert "fp8 beside bf16" not in again.log
    assert weights(job.checkpoints, LAST) == weights(whole.checkpoints, LAST)
