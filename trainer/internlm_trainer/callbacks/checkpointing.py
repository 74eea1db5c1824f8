"""Saving the job's state."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.checkpoint import Piece, SaveFailed
from internlm_trainer.errors import StepFailed

if TYPE_CHECKING:
    from internlm_trainer.train import Trainer

log = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves every `everySteps` steps and after the last one.

    A failing store is told, and fails the job only where nothing comes after.
    """

    section = "checkpoint"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._saved_step = trainer.start_step

    def after_step(self, result: StepResult) -> None:
        if self.trainer.saves(result) and result.step != self._saved_step:
            self._save(result.step, must_succeed=result.last)

    def _save(self, step: int, *, must_succeed: bool) -> None:
        trainer, world, store = self.trainer, self.trainer.world, self.trainer.store
        began, failures = time.monotonic(), []
        entry = committed = None
        first_copy = trainer.zero.layout.coordinates(world.rank)[3] == 0  # replicas hold the same
        try:
            if first_copy:
                entry = store.write_shard(step, world.rank, self._pieces())
        except SaveFailed as error:
            failures = [str(error)]
        entries = [found for found in world.gather(entry) if found]
        failures = world.agree(failures)
        if not failures and world.rank == 0:
            try:
                committed = store.commit(
                    step, entries, trainer.state_dict(), trainer.zero.shapes(), world.size
                )
            except SaveFailed as error:
                failures = [str(error)]
        failures = world.agree(failures)
        if failures:
            if world.rank == 0:
                store.abandon(step)
            if must_succeed:
                raise StepFailed(failures[0])
            log.error("%s; training goes on", failures[0])
        else:
            self._saved_step = step
        if committed:
            trainer.telemetry.saved(committed, time.monotonic() - began)

    def _pieces(self) -> Iterable[Piece]:
        for piece in self.trainer.optimizer.pieces():
            yield Piece(piece.kind, piece.parameter, piece.span.start, piece.span.stop, piece.values.cpu())
