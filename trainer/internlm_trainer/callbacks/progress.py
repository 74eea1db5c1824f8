"""Telling the log, the terminal and the operator how training goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from internlm_trainer import config
from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.errors import Diverged
from internlm_trainer.machine import card
from internlm_trainer.optim.guard import Counts
from internlm_trainer.optim.schedule import beta2
from internlm_trainer.telemetry.flops import causal_flops, full_flops, peak_flops
from internlm_trainer.telemetry.memory import peaks
from internlm_trainer.telemetry.stragglers import Slowest
from internlm_trainer.telemetry.tally import Reading, Sums, Tally, source_names
from internlm_trainer.transfer import Moment

if TYPE_CHECKING:
    from internlm_trainer.train import Trainer


class _Point(NamedTuple):
    """How far training is when its device comes to it."""

    moment: Moment
    tokens: int
    step: int


class _Measured(NamedTuple):
    """A step that is to be told of."""

    result: StepResult
    now: _Point
    reading: Reading
    slowest: Slowest | None


class Progress(Callback):
    """Measures every `logEverySteps` steps, and wherever a checkpoint is due.

    No GPU waits for it: what was measured is told once the next step is in the GPU's queue, unless a checkpoint or a
    validation makes it wait anyway.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._tally = Tally(len(trainer.spec.data.train), trainer.world.device)
        self._peak = peak_flops(card(trainer.world.device))
        self._since = self._now()
        self._measured: _Measured | None = None

    def start(self) -> None:
        self._since = self._now()
        self.trainer.telemetry.begin(time.monotonic() - self.trainer.world.formed_at)

    def after_step(self, result: StepResult) -> None:
        trainer = self.trainer
        trainer.telemetry.step(result.step)
        for row, row_loss in zip(result.rows, result.row_losses, strict=True):
            self._tally.add(row, row_loss)
        self._tell()
        saves = trainer.saves(result)
        if result.step % trainer.spec.training.log_every_steps and not saves:
            return
        course = torch.stack((result.loss, result.grad_norm))
        # One transfer from the device; steps and counts are far below 2^53.
        scale = course.new_ones(1) if trainer.guard.scale is None else trainer.guard.scale.reshape(1)
        found = (course.double(), scale.double(), trainer.guard.counts.double())
        now = self._now()
        self._measured = _Measured(result, now, self._tally.reduce(torch.cat(found)), trainer.slowest)
        if saves or trainer.validates(result) or trainer.world.device.type == "cpu":
            self._tell()

    def _tell(self) -> None:
        """Tell of the step that was measured, if one is to be told of."""
        if not self._measured:
            return
        (result, now, reading, slowest), self._measured = self._measured, None
        trainer = self.trainer
        (loss, norm, loss_scale, *counted), sums = reading.read()
        counts = Counts(*map(int, counted))
        if counts.in_a_row:
            self._check_course(result.step, loss, norm, counts)
        trainer.telemetry.skipped(counts.skipped, counts.last)
        values: dict[str, float] = {"step": result.step, "loss": loss, "grad_norm": norm, "lr": result.lr}
        values |= {"loss_scale": loss_scale, "inf_nan_skip_batches": counts.skipped}
        if slowest:
            values |= {"straggler_rank": slowest.rank, "straggler_score": slowest.score}
        values |= {"num_consumed_tokens": now.tokens} | self._batch(result)
        trainer.telemetry.measured(values | self._speed(now, sums) | self._losses(sums))

    def _now(self) -> _Point:
        return _Point(Moment(self.trainer.world.device), self.trainer.tokens, self.trainer.step)

    def _speed(self, now: _Point, sums: Sums) -> dict[str, float]:
        """How fast the steps from the last measurement to this one were, and where their time went."""
        trainer = self.trainer
        before, self._since = self._since, now
        seconds = now.moment.since(before.moment)
        tokens, steps = now.tokens - before.tokens, now.step - before.step
        each = max(seconds, 1e-9) * trainer.world.size
        shape = config.model_shape(trainer.spec.model)
        full = full_flops(shape, tokens, trainer.spec.model.seq_len) / each
        causal = causal_flops(shape, tokens, sums.pairs) / each
        values = {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "tgs": tokens / each,
            "tflops": full / 1e12,
            "tflops_causal": causal / 1e12,
        }
        if self._peak:
            values |= {"mfu": full / self._peak, "mfu_causal": causal / self._peak}
        spent = {f"{name}_time": spent / max(steps, 1) for name, spent in trainer.stopwatch.read().items()}
        return values | {"step_time": seconds / max(steps, 1)} | spent | peaks(trainer.world.device)

    def _batch(self, result: StepResult) -> dict[str, float]:
        """The step's batch, under InternLM's names: of this rank, as there."""
        rows = result.rows
        samples = [len(row.cu_seqlens) - 1 for row in rows]
        return {
            "micro_num": len(rows),
            "num_samples_in_batch": sum(samples),
            "largest_length": max(row.max_seqlen for row in rows),
            "largest_batch": max(samples),
            "smallest_batch": min(samples),
            "adam_beta2": beta2(self.trainer.spec.training.optimizer, result.step - 1),
        }

    def _losses(self, sums: Sums) -> dict[str, float]:
        """Loss of each source, where there are several."""
        names = source_names([source.path for source in self.trainer.spec.data.train])
        found = zip(names, sums.losses, strict=True)
        return {f"loss/{name}": loss for name, loss in found if loss is not None} if len(names) > 1 else {}

    def _check_course(self, step: int, loss: float, norm: float, counts: Counts) -> None:
        """End the job before what cannot get better reaches a checkpoint."""
        trainer = self.trainer
        bad = [name for name in trainer.world.gather(trainer.optimizer.bad_parameter()) if name]
        limit = trainer.spec.training.skip.max_in_a_row
        if bad:
            found = f"after step {step}, {bad[0]} holds numbers that are infinite or none"
        elif counts.in_a_row >= limit:
            found = (
                f"the last {counts.in_a_row} steps up to {step} were skipped, which reaches "
                f"training.skip.maxInARow ({limit}): their loss or gradient norm was a spike or no number"
            )
        else:
            return
        raise Diverged(
            f"{found} (loss {loss:.4g}, gradient norm {norm:.4g}): lower training.optimizer.lr, lengthen "
            "training.schedule.warmupSteps, or look at the data of these steps; the last checkpoint is untouched"
        )

    def close(self) -> None:
        self.trainer.telemetry.close()
