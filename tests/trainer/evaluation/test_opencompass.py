"""OpenCompass gets a configuration like its own ones of InternLM, for a base model and for one that chats."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from internlm_trainer.cli import app


def value(node: ast.expr) -> Any:
    """What an expression of literals, names and dict(...) is."""
    match node:
        case ast.Call(func=ast.Name("dict"), args=[], keywords=keywords):
            return {str(one.arg): value(one.value) for one in keywords}
        case ast.List(elements):
            return [value(one) for one in elements]
        case ast.Name(name):
            return name
        case _:
            return ast.literal_eval(node)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("opencompass") / "it's mine"
    assert CliRunner().invoke(app, ["export", str(folder / "checkpoints"), str(out)]).exit_code == 0
    return out


# Names as in OpenCompass 0.5: its tokenizer, devices and stop words are those of the model's folder by default.
@pytest.mark.parametrize(
    ("options", "kind"),
    [((), "HuggingFaceBaseModel"), (("--chat",), "HuggingFacewithChatTemplate")],
    ids=["base", "chat"],
)
def test_the_configuration_is_of_the_exported_model(
    exported: Path, options: tuple[str, ...], kind: str
) -> None:
    shown = CliRunner().invoke(app, ["eval", "opencompass", str(exported), "--gpus", "2", *options])
    assert shown.exit_code == 0, shown.output
    imported, assigned = ast.parse(shown.output).body
    assert ast.unparse(imported) == f"from opencompass.models import {kind}"
    assert isinstance(assigned, ast.Assign)
    assert ast.unparse(assigned.targets[0]) == "models"
    assert value(assigned.value) == [
        {
            "type": kind,
            "abbr": "it's mine",
            "path": str(exported),
            "model_kwargs": {"torch_dtype": "torch.bfloat16"},
            "tokenizer_kwargs": {"model_input_names": ["input_ids", "attention_mask"]},
            "max_seq_len": 160,
            "max_out_len": 80,
            "batch_size": 8,
            "run_cfg": {"num_gpus": 2},
        }
    ]


def test_a_model_without_chat_template_is_no_chat_model(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    command = ["eval", "opencompass", str(tmp_path), "--chat"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 65
    assert "has no chat template" in refused.output.replace("\n", " ")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert CliRunner().invoke(app, command).exit_code == 0


def test_another_folder_is_refused(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["eval", "opencompass", str(tmp_path)])
    assert shown.exit_code == 65
    assert "is no folder of an exported model" in shown.output
