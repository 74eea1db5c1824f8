"""Dynamic loss scaling for fp16.  Micikevicius et al., Mixed Precision Training, arXiv:1710.03740.

The rule is that of torch.amp.GradScaler; here it is arithmetic on the device, so that nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internlm_trainer.config import LossScaleSpec

SMALLEST = 1.0


class LossScale:
    """The factor by which losses are multiplied before the backward, so that small gradients are no zeros in fp16."""

    def __init__(self, spec: LossScaleSpec, micro_batches: int, device: torch.device) -> None:
        """`micro_batches` of a step over all ranks: each carries only its part of the mean loss, and `spec.initial`
        is meant for the loss of one."""
        self.spec = spec
        initial = spec.initial * 2 ** (micro_batches - 1).bit_length()
        self.scale = torch.tensor(float(initial), device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    def overflowed(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether gradients were infinite or none for their scale alone, which a smaller one mends: 0-dim bool."""
        return loss.isfinite() & ~grad_norm.isfinite() & (self.scale > SMALLEST)

    def update(self, grad_norm: Tensor) -> None:
        """Halve the scale after an overflow, double it after `growthSteps` steps without one."""
        bad = ~grad_norm.isfinite()
        self.good = torch.where(bad, 0, self.good + 1)
        grow = self.good == self.spec.growth_steps
        factor = torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(min=SMALLEST)
        self.good = torch.where(grow, 0, self.good)

    def state_dict(self) -> dict[str, Any]:
        """As JSON, exact; waits for the device."""
        return {"scale": self.scale.item(), "good": self.good.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.fill_(state["scale"])
        self.good.fill_(state["good"])
