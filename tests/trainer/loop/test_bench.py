"""`internlm bench` on real processes: what it finds, what it says of mistakes, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from internlm_trainer.errors import EXIT_USER_ERROR
from trainer.loop.jobs import TinyJob

Make = Callable[..., TinyJob]


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with temporary files below `folder`."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "internlm_trainer.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )


def test_a_job_is_measured_and_nothing_is_left(tiny: Make, tmp_path: Path) -> None:
    job = tiny(model={"vocabSize": 400}, training={"steps": 10, "completions": ["x"]})
    out, temporary = tmp_path / "out.json", tmp_path / "temporary"
    done = bench(temporary, str(job.write()), "--steps", "16", "--seconds", "200", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["processes"], found["tokens"], found["precision"]) == (2, 512, "fp32")
    assert found["steps"] == 16
    assert found["tgs"] * 2 * found["stepSeconds"] == pytest.approx(512, rel=0.01)
    assert found["split"].keys() == {"data", "fwd_bwd", "reduce", "optimizer", "other"}
    assert found["split"]["fwd_bwd"] > found["split"]["reduce"] >= 0
    assert found["bandwidth"].keys() == {"all_gather", "reduce_scatter", "all_reduce"}
    assert min(found["bandwidth"].values()) > 0
    assert f"{found['tgs']:,.0f} tokens per process per second" in done.stdout
    assert {path.name.partition("_")[0] for path in temporary.iterdir()} <= {"torchinductor"}  # its cache
    assert not job.checkpoints.exists()


def test_of_a_large_job_one_node_is_measured_in_steps_of_eight_micro_batches(
    tiny: Make, tmp_path: Path
) -> None:
    job, out = tiny(model={"vocabSize": 400}, training={"globalBatchTokens": 2**20}), tmp_path / "out.json"
    manifest = yaml.safe_load(job.write().read_text())
    manifest["spec"]["nodes"] = 4
    (file := tmp_path / "large.yaml").write_text(yaml.safe_dump(manifest))
    done = bench(tmp_path / "temporary", str(file), "--steps", "8", "--seconds", "200", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "measuring one node of the job's 4" in done.stderr
    assert json.loads(out.read_text())["tokens"] == 8 * 2 * 128


def test_a_job_without_a_model_is_a_sentence(tmp_path: Path) -> None:
    (file := tmp_path / "job.yaml").write_text(
        "{apiVersion: training.internlm.io/v1alpha1, kind: InternLMJob, metadata: {name: a}, spec: {}}"
    )
    done = bench(tmp_path, str(file))
    assert done.returncode == EXIT_USER_ERROR
    assert "spec.model: Required value" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "training.precision"], "training.precision: give a field of the job's spec and its value"),
        (
            ["--set", "training.precision.deep=1"],
            "spec.training.precision is no group of fields",
        ),
        (["--set", "training.precision=fp9"], 'spec.training.precision: Unsupported value: "fp9"'),
        (["--set", "model.hiddenSize=255"], "spec.model.hiddenSize: must be an even multiple of heads"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = bench(tmp_path, *arguments, "--steps", "8", "--seconds", "1")
    assert done.returncode == EXIT_USER_ERROR
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_that_fails_says_why(tiny: Make, tmp_path: Path) -> None:
    job = tiny(training={"precision": "fp32", "optimizer": {"lr": 0.01, "backend": "apex"}})
    done = bench(tmp_path, str(job.write()), "--steps", "8")
    assert done.returncode == 1
    assert "apex" in done.stderr
    assert "error: the job that was to be measured failed, see above" in done.stderr
