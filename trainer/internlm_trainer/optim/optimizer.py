"""The optimizer of Hybrid ZeRO's master weights: which rule updates what, and all states as pieces of parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.optim import adamw
from internlm_trainer.optim.adamw import AdamW
from internlm_trainer.optim.muon import Muon, Rows
from internlm_trainer.optim.schedule import beta2
from internlm_trainer.optim.state import Part, StatePiece
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import Span

STATE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MasterOptimizer:
    """Updates `zero`'s master weights from its reduced gradients.

    With Muon, it takes the parameters for which `rows` tells of matrices, and AdamW the rest.
    """

    def __init__(self, zero: HybridZero, spec: OptimizerSpec, rows: Rows = lambda _: ()) -> None:
        """Raises UserError where `spec.backend` cannot be had."""
        self.zero, self.spec = zero, spec
        dtype = STATE_TYPES[spec.state_type]
        self.muon = Muon(zero, rows if spec.name == "muon" else lambda _: (), spec, dtype)
        taken = {id(bucket) for bucket, _, _ in self.muon.buckets}
        decayed: list[Part] = []
        other: list[Part] = []
        for bucket in zero.buckets:
            end = bucket.layout.decayed.stop
            for parts, span in ((decayed, Span(0, end)), (other, Span(end, bucket.layout.padded))):
                met = bucket.optimizer_span.meet(span)
                if met and not (parts is decayed and id(bucket) in taken):
                    parts.append(Part(bucket, met, adamw.KINDS, dtype))
        self.adamw = AdamW(decayed, other, spec)
        self.done = 0

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """One update; needs `zero.clip` before and `zero.publish` after.

        skip: 0-dim bool on the device; where it is true, nothing changes, whatever the gradients are.
        """
        skip = torch.zeros((), dtype=torch.bool, device=self.zero.device) if skip is None else skip
        if self.adamw.fused:
            for bucket in self.zero.buckets:
                bucket.published.wait()  # what the update overwrites is still read until then
        if not self.rounds:
            self.zero.scale_gradients()
        self.adamw.step(lr, beta2(self.spec, self.done), skip, self.zero.take_factor())
        self.muon.step(lr, skip)
        self.done += 1

    @property
    def rounds(self) -> bool:
        """Whether an update leaves the weights rounded where they are gathered from."""
        return self.adamw.fused and not self.muon.parts

    def set_step(self, done: int, skipped: int) -> None:
        """Steps of the job so far, and how many of them changed nothing."""
        self.done = done
        self.adamw.updates.fill_(done - skipped)

    def pieces(self) -> Iterator[StatePiece]:
        """Every state that this rank holds; replicas hold the same ones."""
        for part in (*self.adamw.parts, *self.muon.parts):
            yield from part.pieces()

    def bad_parameter(self) -> str | None:
        """A parameter of which this rank holds an element that is no finite number; waits for the device."""
        for piece in self.pieces():
            if piece.kind == "master" and not piece.values.isfinite().all():
                return piece.parameter
        return None
