"""InternLM's optimizer files, as its HybridZeroOptimizer saves them for `zero1 = 1`, one beside each file of weights.

It lays all tensors of a rank flat in one fp32 buffer, the largest first, and gives that to PyTorch's AdamW
(https://github.com/InternLM/InternLM, internlm/solver/optimizer/hybrid_zero_optim.py, of 2023 to January 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.errors import UserError
from internlm_trainer.optim.adamw import KINDS
from internlm_trainer.weights.archive import Part
from internlm_trainer.weights.layout import Stored, flattened, is_internlm2, parameters
from internlm_trainer.weights.source import MASTER, CheckpointWeights, Weights

RULE = ("lr", "betas", "eps", "weightDecay")
LOSS_SCALE = 65536.0
"""That InternLM begins with: one that fits its next run comes by itself."""


def optimizer_file(model_file: str) -> str:
    """`optimizer_tp0_pp0_zo0.pt` for `model_tp0_pp0.pt`."""
    return model_file.replace("model_", "optimizer_").replace(".pt", "_zo0.pt")


def checkpoint_of(weights: Weights) -> CheckpointWeights:
    """The weights, if an optimizer's states that the format has room for lie beside them.  Raises UserError."""
    if not isinstance(weights, CheckpointWeights):
        raise UserError(f"--optimizer: {weights.url} is no checkpoint of a job: it has weights alone")
    if is_internlm2(weights.shape):
        raise UserError(
            "--optimizer: models with grouped queries are written as InternLM2, for which InternLM's own code has no "
            "optimizer files; leave it out"
        )
    for kind in KINDS:
        held = weights.checkpoint.index
        lacking = next((name for name in parameters(weights.shape) if not held.dtype(kind, name)), None)
        if lacking:
            raise UserError(
                f"--optimizer: {weights.url} holds no {kind} of {lacking}: it was imported, or trained by another "
                "optimizer than AdamW, which is the only one that the format knows; leave it out"
            )
    return weights


def optimizer_content(weights: CheckpointWeights, tensors: Sequence[Stored]) -> dict[str, object]:
    """The content of the file beside the one that has `tensors`."""
    ordered = flattened(tensors)
    slices = tuple(part for one in ordered for part in one.slices)
    flat = Stored("flat", (sum(prod(one.shape) for one in ordered),), slices)
    told = weights.checkpoint.state.get("optimizer") or {}
    spec = OptimizerSpec.model_validate({name: told[name] for name in RULE if name in told})
    skipped, *_ = (weights.checkpoint.state.get("guard") or {}).get("counts") or [0]
    moments = {kind: Part(weights.of(kind), flat) for kind in KINDS}
    group = {
        "lr": spec.lr,
        "betas": tuple(spec.betas),
        "eps": spec.eps,
        "weight_decay": spec.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "params": [0],
    }
    return {
        "grad_scaler": {"_scale": LOSS_SCALE, "_growth_step": 0, "_hysteresis_step": 0},
        "base_optim_states": {
            "state": {0: {"step": float(weights.checkpoint.step - skipped), **moments}},
            "param_groups": [group],
        },
        "flat_fp32_weights": {0: Part(weights.of(MASTER), flat)},
        "zero_devide_optim_plan": [
            [["_".join(map(str, (place, *one.shape))) for place, one in enumerate(ordered)]]
        ],
    }
