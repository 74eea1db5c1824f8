"""`internlm eval` finds what lm-evaluation-harness does, to the likelihood of each answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from internlm_trainer.cli import app
from trainer.evaluation.sets import SHOTS

HARNESS = Path(__file__).parent / "harness.py"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    """What the harness finds on the exported model, by task."""
    out, found = folder / "model", folder / "theirs.json"
    export = CliRunner().invoke(app, ["export", str(folder / "checkpoints"), str(out), "--dtype", "fp32"])
    assert export.exit_code == 0, export.output
    offline = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HARNESS), str(out), str(folder / "data"), str(found)]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(found.read_text()))


def internlm_eval(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("task", SHOTS)
def test_choices_are_as_likely(theirs: dict[str, Any], folder: Path, tmp_path: Path, task: str) -> None:
    samples = tmp_path / "samples.jsonl"
    # Weights in Hugging Face's format are evaluated like checkpoints.
    source = folder / ("model" if task == "mmlu" else "checkpoints")
    options = ("--data", folder / "data", "--shots", SHOTS[task], "--samples", samples)
    found = internlm_eval(source, "--tasks", task, *options)["results"][0]
    expected = theirs[task]
    for ours, responses in zip(samples.read_text().splitlines(), expected["responses"], strict=True):
        logprobs = [float(response[0][0]) for response in responses]
        assert json.loads(ours)["logprobs"] == pytest.approx(logprobs, rel=1e-5, abs=1e-5)
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in expected["metrics"]:
            assert found["metrics"][metric] == pytest.approx(expected["metrics"][f"{metric},none"])
    assert found["metrics"]["acc_stderr"] == pytest.approx(float(expected["metrics"]["acc_stderr,none"]))


def test_texts_are_as_likely(theirs: dict[str, Any], folder: Path) -> None:
    found = internlm_eval(folder / "checkpoints", "--text", folder / "data" / "text.jsonl")["results"][0]
    for metric in ("byte_perplexity", "bits_per_byte"):
        expected = float(theirs["text"]["metrics"][f"{metric},none"])
        assert found["metrics"][metric] == pytest.approx(expected, rel=1e-5)


def test_written_answers_are_the_same(theirs: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    options = ("--data", folder / "data", "--shots", 1, "--max-tokens", 24, "--rows", 4, "--samples", samples)
    found = internlm_eval(folder / "checkpoints", "--tasks", "gsm8k", *options)["results"][0]
    for ours, responses in zip(samples.read_text().splitlines(), theirs["gsm8k"]["responses"], strict=True):
        # Where bytes make no character, each library has its own number of signs for that; SentencePiece has one for
        # the unknown word, too.
        pattern = ".+".join(map(re.escape, re.split("\ufffd+", responses[0][0])))
        assert re.fullmatch(pattern, json.loads(ours)["answer"].replace(" \u2047 ", ""), re.DOTALL)
    expected = theirs["gsm8k"]["metrics"]
    assert found["metrics"]["exact_match"] == expected["exact_match,strict-match"]
    assert found["metrics"]["exact_match_flexible"] == expected["exact_match,flexible-extract"]
