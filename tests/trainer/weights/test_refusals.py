"""Whatever is wrong with weights, or with the place for them, is told in a sentence, and nothing of it is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.cli import app
from internlm_trainer.data.tokenizer import train_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.weights.export import export_internlm, export_llama
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import CheckpointWeights
from internlm_trainer.weights.zoo import RELEASES
from trainer.weights.models import SHAPES, assert_equal, content, random_weights, save

SHAPE = SHAPES["InternLM-7B"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as `checkpoints`, `hf` (two files) and `internlm` (two ranks), and a `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer([Path(json.__file__).read_text()], 512))
    url = save(str(folder / "checkpoints"), SHAPE, random_weights(SHAPE), tokenizer=str(tokenizer), seqLen=64)
    weights = CheckpointWeights(open_one(url))
    export_llama(weights, str(folder / "hf"), "bf16", None, 64, largest_file=300_000)
    export_internlm(weights, str(folder / "internlm"), "bf16", 2, 1)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """Of `made`, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def of_pt(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        file = folder / "internlm" / "model_tp0_pp0.pt"
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return work


def of_safetensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        file = sorted((folder / "hf").glob("*.safetensors"))[0]
        state = load_file(file)
        change(state)
        save_file(state, file)

    return work


def of_json(name: str, **changes: object) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        file = folder / "hf" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return work


def of_model_config(**changes: object) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        file = folder / "internlm" / "model_config.pt"
        torch.save(torch.load(file, weights_only=True) | changes, file)

    return work


def cut(name: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        file = min(folder.glob(name))
        os.truncate(file, file.stat().st_size * 2 // 3)

    return work


def make_internlm2(folder: Path, **changes: object) -> None:
    shape = SHAPES["InternLM2"]
    url = save(str(folder / "checkpoints"), shape, random_weights(shape))
    export_internlm(CheckpointWeights(open_one(url)), str(folder), "bf16", 1, 1)
    file = folder / "model_config.pt"
    torch.save(torch.load(file, weights_only=True) | changes, file)


def old_pickle(folder: Path) -> None:
    file = folder / "internlm" / "model_tp0_pp0.pt"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


REFUSALS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no rank": (
        "internlm",
        lambda f: (f / "internlm/model_tp0_pp0.pt").unlink(),
        "model_tp0_pp0.pt is missing",
    ),
    "no last rank": ("internlm", lambda f: (f / "internlm/model_tp1_pp0.pt").unlink(), "where the model has"),
    "no file": (
        "hf",
        lambda f: sorted((f / "hf").glob("*.safetensors"))[0].unlink(),
        "safetensors is missing; copy the folder again, whole",
    ),
    "no weights": (
        "hf",
        lambda f: (f / "hf/model.safetensors.index.json").unlink(),
        "has config.json but no weights",
    ),
    "cut off .pt": ("internlm", cut("internlm/model_tp1_pp0.pt"), "model_tp1_pp0.pt is cut off or damaged"),
    "cut off safetensors": ("hf", cut("hf/*.safetensors"), "is cut off: it has"),
    "cut off index": ("hf", cut("hf/model.safetensors.index.json"), "is cut off or no JSON"),
    "no tensor": (
        "internlm",
        of_pt(lambda s: s.pop("model.blocks.1.mlp.w1.weight")),
        "lacks model.blocks.1.mlp.w1.weight",
    ),
    "no tensor in safetensors": (
        "hf",
        of_safetensors(lambda s: s.pop("model.embed_tokens.weight")),
        "lacks model.embed_tokens.weight",
    ),
    "another shape": (
        "internlm",
        of_pt(lambda s: s.update({"model.blocks.1.norm1.weight": torch.ones(65)})),
        "holds model.blocks.1.norm1.weight of shape [65], where the model has [64]",
    ),
    "int8": (
        "internlm",
        of_pt(lambda s: s.update({"model.blocks.1.norm1.weight": torch.ones(64, dtype=torch.int8)})),
        "as int8, which fp32 weights cannot hold as it is",
    ),
    "float8 in safetensors": (
        "hf",
        of_safetensors(
            lambda s: s.update({"model.embed_tokens.weight": torch.ones(512, 64).to(torch.float8_e4m3fn)})
        ),
        "as F8_E4M3, which fp32 weights cannot hold",
    ),
    "more than the model": (
        "hf",
        of_safetensors(lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "holds model.layers.0.self_attn.q_norm.weight, which no InternLM model of this shape has",
    ),
    "no tensors": ("internlm", of_pt(lambda s: s.update({"step": 7})), "holds step, which is no tensor"),
    "an old pickle": ("internlm", old_pickle, "nothing that torch.save of PyTorch 1.6 or later wrote"),
    "another family": ("hf", of_json("config.json", model_type="gpt2"), "is of a 'gpt2' model"),
    "another rotary embedding": (
        "hf",
        of_json("config.json", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "scales the rotary embedding by 'llama3'",
    ),
    "a field of the configuration": (
        "hf",
        of_json("config.json", hidden_size=None),
        "is no model's configuration",
    ),
    "heads that do not divide": (
        "hf",
        of_json("config.json", num_attention_heads=7),
        "which do not divide each other",
    ),
    "no heads": ("hf", of_json("config.json", num_key_value_heads=-1), "has a size below 1"),
    "no number": ("internlm", of_model_config(num_attention_heads=None), "is no model's configuration"),
    "no heads in InternLM's": ("internlm", of_model_config(num_attention_heads=0), "has a size below 1"),
    "another order of the numbers": (
        "internlm2",
        lambda f: make_internlm2(f / "internlm2", adapt_hf=False),
        "says adapt_hf=False: the heads' numbers are in another order",
    ),
    "a head that is normalised": (
        "internlm",
        of_model_config(norm_head=True),
        "says norm_head=True, which models here have not",
    ),
    "a step that is not there": (
        "checkpoints/step-7",
        lambda _: None,
        "checkpoint step-00000007 cannot be used",
    ),
    "an empty folder": (
        "nothing",
        lambda f: (f / "nothing").mkdir(),
        "holds no weights: a folder has config.json",
    ),
}


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize(("source", "spoil", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_weights_that_cannot_be_read_are_refused(
    copy: Path, source: str, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(copy)
    shown = export(copy / source, copy / "out", "--tokenizer", "none", "--context", 64)
    assert shown.exit_code == 65, shown.output
    assert sentence in shown.output
    assert shown.output.startswith("error: ")
    assert not (copy / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "file", ["internlm/model_tp0_pp0.pt", "internlm/model_config.pt", "bin/pytorch_model.bin"]
)
def test_a_pickle_that_runs_code_is_refused_and_not_run(copy: Path, file: str) -> None:
    (copy / "bin").mkdir()
    shutil.copy(copy / "hf/config.json", copy / "bin")
    ran = copy / "ran"
    torch.save({"model.norm.weight": Malicious(f"touch {ran}")}, copy / file)
    shown = export(copy / file.split("/")[0], copy / "out", "--tokenizer", "none", "--context", 64)
    assert shown.exit_code == 65
    assert (
        f"{file} holds more than tensors and plain values (it names posix.system), which could"
        in shown.output
    )
    assert not ran.exists()


def test_the_dictionary_class_of_internlms_own_configuration_is_allowed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model_config.pt` as InternLM writes it: an instance of a class of its own, derived from dict."""
    name = "internlm.core.context.parallel_context"
    module = ModuleType(name)
    config = type("Config", (dict,), {"__module__": name, "__qualname__": "Config"})
    module.Config = config  # type: ignore[attr-defined]
    for parent in ("internlm", "internlm.core", "internlm.core.context"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    file = copy / "internlm" / "model_config.pt"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        torch.save(config(torch.load(file, weights_only=True)), file)
    assert_equal(content(open_weights(str(copy / "internlm"), "SOURCE")), random_weights(SHAPE))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--format", "internlm", "--tp", 3), "--tp 3: 8 key and value heads cannot be shared equally by 3"),
        (("--format", "internlm", "--pp", 5), "--pp 5: the model has 4 blocks"),
        (("--tp", 2), "--tp, --pp and --optimizer are for --format internlm"),
        (("--tokenizer", "missing.model"), "--tokenizer: missing.model does not exist"),
    ],
)
def test_what_cannot_be_written_is_refused(
    made: Path, tmp_path: Path, options: tuple[Any, ...], sentence: str
) -> None:
    shown = export(made / "checkpoints", tmp_path / "out", *options)
    assert shown.exit_code == 65, shown.output
    assert sentence in shown.output
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_size_is_refused(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([Path(json.__file__).read_text()], 500))
    shown = export(made / "checkpoints", tmp_path / "out", "--tokenizer", other)
    assert shown.exit_code == 65
    assert "has 500 words but the model's vocabulary (spec.model.vocabSize) has 512" in shown.output


def test_numbers_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    large = random_weights(SHAPE)
    large["norm.weight"][3] = 1e5
    source = save(str(tmp_path / "checkpoints"), SHAPE, large)
    shown = export(source, tmp_path / "out", "--dtype", "fp16", "--tokenizer", "none", "--context", 64)
    assert shown.exit_code == 65
    assert "--dtype fp16: model.norm.weight has numbers above 65504" in shown.output
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_export_needs_no_options_and_overwrites_none(made: Path, tmp_path: Path) -> None:
    first = export(made / "checkpoints", tmp_path / "out", "--json")
    assert first.exit_code == 0, first.output
    told = json.loads(first.output)
    assert sorted(told["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 64
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (made / "tokenizer.model").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = export(made / "checkpoints", tmp_path / "out")
    assert again.exit_code == 65
    assert "holds weights already (config.json); give an empty folder" in again.output
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("format", ["hf", "internlm"])
def test_a_killed_export_looks_like_none_and_can_be_made_again(
    made: Path, tmp_path: Path, format: str
) -> None:
    total = sum(values.numel() * 4 for values in random_weights(SHAPE).values())
    command = [
        sys.executable,
        Path(__file__).with_name("killed.py"),
        made / "checkpoints",
        tmp_path / "out",
        format,
    ]
    assert subprocess.run([*command, str(total * 3 // 4)]).returncode == -9
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert any(name.endswith((".safetensors", ".pt")) for name in left)
    for shape in (None, SHAPE):
        with pytest.raises(UserError, match=r"holds no weights|has no model_config\.pt|where the model has"):
            open_weights(str(tmp_path / "out"), "SOURCE", shape)
    if format == "hf":
        other = export(made / "checkpoints", tmp_path / "out", "--tokenizer", "none")
        assert other.exit_code == 65
        assert "holds other weights (model-00001-of-" in other.output
    weights = open_weights(str(made / "checkpoints"), "SOURCE")
    if format == "hf":
        export_llama(weights, str(tmp_path / "out"), "fp32", None, 64, largest_file=100_000)
    else:
        export_internlm(weights, str(tmp_path / "out"), "fp32", 2, 1)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert_equal(content(open_weights(str(tmp_path / "out"), "SOURCE")), random_weights(SHAPE))


def test_models_lists_every_release() -> None:
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "40"})
    assert shown.exit_code == 0
    for release in RELEASES:
        [line] = [line for line in shown.output.splitlines() if line.split("  ")[0].strip() == release.name]
        assert f"hf://internlm/{release.repository}" in line.split()
        assert "hf, internlm " in line if release.original else "internlm  " not in line
        assert release.original is None or f"OpenLMLab/{release.original}" in line.split()
        assert f"{release.context:,}" in line.split()
    assert "7.32 B" in shown.output  # as released: 7.3 B, 20 B, 1.8 B, 7.7 B, 19.9 B and 8.8 B
    assert "19.86 B" in shown.output
