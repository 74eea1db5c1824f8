"""The pretraining loop: from a job's description to trained weights, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_trainer import config
from internlm_trainer.assembly import assemble
from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.callbacks.checkpointing import Checkpointing
from internlm_trainer.callbacks.evaluation import Completions, Evaluation
from internlm_trainer.callbacks.float8 import Float8Check
from internlm_trainer.callbacks.garbage import Garbage
from internlm_trainer.callbacks.profiling import Profiling
from internlm_trainer.callbacks.progress import Progress
from internlm_trainer.checkpoint import BadCheckpoint, Checkpoint, CheckpointStore, Piece, Saver, newest_good
from internlm_trainer.config import TrainSpec
from internlm_trainer.data.packing import Row
from internlm_trainer.errors import Diverged, UserError
from internlm_trainer.inputs import initial_weights, open_inputs, open_store
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import parameter_count
from internlm_trainer.optim.guard import SkipGuard
from internlm_trainer.optim.loss_scale import LossScale
from internlm_trainer.optim.schedule import learning_rate
from internlm_trainer.processes import Processes, Stopped
from internlm_trainer.telemetry.diagnostics import record_memory
from internlm_trainer.telemetry.heartbeat import Heartbeat
from internlm_trainer.telemetry.progress import Silence, Telemetry
from internlm_trainer.telemetry.report import Reporter
from internlm_trainer.telemetry.sinks import Sinks, asked_sinks
from internlm_trainer.telemetry.stopwatch import Stopwatch
from internlm_trainer.telemetry.stragglers import Slowest, slowest
from internlm_trainer.transfer import to_device
from internlm_trainer.weights.source import MASTER, Weights, fill

log = logging.getLogger(__name__)

# In the order in which they hear of a step: values are told before they are saved.
CALLBACKS: tuple[type[Callback], ...] = (
    Profiling,
    Progress,
    Evaluation,
    Float8Check,
    Checkpointing,
    Completions,
    Garbage,
)


def train(name: str, spec: TrainSpec, world: Processes, attempt: int) -> int:
    """Train the job to its end and return its last step.

    Raises UserError for bad input, before the first step; Stopped after a save, when asked to stop; StepFailed.
    """
    store = open_store(name, spec)
    with ExitStack() as stack:
        stack.callback(store.release)
        trainer = Trainer(name, spec, store, world, attempt)
        stack.callback(trainer.close)
        callbacks = [kind(trainer) for kind in CALLBACKS]
        for callback in callbacks:
            stack.callback(callback.close)
        world.train()
        if trainer.step < trainer.total_steps:
            for callback in callbacks:
                callback.start()
        while trainer.step < trainer.total_steps:
            result = trainer.train_step()
            try:
                for callback in callbacks:
                    with trainer.section(callback.section):
                        callback.after_step(result)
            except Diverged:
                trainer.saver.wait()  # what is being saved is from before, and may be needed
                raise
            if result.last and result.step < trainer.total_steps:
                raise Stopped(result.step)
        for callback in callbacks:
            callback.finish()
        trainer.heartbeat.beat("done", trainer.step)
    return trainer.step


class Trainer:
    """A job's parts, put together, and one step of training."""

    def __init__(
        self, name: str, spec: TrainSpec, store: CheckpointStore, world: Processes, attempt: int
    ) -> None:
        self.spec, self.world = spec, world
        training = spec.training
        sinks = world.together(lambda: asked_sinks(name, spec))
        self.row_tokens = config.row_tokens(spec)
        self.total_steps = config.total_steps(spec, world.size)

        self.tokenizer, self.loader, self.held_out, initial = open_inputs(spec, store, world, attempt)

        if spec.telemetry.memory_history:
            record_memory(world.device)
        self.model, self.zero, self.optimizer, choice, self.float8 = assemble(spec, world)
        fp16 = training.precision == "fp16"
        loss_scale = LossScale(training.loss_scale, self.micro_batches(0), world.device) if fp16 else None
        self.guard = SkipGuard(training.skip, world.device, loss_scale)
        self.step = self.start_step = self.tokens = 0
        self.stopwatch, self.heartbeat = Stopwatch(world.device), Heartbeat(world.rank)
        first_copy = self.zero.layout.coordinates(world.rank)[3] == 0  # replicas hold the same
        self.save_asked = False
        self.slowest: Slowest | None = None
        self._computed = 0.0
        self.saver = Saver(store, world, writes=first_copy, max_age=spec.checkpoint.max_age_seconds)
        checkpoint = newest_good(store, world, self._restore)
        if spec.model.init and not checkpoint:
            world.together(lambda: self._start_from(initial or initial_weights(spec)))
        if spec.model.init or checkpoint:
            self.zero.publish()
        log.info(
            "training %s parameters on %d processes (%s), zero %s, %d tokens a step, attention: %s (%s)",
            f"{parameter_count(config.model_shape(spec.model)):,}",
            world.size,
            world.device.type,
            spec.parallel.zero.degrees(world.size),
            config.global_batch_tokens(spec, world.size),
            choice.name,
            choice.reason,
        )
        if world.rank == 0:
            self.telemetry: Telemetry | Silence = Telemetry(
                self.total_steps, self.start_step, attempt, Reporter(), Sinks(sinks, self.start_step)
            )
        else:
            self.telemetry = Silence()
        if checkpoint:
            log.info("resuming from step %d of %s", self.start_step, checkpoint.committed.uri)
            # Every rank has read what it needs, and all of that was as it was written.
            self.telemetry.saved(replace(checkpoint.committed, verified=True))

    def train_step(self) -> StepResult:
        """One optimizer step."""
        world, training = self.world, self.spec.training
        with self.section("data"):
            micro_batches = self.micro_batches(self.tokens)
            self._skip_steps(micro_batches)
            rows = self.loader.next_step(micro_batches, range(world.rank, micro_batches, world.size))
            # The mean is over the tokens that carry loss in all rows of all ranks, so no layout changes it.
            mine = sum(row.learned for row in rows)
            asked, times = self.telemetry.save_asked(self.step), self._times()
            (labels, asks, *rest), stop = world.exchange(mine, asked, *times, *self.saver.report())
        self.save_asked = asks > 0
        if times:
            self.slowest = slowest(rest[: len(times)])
            self.telemetry.compared(self.slowest)
        self.saver.heard(*rest[len(times) :])
        total, row_losses = torch.zeros((), device=world.device), []
        with self.section("fwd_bwd", on_device=True):
            for index, row in enumerate(rows):
                self.zero.micro_batch(last=index == len(rows) - 1)
                row_loss = self.loss(row)
                loss = row_loss / max(labels, 1)
                self.guard.scaled(loss).backward()
                total += loss.detach()
                row_losses.append(row_loss.detach())
        with self.section("reduce", on_device=True):
            self.zero.reduced()  # `clip` would wait, too: apart from it, to tell how long
        with self.section("optimizer", on_device=True):
            norm = self.zero.clip(training.optimizer.clip_grad_norm, self.guard.scale)
            lr = learning_rate(training, self.step, self.total_steps)
            self.step += 1
            # Replicas may add up the norm in another order: what is judged is the same everywhere, to the bit.
            common = torch.stack((total, norm / world.size))
            dist.all_reduce(common)
            self.saver.before_update()
            self.optimizer.step(lr, self.guard.judge(self.step, *common.unbind()))
            self.zero.publish(rounded=self.optimizer.rounds)
        self.tokens += self.row_tokens * micro_batches
        last = stop or self.step == self.total_steps
        return StepResult(self.step, common[0], norm, lr, last, rows, row_losses)

    def _times(self) -> list[int]:
        """After the steps that are logged, microseconds that each rank, here this one, computed since the last."""
        if self.step % self.spec.training.log_every_steps:
            return []
        times, total = [0] * self.world.size, self.stopwatch.total("fwd_bwd")
        times[self.world.rank] = round(1e6 * (total - self._computed))
        self._computed = total
        return times

    def micro_batches(self, tokens: int) -> int:
        """Of all ranks, in the step after `tokens` tokens of training."""
        return config.batch_tokens(self.spec, self.world.size, tokens) // self.row_tokens

    def _skip_steps(self, micro_batches: int) -> None:
        """Draw and throw away the rows of the steps that `data.skipSteps` names."""
        skipped = config.skipped_after(self.spec.data.skip_steps, self.step)
        if skipped:
            self.loader.skip(skipped * micro_batches)
            log.info("skipping %d steps after step %d, as data.skipSteps says", skipped, self.step)
            self.step += skipped
            self.optimizer.set_step(self.step, self.guard.read().skipped)

    def section(self, name: str, *, on_device: bool = False) -> AbstractContextManager[None]:
        """A part of the loop, whose time is told under this name."""
        self.heartbeat.beat(name, self.step)
        return self.stopwatch.section(name, on_device=on_device)

    def loss(self, row: Row) -> Tensor:
        """Sum of the losses of a row's tokens, in nats."""
        lengths = tuple(int(n) for n in row.cu_seqlens[1:] - row.cu_seqlens[:-1])
        arrays = (row.cu_seqlens, row.positions, row.tokens, row.labels)
        there = (to_device(torch.from_numpy(array), self.world.device) for array in arrays)
        cu_seqlens, positions, tokens, labels = there
        return self.model.loss(tokens, Documents(cu_seqlens, positions, lengths), labels)

    def saves(self, result: StepResult) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.saver.wanted(self.due(result)) or result.last

    def due(self, result: StepResult) -> bool:
        """Whether the step is one to save, even if the save before it is not done yet."""
        return result.last or self.save_asked or result.step % self.spec.checkpoint.every_steps == 0

    def validates(self, result: StepResult) -> bool:
        """Whether the held-out data is looked at after this step."""
        every = self.spec.training.validate_every_steps
        final = result.step == self.total_steps
        return final or bool(
            every and result.step % every == 0 and not result.last
        )  # a stop has only so much time

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of weights and optimizer states, for `Saver`."""
        for piece in self.optimizer.pieces():
            yield Piece(piece.kind, piece.parameter, piece.span.start, piece.span.stop, piece.values)

    def state_dict(self) -> dict[str, Any]:
        """The loop's own state, as JSON; `_restore` reads it."""
        return {
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "float8": self.float8.state_dict() if self.float8 else None,
            # For those who export it:
            "tokenizer": self.spec.data.tokenizer,
            "seqLen": self.spec.model.seq_len,
            "optimizer": self.spec.training.optimizer.model_dump(mode="json", by_alias=True),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this or any other layout.  Where it is bad for one rank, the others do not
        hear of it in here, so this does not communicate."""
        self.step = self.start_step = checkpoint.step
        self.tokens = checkpoint.state["tokens"]
        if self.step > self.total_steps:
            raise UserError(
                f"spec.training: asks for {self.total_steps} steps, but {checkpoint.committed.uri} is further "
                "already: ask for more steps, or give another checkpoint.path"
            )
        self.loader.load_state_dict(checkpoint.state["loader"])
        self.saver.restore(checkpoint, self.pieces())
        if guard := checkpoint.state.get("guard"):
            self.guard.load_state_dict(guard)
        if self.float8 and (float8 := checkpoint.state.get("float8")):
            self.float8.load_state_dict(float8)
        self.optimizer.set_step(self.step, self.guard.read().skipped)
        if name := self.optimizer.bad_parameter():
            raise BadCheckpoint(checkpoint.name, f"{name} holds numbers that are infinite or none")

    def _start_from(self, weights: Weights) -> None:
        """Take the weights that `model.init` names, each rank those of which it holds the master copy."""
        fill(weights, (piece for piece in self.pieces() if piece.kind == MASTER))
        if name := self.optimizer.bad_parameter():
            raise UserError(
                f"model.init.from: {name} in {weights.url} holds numbers that are infinite or none"
            )
        if self.world.rank == 0:
            log.info("starting from the weights in %s", weights.url)

    def close(self) -> None:
        """Let go of threads and files."""
        self.saver.close()
        self.loader.close()
