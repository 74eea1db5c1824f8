"""AdamW on the fp32 master shards of Hybrid ZeRO, and its states as pieces of parameters.

Loshchilov and Hutter, arXiv:1711.05101; the arithmetic is PyTorch's fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import Span

KINDS = ("master", "exp_avg", "exp_avg_sq")


class StatePiece(NamedTuple):
    """This rank's part of one parameter's master weight or optimizer state."""

    kind: str
    parameter: str
    span: Span
    """Elements of the flattened parameter."""
    values: Tensor
    """A 1-dim fp32 view of the live state, on the device."""


class MasterAdamW:
    """Updates `zero`'s master weights from its reduced gradients."""

    def __init__(self, zero: HybridZero, spec: OptimizerSpec) -> None:
        decayed, other = zero.master_groups()
        groups = [
            {"params": decayed, "weight_decay": spec.weight_decay},
            {"params": other, "weight_decay": 0.0},
        ]
        self.zero = zero
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=spec.lr,
            betas=(spec.betas[0], spec.betas[1]),
            eps=spec.eps,
            fused=True,
        )
        # The states live in buffers of our own, so that they can be saved and restored by parameter.
        self.steps = torch.zeros((), dtype=torch.float32, device=zero.buckets[0].master.device)
        self.moments = {
            kind: [torch.zeros_like(bucket.master) for bucket in zero.buckets] for kind in KINDS[1:]
        }
        start_of = {bucket.master.untyped_storage().data_ptr(): i for i, bucket in enumerate(zero.buckets)}
        for weight in (w for group in self.optimizer.param_groups for w in group["params"]):
            index = start_of[weight.untyped_storage().data_ptr()]
            part = slice(weight.storage_offset(), weight.storage_offset() + weight.numel())
            self.optimizer.state[weight] = {
                "step": self.steps.clone(),
                **{kind: buffers[index][part] for kind, buffers in self.moments.items()},
            }

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """One update; needs `zero.clip` before and `zero.publish` after.

        skip: 0-dim bool on the device; where it is true, nothing changes, whatever the gradients are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused kernel's own way to leave an update out, made for gradient scaling; nothing waits for the value.
        self.optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def set_step(self, step: int) -> None:
        """Updates done so far, for Adam's bias correction."""
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def bad_parameter(self) -> str | None:
        """A parameter of which this rank holds an element that is no finite number; waits for the device."""
        for piece in self.pieces():
            if piece.kind == "master" and not piece.values.isfinite().all():
                return piece.parameter
        return None

    def pieces(self) -> Iterator[StatePiece]:
        """Every state that this rank holds; replicas hold the same ones."""
        for index, bucket in enumerate(self.zero.buckets):
            flats = {"master": bucket.master, **{kind: self.moments[kind][index] for kind in KINDS[1:]}}
            for entry, part in bucket.layout.pieces(bucket.optimizer_span):
                inside = Span(part.start - entry.span.start, part.stop - entry.span.start)
                own = slice(part.start - bucket.optimizer_span.start, part.stop - bucket.optimizer_span.start)
                for kind in KINDS:
                    yield StatePiece(kind, entry.name, inside, flats[kind][own])
