"""Telling the log, the terminal and the operator how training goes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.errors import StepFailed


class Progress(Callback):
    """Measures every `logEverySteps` steps, and wherever a checkpoint is due."""

    def start(self) -> None:
        self.trainer.telemetry.begin(self.trainer.tokens)

    def after_step(self, result: StepResult) -> None:
        trainer = self.trainer
        trainer.telemetry.step(result.step)
        if result.step % trainer.spec.training.log_every_steps and not trainer.saves(result):
            return
        # A number that is none ends the job before it can reach a checkpoint.
        dist.all_reduce(result.loss)
        loss, norm = torch.stack((result.loss, result.grad_norm.to(result.loss.dtype))).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StepFailed(
                f"loss {loss} and gradient norm {norm} at step {result.step}: lower training.optimizer.lr or "
                "lengthen training.schedule.warmupSteps; the last checkpoint is untouched"
            )
        trainer.telemetry.measured(result.step, trainer.tokens, loss, norm, result.lr)

    def close(self) -> None:
        self.trainer.telemetry.close()
