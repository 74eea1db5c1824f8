"""The `internlm` command, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_trainer.launch import exit_code
from trainer.loop.jobs import TinyJob

Make = Callable[..., TinyJob]


def internlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command; what it printed, and its code."""
    command = [sys.executable, "-m", "internlm_trainer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_validate_sums_a_good_job_up(tiny: Make) -> None:
    file = tiny().write()
    done = internlm("validate", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{file}: tiny is valid: 120 steps of 512 tokens on 2 CPU processes, zero (1, 1, 2)\n"
    )


def test_validate_gives_every_mistake_of_every_file_with_its_path_and_what_to_do(
    tiny: Make, tmp_path: Path
) -> None:
    first = tiny(zero=(2, 1, 2), training={"steps": 0}).write()
    second = tiny(folder=tmp_path / "second", zero=(1, 1, 3)).write()
    good = tiny(folder=tmp_path / "good").write()
    done = internlm("validate", str(first), str(second), str(good))
    assert done.returncode == 65
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"{first}: spec.training.steps: ")
    assert any(
        line.startswith(f"{second}: spec.parallel.zero.optimizer: must divide the number of data-parallel")
        for line in lines
    )
    assert f"{good}: tiny is valid" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot be read"), ("a: [", "is not YAML"), ("kind: Pod", "holds no InternLMJob")],
)
def test_validate_says_what_is_wrong_with_a_file(content: str | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_text(content)
    done = internlm("validate", str(file))
    assert done.returncode == 65
    assert done.stderr.startswith(f"error: {file}: {sentence}")
    assert len(done.stderr.splitlines()) == 1


def test_run_names_the_switch_that_brings_a_job_for_two_nodes_down_to_one(tiny: Make) -> None:
    job = tiny()
    manifest = job.write()
    text = manifest.read_text().replace("processesPerNode: 2", "processesPerNode: 1\n  nodes: 2")
    manifest.write_text(text)
    done = internlm("run", str(manifest))
    assert done.returncode == 65
    assert done.stderr.startswith("error: spec.nodes: asks for 2 nodes")
    assert "--nodes 1" in done.stderr


def test_run_says_how_to_do_without_gpus_that_are_not_there(tiny: Make) -> None:
    manifest = tiny(training={"globalBatchTokens": 4096}).write()
    manifest.write_text(manifest.read_text().replace("processesPerNode: 2", "gpusPerNode: 64"))
    done = internlm("run", str(manifest), "--processes", "32")
    assert done.returncode == 65
    assert done.stderr.startswith("error: spec.gpusPerNode: asks for 32 GPUs, and this machine has ")
    assert "--processes" in done.stderr or "set spec.gpusPerNode to 0" in done.stderr


def test_env_says_which_attention_will_be_used_and_why() -> None:
    done = internlm("env")
    assert done.returncode == 0, done.stderr
    for line in ("CPU", "PyTorch", "attention, bf16", "attention, fp32", "s3fs"):
        assert line in done.stdout


def test_help_lists_the_commands() -> None:
    done = internlm("--help")
    assert done.returncode == 0
    for command in ("validate", "run", "env", "tokenize"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("code", "reason", "asked", "ends_with"),
    [
        (0, "Completed", False, 0),
        (1, "Completed", True, 0),  # Ctrl-C came in the last step
        (1, "Stopped", True, 130),
        (1, None, True, 130),  # a second Ctrl-C
        (1, "Error", True, 1),  # the save that Ctrl-C asked for failed
        (1, "UserError", False, 65),
        (1, "UserError", True, 65),
        (1, "DataError", False, 65),
        (1, "StorageUnreachable", True, 1),
        (1, "Error", False, 1),
        (1, None, False, 1),
        (1, "Stopped", False, 1),  # somebody else stopped the processes
    ],
)
def test_run_ends_with_a_code_that_says_why(
    code: int, reason: str | None, asked: bool, ends_with: int
) -> None:
    assert exit_code(code, reason, asked=asked) == ends_with
