"""What a callback is, and what it is told of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from internlm_trainer.data.packing import Row

if TYPE_CHECKING:
    from internlm_trainer.train import Trainer


class StepResult(NamedTuple):
    """What one optimizer step gave."""

    step: int
    """Its number; 1 is the first, and the last one is `Trainer.total_steps`."""
    loss: Tensor
    """Mean loss of the step over all ranks, in nats a token.  0-dim, on the device, the same on all ranks."""
    grad_norm: Tensor
    """Global gradient norm before clipping.  0-dim, on the device, the same on all ranks."""
    lr: float
    """Learning rate of the step."""
    last: bool
    """Whether no step follows: it was the job's last one, or the job was asked to stop."""
    rows: Sequence[Row]
    """This rank's micro-batches."""
    row_losses: Sequence[Tensor]
    """For each of them, the sum of its tokens' losses, in nats.  0-dim, on the device."""


class Callback:
    """Watches training from one rank.

    Every rank has the same callbacks and calls their hooks in the same order, so that a hook may communicate.
    """

    section = "other"
    """Under which name the time of `after_step` is counted."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def start(self) -> None:
        """The first step is next.  Not called where no step is left to do."""

    def after_step(self, result: StepResult) -> None:
        """A step is done."""

    def finish(self) -> None:
        """All steps of the job are done."""

    def close(self) -> None:
        """Training is over, or failed: let go of threads and files.  Does not communicate, and never raises."""
