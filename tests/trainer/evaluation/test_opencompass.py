"""OpenCompass gets a configuration with the arguments that its model takes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from internlm_trainer.cli import app

# Of opencompass.models.HuggingFaceCausalLM, and what its runner takes out before.
SIGNATURE = {
    "path": str,
    "hf_cache_dir": str,
    "max_seq_len": int,
    "tokenizer_path": str,
    "tokenizer_kwargs": dict,
    "peft_path": str,
    "tokenizer_only": bool,
    "model_kwargs": dict,
    "generation_kwargs": dict,
    "meta_template": dict,
    "extract_pred_after_decode": bool,
    "batch_padding": bool,
    "pad_token_id": int,
    "mode": str,
    "use_fastchat_template": bool,
    "end_str": str,
}
OF_THE_RUNNER = {"type": str, "abbr": str, "max_out_len": int, "batch_size": int, "run_cfg": dict}


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


def test_the_configuration_is_of_the_exported_model(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = tmp_path / "it's mine"
    assert run(app, ["export", str(folder / "checkpoints"), str(out)]).exit_code == 0
    shown = run(app, ["eval", "opencompass", str(out), "--gpus", "2"])
    assert shown.exit_code == 0, shown.output
    imported, assigned = ast.parse(shown.output).body
    assert ast.unparse(imported) == "from opencompass.models import HuggingFaceCausalLM"
    assert isinstance(assigned, ast.Assign)
    assert ast.unparse(assigned.targets[0]) == "models"
    (model,) = value(assigned.value)
    known = SIGNATURE | OF_THE_RUNNER
    assert {name: type(found) for name, found in model.items()} == {name: known[name] for name in model}
    assert model["type"] == "HuggingFaceCausalLM"
    assert (model["path"], model["max_seq_len"]) == (str(out), 160)
    assert model["model_kwargs"] == {"device_map": "auto", "torch_dtype": "torch.bfloat16"}
    assert model["run_cfg"]["num_gpus"] == 2


def test_another_folder_is_refused(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["eval", "opencompass", str(tmp_path)])
    assert shown.exit_code == 65
    assert "is no folder of an exported model" in shown.output
