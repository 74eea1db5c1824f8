"""AdamW on parts of the fp32 master weights.  Loshchilov and Hutter, arXiv:1711.05101."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.errors import UserError
from internlm_trainer.optim.state import Part

KINDS = ("exp_avg", "exp_avg_sq")


class Rule(NamedTuple):
    """How parts are updated; the update at hand is counted in `updates`, unless it is to `skip`."""

    updates: Tensor
    skip: Tensor
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class AdamW:
    """Updates what decays and what does not."""

    def __init__(self, decayed: list[Part], other: list[Part], spec: OptimizerSpec) -> None:
        self.groups = [(decayed, spec.weight_decay), (other, 0.0)]
        self.parts, self.spec = [*decayed, *other], spec
        device = self.parts[0].weight.device if self.parts else torch.device("cpu")
        # Updates done: a tensor, since only the device knows whether one was skipped.
        self.updates = torch.zeros((), device=device)
        self.backend = choose_backend(spec.backend, device)

    @property
    def fused(self) -> bool:
        """Whether an update scales the gradients and rounds the weights itself."""
        return self.backend == "fused"

    def step(self, lr: float, beta2: float, skip: Tensor, factor: Tensor | None = None) -> None:
        """One update, unless `skip` (0-dim bool).

        factor: what the gradients are multiplied by, if they are: 0-dim fp32, for a `fused` one only.
        """
        assert factor is None or self.fused
        skip = skip.to(self.updates.device)
        self.updates += ~skip
        for parts, weight_decay in self.groups:
            betas = (self.spec.betas[0], beta2)
            rule = Rule(self.updates, skip, lr, betas, self.spec.eps, weight_decay)
            if self.fused:
                _fused_update(parts, rule, torch.ones_like(self.updates) if factor is None else factor)
                continue
            update = _apex_update if self.backend == "apex" else _torch_update
            if self.spec.state_type == "fp32":
                update(parts, [[part.states[kind] for part in parts] for kind in KINDS], rule)
                continue
            for part in parts:  # one by one, so that their fp32 copies do not all exist at once
                moments = [part.states[kind].float() for kind in KINDS]
                update([part], [[moment] for moment in moments], rule)
                for kind, moment in zip(KINDS, moments, strict=True):
                    part.states[kind].copy_(moment)


def choose_backend(asked: str, device: torch.device) -> str:
    """`fused`, which is our own kernel, `torch` or `apex`.

    `auto` is our own where the states are on a GPU, else PyTorch's.  Raises UserError where apex cannot be used.
    """
    if asked != "apex":
        return "fused" if asked == "auto" and device.type == "cuda" else "torch"
    missing = next((name for name in ("apex", "amp_C") if importlib.util.find_spec(name) is None), None)
    if missing:
        raise UserError(
            f"spec.training.optimizer.backend: apex is asked for, and its module {missing} is not installed; "
            "install apex with its CUDA extensions, or set the backend to auto"
        )
    if device.type != "cuda":
        raise UserError(
            f"spec.training.optimizer.backend: apex needs the optimizer states on a GPU, and they are on the "
            f"{device.type}; set the backend to auto"
        )
    return "apex"


def _fused_update(parts: list[Part], rule: Rule, factor: Tensor) -> None:
    from internlm_trainer.kernels.adamw import adamw_

    for part in parts:
        adamw_(
            part.weight,
            part.gradient,
            (part.states["exp_avg"], part.states["exp_avg_sq"]),
            part.rounded,
            factor,
            rule.skip,
            rule.updates,
            lr=rule.lr,
            betas=rule.betas,
            eps=rule.eps,
            weight_decay=rule.weight_decay,
        )


def _torch_update(parts: list[Part], moments: list[list[Tensor]], rule: Rule) -> None:
    before = rule.updates - (~rule.skip).float()  # the kernel counts the update at hand itself
    adamw(
        [part.weight for part in parts],
        [part.gradient for part in parts],
        moments[0],
        moments[1],
        max_exp_avg_sqs=[],
        state_steps=[before.clone() for _ in parts],
        fused=True,
        found_inf=rule.skip.float(),  # made for gradient scaling: where it is 1, the kernel does nothing at all
        amsgrad=False,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        lr=rule.lr,
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        maximize=False,
    )


def _apex_update(parts: list[Part], moments: list[list[Tensor]], rule: Rule) -> None:
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    if not parts:
        return
    adam_w, bias_correction = 1, 1
    multi_tensor_applier(
        amp_C.multi_tensor_adam_capturable,  # the kernel under FusedAdam(capturable=True)
        rule.skip.int().reshape(1),  # its overflow buffer: where it is 1, the kernel does nothing at all
        [[part.gradient for part in parts], [part.weight for part in parts], *moments],
        torch.full((1,), rule.lr, device=rule.updates.device),
        *rule.betas,
        rule.eps,
        rule.updates.int().reshape(1),
        adam_w,
        bias_correction,
        rule.weight_decay,
        torch.ones(1, device=rule.updates.device),
    )
