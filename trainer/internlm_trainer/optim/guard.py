"""Which updates are left out: those of steps whose loss or gradient norm is no number, or a spike.

All of it is arithmetic on 0-dim and small tensors on the device, so nothing waits for the decision, and all ranks
decide alike since they see the same numbers.  The step still counts and its data is consumed, as in OLMo's
SkipStepOptimizer (OLMo team, 2 OLMo 2 Furious, arXiv:2501.00656); where that takes mean and deviation of the window,
this takes median and median absolute deviation, which the outliers themselves do not move, and of the logarithms:
gradient norms spread by factors, and a healthy run has many that are some deviations above the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm_trainer.config import SkipSpec
from internlm_trainer.optim.loss_scale import LossScale

MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation, in median absolute deviations."""
SMALLEST_DEVIATION = 0.01
"""Of a logarithm.  What has hardly varied over a window would make a spike of the slightest change."""
SMALLEST_VALUE = 1e-30
"""Has a logarithm; zero has none."""


class Counts(NamedTuple):
    """What the guard has seen; the host's copy."""

    skipped: int
    """Updates left out since the job's first step."""
    in_a_row: int
    """Those of them that came last, with no good step since."""
    last: int
    """The step of the last one; 0 where there was none."""


class SkipGuard:
    """Judges each step by the `window` ones before it, not counting those that were no numbers.

    Spikes are looked for once the window is full, and upwards only: a loss that falls is no fault.  Spikes enter the
    window: the median hardly sees a few of them, but a lasting change, such as another source of data, has to become
    what is normal after half a window.  Were they left out, such a job would never take a step again.
    """

    def __init__(self, spec: SkipSpec, device: torch.device, loss_scale: LossScale | None = None) -> None:
        self.spec, self.loss_scale = spec, loss_scale
        # Rows: loss, gradient norm.  A ring; the next step goes to column `seen % window`.
        self.window = torch.zeros(2, spec.window, device=device)
        self.columns = torch.arange(spec.window, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(len(Counts._fields), dtype=torch.int64, device=device)

    @property
    def scale(self) -> Tensor | None:
        """What losses are multiplied by before the backward: 0-dim on the device."""
        return self.loss_scale.scale if self.loss_scale else None

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.loss_scale.scale if self.loss_scale else loss

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to skip the update of `step` (1 is the first): 0-dim bool on the device.

        loss, grad_norm: 0-dim fp32, to the bit the same on all ranks; without the loss scale, which adapts here.
        A gradient that overflowed for its scale alone is skipped and counted, but not as one of many in a row.
        """
        values = torch.stack((loss, grad_norm))
        finite = values.isfinite().all()
        skip = ~finite
        if self.spec.spike_threshold:
            spike = (self.scores(values) > self.spec.spike_threshold).any()
            skip = skip | (spike & (self.seen >= self.spec.window))
        here = (self.columns == self.seen % self.spec.window) & finite
        torch.where(here, values[:, None], self.window, out=self.window)
        self.seen += finite
        skipped, in_a_row, last = self.counts
        more = in_a_row + 1
        if self.loss_scale:
            more = torch.where(self.loss_scale.overflowed(loss, grad_norm), in_a_row, more)
            self.loss_scale.update(grad_norm)
        self.counts = torch.stack((skipped + skip, torch.where(skip, more, 0), torch.where(skip, step, last)))
        return skip

    def scores(self, values: Tensor) -> Tensor:
        """Robust z-scores `[2]` of the logarithms of a loss and a gradient norm against a full window."""
        past, now = (numbers.clamp(min=SMALLEST_VALUE).log() for numbers in (self.window, values))
        median = _median(past)
        deviation = MAD_TO_DEVIATION * _median((past - median[:, None]).abs())
        return (now - median) / deviation.clamp(min=SMALLEST_DEVIATION)

    def read(self) -> Counts:
        """The counts; waits for the device."""
        return Counts(*self.counts.tolist())

    def state_dict(self) -> dict[str, Any]:
        """As JSON, exact; waits for the device."""
        return {
            "seen": int(self.seen),
            "counts": self.counts.tolist(),
            "loss": self.window[0].tolist(),
            "gradNorm": self.window[1].tolist(),
            "lossScale": self.loss_scale and self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on to the bit; with another window than before, the window fills anew."""
        self.counts = torch.tensor(state["counts"], device=self.counts.device)
        if len(state["loss"]) == self.spec.window:
            self.seen.fill_(state["seen"])
            self.window.copy_(torch.tensor([state["loss"], state["gradNorm"]]))
        if self.loss_scale and (scale := state.get("lossScale")):
            self.loss_scale.load_state_dict(scale)


def _median(rows: Tensor) -> Tensor:
    """The lower median of each row.  By sorting: CUDA's own median is not deterministic."""
    return rows.sort(dim=-1).values[:, (rows.shape[-1] - 1) // 2]
