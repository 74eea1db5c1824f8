"""Weights of any format become a checkpoint, to the bit, and are read like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.cli import app
from internlm_trainer.data.tokenizer import train_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.weights import source
from internlm_trainer.weights.export import export_internlm, export_llama
from internlm_trainer.weights.imported import import_weights
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import CheckpointWeights
from trainer.weights.models import SHAPES, assert_equal, content, random_weights, save


@pytest.mark.parametrize("family", SHAPES)
def test_a_checkpoint_of_imported_weights_has_every_bit(
    tmp_path: Path, url: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "BLOCK", 5000)
    shape = SHAPES[family]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "first"), shape, ours)))
    export_llama(weights, str(tmp_path / "hf"), "bf16", None, 128)
    export_internlm(weights, str(tmp_path / "internlm"), "bf16", 2, 2)
    for folder in ("hf", "internlm"):
        done: list[int] = []
        found = open_weights(str(tmp_path / folder), "SOURCE")
        to = import_weights(found, f"{url}/{folder}", None, 64, done.append, largest=200_000)
        again = open_weights(f"{url}/{folder}", "SOURCE")
        assert to == again.url
        assert (again.shape, again.context) == (shape, 64)
        assert_equal(content(again), ours)
        assert sum(done) == sum(values.nbytes for values in ours.values())
        manifest = open_one(to).manifest
        assert len(manifest.shards) > 1
        assert max(shard.bytes for shard in manifest.shards) < 300_000


def test_the_command_takes_the_tokenizer_along_and_does_not_write_twice(tmp_path: Path) -> None:
    words = tmp_path / "tokenizer.model"
    words.write_bytes(train_tokenizer([Path(json.__file__).read_text()], 512))
    shape = SHAPES["InternLM2"]
    first = save(str(tmp_path / "first"), shape, random_weights(shape), tokenizer=str(words), seqLen=96)
    run = CliRunner().invoke
    assert run(app, ["export", first, str(tmp_path / "hf")]).exit_code == 0
    command = ["import", str(tmp_path / "hf"), str(tmp_path / "out")]
    done = run(app, command)
    assert done.exit_code == 0, done.output
    found = open_weights(str(tmp_path / "out"), "SOURCE")
    assert (found.context, found.tokenizer) == (96, str(tmp_path / "out" / "tokenizer.model"))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == words.read_bytes()
    assert run(app, ["checkpoint", "verify", str(tmp_path / "out")]).exit_code == 0
    again = run(app, command)
    assert again.exit_code == 65
    assert "holds checkpoints already" in again.output


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    done = CliRunner().invoke(app, ["import", str(tmp_path), str(tmp_path / "out")])
    assert done.exit_code == 65
    assert "is of a 'gpt2' model" in done.output
    assert not (tmp_path / "out").exists()


def test_an_import_that_is_cut_off_leaves_no_checkpoint(tmp_path: Path) -> None:
    shape = SHAPES["InternLM-7B"]
    weights = CheckpointWeights(open_one(save(str(tmp_path / "first"), shape, random_weights(shape))))

    def cut(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_weights(weights, str(tmp_path / "out"), None, None, cut)
    with pytest.raises(UserError, match="holds no"):
        open_weights(str(tmp_path / "out"), "SOURCE")
    import_weights(weights, str(tmp_path / "out"), None, None)
    assert_equal(content(open_weights(str(tmp_path / "out"), "SOURCE")), random_weights(shape))
