"""Saving the job's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.checkpoint import Failed, Saved
from internlm_trainer.errors import StepFailed

if TYPE_CHECKING:
    from internlm_trainer.train import Trainer


class Checkpointing(Callback):
    """Saves every `everySteps` steps and after the last one, beside training but for the last.

    A failing store is told, and fails the job only where nothing comes after, or nothing good is left.
    """

    section = "checkpoint"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        trainer.saver.tell = self._tell

    def start(self) -> None:
        if self.trainer.spec.checkpoint.asynchronous:
            self.trainer.saver.prepare(self.trainer.pieces())

    def after_step(self, result: StepResult) -> None:
        trainer, saver = self.trainer, self.trainer.saver
        if result.last:
            self._save_last(result.step)
        elif trainer.saves(result):
            self._begin(result.step)
            if not trainer.spec.checkpoint.asynchronous:
                saver.wait()
        elif trainer.due(result):
            saver.postpone(result.step)

    def _begin(self, step: int) -> None:
        trainer = self.trainer
        trainer.saver.begin(step, trainer.pieces(), trainer.state_dict(), trainer.zero.shapes())

    def _save_last(self, step: int) -> None:
        saver = self.trainer.saver
        saver.wait()
        if saver.saved_step != step:
            self._begin(step)
            if why := saver.wait():
                raise StepFailed(why)

    def _tell(self, end: Saved | Failed) -> None:
        if isinstance(end, Saved):
            self.trainer.telemetry.saved(end.checkpoint, end.seconds, end.stall)
        else:
            self.trainer.telemetry.save_failed(end.step, end.count)
