"""InternLM's optimizer files hold what its own optimizer would: the order of its modules, laid flat as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.errors import UserError
from internlm_trainer.weights.export import export_internlm
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import CheckpointWeights
from trainer.weights.models import SHAPES, in_folder, random_weights, save

BLOCK = (
    *("mixer.Wqkv.weight", "mixer.Wqkv.bias", "mixer.out_proj.weight", "mixer.out_proj.bias"),
    *("norm1.weight", "norm2.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight"),
)
RULE = {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weightDecay": 0.2}


def by_internlm(state: dict[str, Tensor]) -> tuple[Tensor, list[str]]:
    """A file's tensors as InternLM's HybridZeroOptimizer flattens its modules' parameters, and their ids."""
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".blocks." in name)
    names = ["embedding.weight", *(f"blocks.{i}.{one}" for i in range(layers) for one in BLOCK)]
    names += ["norm.weight", "head.weight"]
    parameters = [state[f"model.{name}"] for name in names if f"model.{name}" in state]
    assert len(parameters) == len(state)
    ordered = sorted(parameters, key=lambda one: one.numel(), reverse=True)
    ids = ["_".join(map(str, (i, *one.shape))) for i, one in enumerate(ordered)]
    return _flatten_dense_tensors(ordered), ids


@pytest.mark.parametrize("family", ["InternLM-7B", "InternLM-20B"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (2, 3)])
def test_states_are_laid_flat_as_internlm_does(
    tmp_path: Path, family: str, tensor: int, pipeline: int
) -> None:
    shape = SHAPES[family]
    kinds = {
        kind: random_weights(shape, seed) for seed, kind in enumerate(("master", "exp_avg", "exp_avg_sq"))
    }
    url = save(
        str(tmp_path / "checkpoints"),
        shape,
        kinds["master"],
        moments={"exp_avg": kinds["exp_avg"], "exp_avg_sq": narrow(kinds["exp_avg_sq"])},
        optimizer=RULE,
        guard={"counts": [7, 0, 50]},
    )
    export_internlm(
        CheckpointWeights(open_one(url)), str(tmp_path / "out"), "bf16", tensor, pipeline, optimizer=True
    )
    for kind, values in kinds.items():  # each as if it were weights, for what InternLM would have of it
        alone = CheckpointWeights(open_one(save(str(tmp_path / "alone" / kind), shape, values)))
        export_internlm(alone, str(tmp_path / kind), "fp32", tensor, pipeline)
    files = [f"tp{t}_pp{p}" for t in range(tensor) for p in range(pipeline)]
    optimizers = {f"optimizer_{one}_zo0.pt" for one in files}
    assert in_folder(tmp_path / "out") == {
        "model_config.pt",
        *(f"model_{one}.pt" for one in files),
        *optimizers,
    }
    for one in files:
        states: dict[str, Any] = torch.load(tmp_path / "out" / f"optimizer_{one}_zo0.pt", weights_only=True)
        expected = {
            kind: by_internlm(torch.load(tmp_path / kind / f"model_{one}.pt", weights_only=True))
            for kind in kinds
        }
        flat, ids = expected["master"]
        assert torch.equal(states["flat_fp32_weights"][0], flat)
        assert states["zero_devide_optim_plan"] == [[ids]]
        weight = nn.Parameter(states["flat_fp32_weights"][0])
        adamw = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.01}], lr=1e-4)
        adamw.load_state_dict(states["base_optim_states"])
        assert adamw.state[weight]["step"] == 93  # of 100 steps, 7 were skipped
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adamw.state[weight][kind], expected[kind][0])
        [group] = adamw.param_groups
        assert [group[name] for name in ("lr", "betas", "eps", "weight_decay")] == [
            3e-4,
            (0.8, 0.9),
            1e-7,
            0.2,
        ]
        weight.grad = torch.ones_like(weight)
        adamw.step()


def narrow(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.bfloat16() for name, values in states.items()}


def test_what_has_no_such_states_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shape = SHAPES["InternLM-7B"]
    weights = random_weights(shape)
    imported = save(str(tmp_path / "imported"), shape, weights)
    muon = save(str(tmp_path / "muon"), shape, weights, moments={"momentum": weights})
    export_internlm(CheckpointWeights(open_one(imported)), str(tmp_path / "files"), "bf16", 1, 1)
    grouped = SHAPES["InternLM2"]
    internlm2 = save(str(tmp_path / "grouped"), grouped, random_weights(grouped))
    for source, sentence in {
        imported: "holds no exp_avg of embedding.weight: it was imported, or trained by another optimizer",
        muon: "holds no exp_avg of embedding.weight",
        str(tmp_path / "files"): "is no checkpoint of a job: it has weights alone",
        internlm2: "models with grouped queries are written as InternLM2",
    }.items():
        with pytest.raises(UserError, match="--optimizer") as refused:
            export_internlm(
                open_weights(source, "SOURCE"), str(tmp_path / "out"), "bf16", 1, 1, optimizer=True
            )
        assert sentence in str(refused.value)
    assert not (tmp_path / "out").exists()
