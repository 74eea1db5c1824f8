"""A whole job against the same training with other people's code."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.loop.jobs import TinyJob, losses

REFERENCE = Path(__file__).parents[3] / "benchmarks/loss_curve/reference.py"


def test_a_job_has_the_losses_of_hugging_faces_llama_trained_by_plain_pytorch(
    tiny: Callable[..., TinyJob], tmp_path: Path
) -> None:
    job = tiny(zero=(2, 2, 2))
    job.data = {"packing": "contiguous"}  # the reference has no document masks
    job.training = {"steps": 60}
    run = job.torchrun()
    assert run.end() == 0, run.log
    out = tmp_path / "reference.csv"
    # One process has the job's global batch by accumulation.
    alone = tiny(folder=tmp_path / "alone", processes=1, zero=(1, 1, 1))
    alone.data, alone.training = job.data, job.training
    subprocess.run([sys.executable, REFERENCE, alone.write(), out], check=True)
    with out.open() as file:
        reference = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    ours = losses(run.log)
    assert sorted(ours) == sorted(reference) == list(range(1, 61))
    assert ours[60] < ours[1] - 1
    # The log rounds to four places.
    assert [ours[step] for step in reference] == pytest.approx(list(reference.values()), abs=1.1e-4)
