"""Checkpoints are evaluated beside training: by `internlm run`, and by a pod that leaves a termination message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from internlm_trainer.cli import app
from internlm_trainer.commands.evaluate import sparkline
from internlm_trainer.evaluation import history
from trainer.loop.jobs import TinyJob

TEXT = "import os\n\n\ndef main():\n    return os.name\n"


def short_job(tiny: Callable[..., TinyJob], **evaluation: Any) -> TinyJob:
    job = tiny(processes=1, zero=(1, 1, 1), evaluation=evaluation)
    job.training = {"steps": 30, "globalBatchTokens": 128}
    job.checkpoint = {"everySteps": 10, "keep": 10}
    return job


def evaluator(job: TinyJob, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """What the pod's process ends with: its exit code and its termination message."""
    message = job.folder / "message"
    own = {"INTERNLM_JOB_FILE": str(job.write()), "INTERNLM_CHECKPOINT": str(checkpoint)}
    command = [sys.executable, "-m", "internlm_trainer.evaluator"]
    environment = os.environ | own | {"INTERNLM_TERMINATION_LOG": str(message)}
    done = subprocess.run(command, env=environment, cwd=job.folder, capture_output=True, text=True)
    return done.returncode, dict(json.loads(message.read_text()))


def plot(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "plot", *map(str, arguments)])


def test_a_run_evaluates_its_checkpoints_and_the_history_plots(
    tiny: Callable[..., TinyJob], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    job = short_job(tiny, text=[str(tmp_path / "*.txt")])
    run = job.internlm_run()
    assert run.end() == 0, run.log
    found = history.courses(history.read(str(job.checkpoints)))["perplexity byte_perplexity"]
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30, "the last checkpoint always is"
    assert f"step 30: perplexity byte_perplexity {found[-1][1]:.4f}" in run.log

    command = ["eval", str(job.checkpoints), "--text", str(tmp_path / "text.txt"), "--json"]
    (again,) = json.loads(CliRunner().invoke(app, command).stdout)["results"]
    assert again["metrics"]["byte_perplexity"] == pytest.approx(found[-1][1])

    code, message = evaluator(job, job.checkpoints / "step-00000010")
    assert (code, message["reason"]) == (0, "Completed")
    values = {metric: value for task, metric, value in message["results"] if task == "perplexity"}
    assert values.keys() == {"token_perplexity", "byte_perplexity", "bits_per_byte"}
    course = dict(history.courses(history.read(str(job.checkpoints)))["perplexity byte_perplexity"])
    assert course[10] == pytest.approx(values["byte_perplexity"], abs=1e-5)

    shown = plot(job.checkpoints)
    assert "byte_perplexity" in shown.output
    assert f"{course[30]:.4f}" in shown.output
    assert json.loads(plot(job.checkpoints, "--json").output)[-1]["task"] == "perplexity"
    assert plot(job.checkpoints, "--out", tmp_path / "course.png").exit_code == 0
    assert (tmp_path / "course.png").read_bytes()[:4] == b"\x89PNG"


def test_an_evaluation_that_fails_leaves_a_sentence_and_the_training_alone(
    tiny: Callable[..., TinyJob], tmp_path: Path
) -> None:
    job = short_job(tiny, tasks=["mmlu"], data=str(tmp_path / "sets"))
    run = job.internlm_run()
    assert run.end() == 0, run.log
    assert "the evaluation failed: " in run.log
    assert history.read(str(job.checkpoints)) == []


def test_without_a_history_plot_says_where_it_comes_from(tmp_path: Path) -> None:
    shown = plot(tmp_path)
    assert shown.exit_code == 65
    assert "a job with spec.evaluation writes it" in shown.output


def test_a_second_try_replaces_the_first_ones_entries(tmp_path: Path) -> None:
    from internlm_trainer.evaluation.run import Result as Found

    for value in (1.0, 2.0):
        history.add(str(tmp_path), 10, [Found("mmlu", 5, 8, {"acc": value, "acc_stderr": 0.1}, {})])
    history.add(str(tmp_path), 20, [Found("mmlu", 5, 8, {"acc": 3.0}, {})])
    assert history.courses(history.read(str(tmp_path))) == {"mmlu acc": [(10, 2.0), (20, 3.0)]}
    assert history.evaluated_step(history.read(str(tmp_path))) == 20


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline([1, 8, 4]) == "▁█▄"
    assert sparkline([3, 3]) == "▁▁"
