"""Answers that are written: where they end, what they are worth, and that no program runs unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from internlm_operator.api import API_VERSION, KIND
from internlm_operator.manifest import JobError, parse_job
from internlm_trainer import sandbox
from internlm_trainer.cli import app
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.evaluation.tasks import TASKS, Question, Writing
from internlm_trainer.evaluation.writing import grade, write
from internlm_trainer.generate import Decoder
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights
from trainer.evaluation.sets import write_jsonl
from trainer.isolated import can_isolate

DOCS = Path(__file__).parents[3] / "docs"
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def double(x):\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "double",
}


def writing(name: str) -> Writing:
    task = TASKS[name]
    assert isinstance(task, Writing)
    return task


def test_an_answer_ends_before_the_first_stop_text(folder: Path) -> None:
    words = Tokenizer((folder / "tokenizer.model").read_bytes())
    weights = open_weights(str(folder / "checkpoints"), "SOURCE")
    model = load_model(weights, torch.device("cpu"), torch.float32)
    prompts = ["def f(", "import", "while True:", "x = "]
    done: list[int] = []
    whole = write(Decoder(model, 160, 3), words, prompts, (), 30, done.append)
    assert sum(done) == len(prompts)
    assert [write(Decoder(model, 160), words, [one], (), 30)[0] for one in prompts] == whole
    stops = [text[5:7] for text in whole]
    cut = write(Decoder(model, 160, 2), words, prompts, stops, 30)
    expected = [min((text.split(stop)[0] for stop in stops), key=len) for text in whole]
    assert cut == expected


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so\n#### 1,234", 1.0, 1.0),
        ("#### 1234.\nmore 7", 1.0, 0.0),
        ("The answer is $1,234.", 0.0, 1.0),
        ("#### 12", 0.0, 0.0),
        ("none", 0.0, 0.0),
    ],
)
def test_the_number_of_an_answer(text: str, strict: float, flexible: float) -> None:
    question = Question("", "steps\n#### 1,234")
    assert grade(writing("gsm8k"), question, text) == {
        "exact_match": strict,
        "exact_match_flexible": flexible,
    }


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("    return x + x\n", 1.0),
        ("    return x\n", 0.0),
        ("    import sys; sys.exit(0)\n", 0.0),
        ("    while True: pass\n", 0.0),
    ],
)
def test_a_program_is_right_if_it_passes_its_tests_to_the_end(text: str, passes: float) -> None:
    import dataclasses

    task = dataclasses.replace(writing("humaneval"), seconds=2)
    assert grade(task, task.ask(PROBLEM), text, can_isolate()) == {"pass@1": passes}


def test_programs_run_only_where_that_is_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "humaneval/HumanEval.jsonl", [PROBLEM])
    command = ["eval", str(folder / "checkpoints"), "--tasks", "humaneval", "--data", str(tmp_path)]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 65
    assert "give --run-code" in refused.output
    monkeypatch.setenv("PATH", str(tmp_path))  # without unshare(1)
    sandbox.isolation.cache_clear()
    refused = CliRunner().invoke(app, [*command, "--run-code"])
    sandbox.isolation.cache_clear()
    assert refused.exit_code == 65
    assert "give --no-isolation" in refused.output
    done = CliRunner().invoke(app, [*command, "--run-code", "--no-isolation", "--max-tokens", "8", "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["results"]
    assert (found["questions"], found["metrics"]["pass@1"]) == (1, 0.0)


def test_a_job_that_asks_for_programs_is_refused_as_documented() -> None:
    spec = {
        "nodes": 1,
        "model": {"layers": 2, "hiddenSize": 64, "heads": 4, "vocabSize": 512, "seqLen": 128},
        "data": {"tokenizer": "tokenizer.model", "train": [{"path": "train"}]},
        "training": {"steps": 1},
        "checkpoint": {"path": "checkpoints"},
        "evaluation": {"tasks": ["humaneval"], "data": "sets"},
    }
    with pytest.raises(JobError) as refused:
        parse_job({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "job"}, "spec": spec})
    assert str(refused.value) in (DOCS / "evaluate.md").read_text().splitlines()
