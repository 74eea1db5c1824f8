"""`internlm checkpoint`: what it shows of checkpoints, and what it makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from internlm_trainer.checkpoint import Piece, Snapshot
from internlm_trainer.cli import app
from trainer.checkpoint.states import open_store, save, write
from trainer.weights import models


def internlm(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 100 and 200, one of which was never finished in between, and the claim of the job."""
    store = open_store(str(tmp_path / "run"))
    store.claim("", 1)
    save(store, 100)
    save(store, 200, world=3)
    write(store, 250, world=1)
    store.release()
    return tmp_path / "run"


def test_ls_lists_what_is_there(folder: Path) -> None:
    shown = internlm("ls", folder)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "100", "200", "250"]
    assert [line.split()[-1] for line in lines] == ["state", "complete", "complete", "unfinished"]
    content = json.loads(internlm("ls", folder, "--json").output)
    assert [row["shards"] for row in content["checkpoints"]] == [2, 3, None]
    assert content["owner"]["released"]


def test_a_folder_without_checkpoints_is_a_sentence(tmp_path: Path) -> None:
    for command in ("ls", "verify", "diff x"):
        shown = internlm(*command.split(), tmp_path / "nothing")
        assert shown.exit_code == 65, shown.output
        assert (
            f"error: {tmp_path}/nothing holds no checkpoint" in shown.output or "x holds no" in shown.output
        )


def test_verify_reads_every_byte_and_says_what_is_wrong(folder: Path) -> None:
    assert internlm("verify", f"{folder}/step-200").exit_code == 0
    shard = folder / "step-00000100" / "shard-00001.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    shown = internlm("verify", folder)
    assert shown.exit_code == 1
    assert "step 100: shard-00001.bin is damaged between bytes 0 and" in shown.output
    assert "step 200: whole" in shown.output
    assert json.loads(internlm("verify", f"{folder}/step-200", "--json").output) == {
        "checkpoints": [{"step": 200, "problem": ""}]
    }
    shard.write_bytes(data[:50])
    # Where a line ends is up to the terminal's width.
    assert "shard-00001.bin has 50 bytes" in " ".join(internlm("ls", folder).output.split())


def test_diff_is_silent_about_layouts_and_tells_values_apart(tmp_path: Path) -> None:
    a, b = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    save(a, 100, world=1)
    save(b, 100, world=3)
    same = internlm("diff", tmp_path / "a", tmp_path / "b")
    assert (same.exit_code, same.output) == (0, "no difference\n")
    values = torch.arange(6.0)
    for store, change in ((a, 0.0), (b, 0.5)):
        changed = values.clone()
        changed[2] += change
        pieces = [Piece("master", "w", 0, 6, changed)]
        store.commit(200, [store.write_shard(200, 0, Snapshot().take(pieces))], {}, {"w": (2, 3)})
    shown = internlm("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert shown.exit_code == 1
    [found] = json.loads(shown.output)["differences"]
    assert (found["parameter"], found["differ"], found["elements"]) == ("w", 1, 6)
    assert found["largest"] == 0.5
    assert found["relative"] == pytest.approx(0.5 / 55**0.5)
    assert "1 of 6" in internlm("diff", tmp_path / "a", tmp_path / "b").output
    other = internlm("diff", f"{tmp_path}/a/step-100", tmp_path / "b", "--kind", "master")
    assert "only in the first" in other.output
    assert "exp_avg" not in other.output


def test_export_is_the_command_of_that_name(tmp_path: Path) -> None:
    shape = models.SHAPES["InternLM-7B"]
    url = models.save(str(tmp_path / "run"), shape, models.random_weights(shape))
    done = internlm("export", url, tmp_path / "a", "--format", "internlm")
    assert done.exit_code == 0, done.output
    same = CliRunner().invoke(app, ["export", url, str(tmp_path / "b"), "--format", "internlm"])
    assert done.output.replace("/a", "/b") == same.output
    assert models.in_folder(tmp_path / "a") == models.in_folder(tmp_path / "b") != set()
