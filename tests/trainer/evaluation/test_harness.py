"""`internlm eval` asks what lm-evaluation-harness does, and finds the same, to the likelihood of each answer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from internlm_trainer.cli import app
from internlm_trainer.evaluation.tasks import TASKS, Question, Writing
from internlm_trainer.evaluation.writing import grade
from trainer.evaluation.sets import SHOTS, WITH_SHOTS
from trainer.isolated import can_isolate

HARNESS = Path(__file__).parent / "harness.py"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    """What the harness finds on the exported model, by task, or by task and subject."""
    out, found = folder / "model", folder / "theirs.json"
    export = CliRunner().invoke(app, ["export", str(folder / "checkpoints"), str(out), "--dtype", "fp32"])
    assert export.exit_code == 0, export.output
    offline = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HARNESS), str(out), str(folder / "data"), str(found)]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(found.read_text()))


@pytest.fixture(scope="module")
def ours(theirs: dict[str, Any], folder: Path) -> dict[str, Any]:  # noqa: ARG001 - it exports the model
    """What `internlm eval` finds, under the same names."""
    # Weights in Hugging Face's format are evaluated like checkpoints.
    found = internlm_eval(folder / "model", WITH_SHOTS, folder, "--shots", SHOTS)
    options = ["--max-tokens", 24, "--rows", 4, "--run-code", *([] if can_isolate() else ["--no-isolation"])]
    return found | internlm_eval(folder / "checkpoints", ("agieval", "gsm8k", "humaneval"), folder, *options)


def internlm_eval(
    source: Path, tasks: tuple[str, ...], folder: Path, *options: object
) -> dict[str, dict[str, Any]]:
    """The metrics of each task and its subjects, and what came of their questions."""
    samples = folder / "samples.jsonl"
    arguments = ("--tasks", ",".join(tasks), "--data", folder / "data", "--samples", samples, *options)
    done = CliRunner().invoke(app, ["eval", str(source), *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    lines = list(map(json.loads, samples.read_text().splitlines()))
    found = {}
    for result in json.loads(done.stdout)["results"]:
        task = result["task"]
        of_task = [line for line in lines if line["task"] == task]
        found[task] = {"metrics": result["metrics"], "samples": of_task}
        for subject, metrics in result["subjects"].items():
            of_subject = [line for line in of_task if line["subject"] == subject]
            found[f"{task} {subject}"] = {"metrics": metrics, "samples": of_subject}
    return found


@pytest.mark.parametrize("name", [*WITH_SHOTS, "agieval aqua-rat", "agieval jec-qa-kd", "gsm8k", "humaneval"])
def test_prompts_are_the_same(theirs: dict[str, Any], ours: dict[str, Any], name: str) -> None:
    assert [sample["prompt"] for sample in ours[name]["samples"]] == theirs[name]["prompts"]


@pytest.mark.parametrize("name", [*WITH_SHOTS, "agieval aqua-rat", "agieval jec-qa-kd"])
def test_choices_are_as_likely(theirs: dict[str, Any], ours: dict[str, Any], name: str) -> None:
    found, expected = ours[name], theirs[name]
    for sample, responses in zip(found["samples"], expected["responses"], strict=True):
        logprobs = [float(response[0][0]) for response in responses]
        assert sample["logprobs"] == pytest.approx(logprobs, rel=1e-5, abs=1e-5)
    metrics = {f"{metric},none": value for metric, value in found["metrics"].items()}
    shared = sorted(metrics.keys() & expected["metrics"].keys())
    assert "acc,none" in shared
    for metric in shared:
        assert metrics[metric] == pytest.approx(float(expected["metrics"][metric])), metric


def test_a_task_is_the_mean_of_all_questions_of_its_subjects(
    theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    subjects = [theirs["agieval aqua-rat"], theirs["agieval jec-qa-kd"]]
    right = sum(len(one["prompts"]) * one["metrics"]["acc,none"] for one in subjects)
    questions = sum(len(one["prompts"]) for one in subjects)
    assert ours["agieval"]["metrics"]["acc"] == pytest.approx(right / questions)


@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_written_answers_are_the_same(theirs: dict[str, Any], ours: dict[str, Any], name: str) -> None:
    for sample, responses in zip(ours[name]["samples"], theirs[name]["responses"], strict=True):
        # Where bytes make no character, each library has its own number of signs for that; the unknown word and the
        # end of a turn are left out there.
        pattern = ".+".join(map(re.escape, re.split("\ufffd+", responses[0][0])))
        assert re.fullmatch(pattern, re.sub(" \u2047 |<eoh>", "", sample["answer"]), re.DOTALL)


def test_answers_are_graded_as_there(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """The same text, since a number may be among bytes that make no character."""
    task, grades = TASKS["gsm8k"], []
    assert isinstance(task, Writing)
    for sample, responses in zip(ours["gsm8k"]["samples"], theirs["gsm8k"]["responses"], strict=True):
        grades.append(grade(task, Question("", sample["expected"]), responses[0][0]))
    for metric, name in (("exact_match", "strict-match"), ("exact_match_flexible", "flexible-extract")):
        expected = theirs["gsm8k"]["metrics"][f"exact_match,{name}"]
        assert sum(one[metric] for one in grades) / len(grades) == pytest.approx(expected)


def test_texts_are_as_likely(theirs: dict[str, Any], folder: Path) -> None:
    text = str(folder / "data" / "text.jsonl")
    done = CliRunner().invoke(app, ["eval", str(folder / "checkpoints"), "--text", text, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["results"][0]
    for metric in ("byte_perplexity", "bits_per_byte"):
        expected = float(theirs["text"]["metrics"][f"{metric},none"])
        assert found["metrics"][metric] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "files", "count"),
    [
        ("mmlu", "mmlu/default/mmlu_*.yaml", 57),
        ("ceval", "ceval/ceval-valid_*.yaml", 52),
        ("cmmlu", "cmmlu/cmmlu_*.yaml", 67),
    ],
)
def test_every_subject_is_introduced_in_the_same_words(task: str, files: str, count: int) -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    definitions = [
        yaml.safe_load(file.read_text()) for file in (Path(spec.origin).parent / "tasks").glob(files)
    ]
    expected = {one["dataset_name"]: one["description"] for one in definitions}
    assert len(expected) == count
    assert {subject: TASKS[task].intro(subject) for subject in expected} == expected
