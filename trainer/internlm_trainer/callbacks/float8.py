"""Whether training in float8 stays near what bf16 would do."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.config import Float8Spec
from internlm_trainer.data.packing import Row

log = logging.getLogger(__name__)

TOKENS = 2048
"""Of a row that are computed twice, at most: few, so that they fit beside everything else."""
PATIENCE = 2
"""Comparisons in a row that must be too far apart: the few tokens of one may be a poor sample."""


class Comparison(NamedTuple):
    """Float8 beside bf16, over all ranks."""

    loss_difference: float
    """Relative, of the sums of losses."""
    gradient_cosine: float
    """Of the gradients of all norms' weights."""

    def within(self, spec: Float8Spec) -> bool:
        """Whether it is near enough; what is no number is not."""
        return (
            abs(self.loss_difference) <= spec.max_loss_difference
            and self.gradient_cosine >= spec.min_gradient_cosine
        )


class Float8Check(Callback):
    """Computes the beginning of a row in float8 and in bf16, every `checkEverySteps` steps, and switches float8 off
    for good where they were too far apart twice in a row."""

    section = "float8_check"

    def after_step(self, result: StepResult) -> None:
        float8, spec = self.trainer.float8, self.trainer.spec.training.fp8
        every = spec.check_every_steps
        if not float8 or not float8.on or not every or result.step % every or result.last:
            return
        found = self.compare(result.rows[0])
        if found is None:
            return
        values = {"fp8_loss_difference": found.loss_difference, "fp8_gradient_cosine": found.gradient_cosine}
        self.trainer.telemetry.compared_float8(result.step, values)
        float8.apart = 0 if found.within(spec) else float8.apart + 1
        if float8.apart:
            float8.on = float8.apart < PATIENCE
            log.warning(
                "step %d: fp8 is %s: the loss differs by %.2g of bf16's (%g allowed), the gradients' cosine is %.4f "
                "(%g at least)",
                result.step,
                "far from bf16" if float8.on else "off from here on, training goes on in bf16",
                found.loss_difference,
                spec.max_loss_difference,
                found.gradient_cosine,
                spec.min_gradient_cosine,
            )

    def compare(self, row: Row) -> Comparison | None:
        """Every rank compares a row of its own, and all find the same; None where bf16 has nothing to compare with:
        no label in these tokens, or no finite loss."""
        float8 = self.trainer.float8
        assert float8
        # Shorter than a row: rows of other lengths run as the operations are written, so nothing is compiled for it.
        part = row.head(min(TOKENS, max(16, len(row.tokens) // 2)) // 16 * 16)
        loss, gradient = self._run(part)
        float8.on = False
        try:
            exact, reference = self._run(part)
        finally:
            float8.on = True
        sums = torch.stack((loss, exact, gradient @ reference, gradient @ gradient, reference @ reference))
        dist.all_reduce(sums)
        lossy, lossless, dot, square, other = sums.tolist()
        if not lossless * other or not math.isfinite(lossless + other):
            return None
        return Comparison(lossy / lossless - 1, dot / max(square * other, 1e-60) ** 0.5)

    def _run(self, row: Row) -> tuple[Tensor, Tensor]:
        """The sum of losses and the gradient of all norms' weights, fp64 on the device."""
        model = self.trainer.model
        norms = [weight for name, weight in model.named_parameters() if "norm" in name]
        with self.trainer.zero.looked_at():
            loss = self.trainer.loss(row)
            gradients = torch.autograd.grad(loss, norms)
        return loss.detach().double(), torch.cat([gradient.double() for gradient in gradients])
