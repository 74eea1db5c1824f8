"""The pretraining loop: from a job's description to trained weights, top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from internlm_trainer import config
from internlm_trainer.checkpoint import (
    Checkpoint,
    CheckpointStore,
    CommittedCheckpoint,
    Piece,
    SaveFailed,
    Want,
    check_store,
    newest_good,
)
from internlm_trainer.config import TrainSpec
from internlm_trainer.data.loader import RowLoader, validation_rows
from internlm_trainer.data.packing import Row
from internlm_trainer.data.prepare import prepare
from internlm_trainer.data.progress import shown_progress
from internlm_trainer.data.tokenizer import check_vocabulary, load_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.generate import complete
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, initialise, parameter_count
from internlm_trainer.optim.adamw import MasterAdamW
from internlm_trainer.optim.schedule import learning_rate
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout
from internlm_trainer.processes import Processes, Stopped
from internlm_trainer.telemetry.progress import Telemetry
from internlm_trainer.telemetry.report import Reporter

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StepFailed(RuntimeError):  # noqa: N818
    """Training cannot go on from here."""


def train(name: str, spec: TrainSpec, world: Processes, attempt: int) -> int:
    """Train the job to its end and return its last step.

    Raises UserError for bad input, before the first step; Stopped after a save, when asked to stop.
    """
    run = Run(name, spec, world, attempt)
    try:
        world.train()
        step = run.start
        if run.start < run.total:
            run.telemetry.begin(run.tokens)
        while step < run.total:
            stop, loss, norm = run.train_step(step)
            step += 1
            last = step == run.total
            run.telemetry.step(step)
            saves = stop or last or step % spec.checkpoint.every_steps == 0
            if step % spec.training.log_every_steps == 0 or saves:
                run.measure(step, loss, norm)
            every = spec.training.validate_every_steps
            if last or (every and step % every == 0 and not stop):  # a stop has only so much time
                run.validate()
            if saves:
                run.save(step, must_succeed=last or stop)
            if stop and not last:
                raise Stopped(step)
        run.show_completions()
        return step
    finally:
        run.close()


class Run:
    """A job's parts, put together: data, model, optimizer, checkpoints."""

    def __init__(self, name: str, spec: TrainSpec, world: Processes, attempt: int) -> None:
        self.spec, self.world = spec, world
        training, shape = spec.training, config.model_shape(spec.model)
        self.row_tokens = config.row_tokens(spec)
        self.accumulation = config.gradient_accumulation(spec, world.size)
        self.total = config.total_steps(spec, world.size)

        # Everything that the user may have got wrong comes first, the cheap checks before the long work.
        self.store = CheckpointStore(spec.checkpoint.path, shape._asdict(), spec.checkpoint.keep, name)
        check_store(self.store, world)
        checkpoint = newest_good(self.store, world)
        self.saved_step = checkpoint.step if checkpoint else -1
        world.first(self._prepare)
        self.tokenizer = world.together(lambda: load_tokenizer(spec.data.tokenizer))
        world.together(lambda: check_vocabulary(self.tokenizer, shape.vocab_size, spec.data.tokenizer))
        self.loader = world.together(self._open_training_data)
        self.held_out = world.together(self._read_validation_rows)

        choice = attention.choose(world.device, DTYPES[training.precision])
        with torch.device("meta"):
            self.model = InternLM(shape, choice.attention)

        def fill(parameter: str, index: int, values: Tensor) -> None:
            # A generator for each parameter: its values depend on the seed alone, not on the layout.
            generator = torch.Generator(values.device).manual_seed(training.seed * 65537 + index)
            initialise(parameter, values, shape.layers, generator)

        model = self.model
        degrees = spec.parallel.zero.degrees(world.size)
        self.zero = HybridZero(
            model,
            [model.embedding, *model.blocks, model.norm, model.head],
            ZeroLayout(world.size, *degrees),
            dtype=DTYPES[training.precision],
            device=world.device,
            initialise=fill,
            decays=decays,
        )
        self.optimizer = MasterAdamW(self.zero, training.optimizer)
        self.start = self.tokens = 0
        if checkpoint:
            world.together(lambda: self._restore(checkpoint))
        log.info(
            "training %s parameters on %d processes (%s), zero %s, %d tokens a step, attention: %s (%s)",
            f"{parameter_count(shape):,}",
            world.size,
            world.device.type,
            degrees,
            config.global_batch_tokens(spec, world.size),
            choice.name,
            choice.reason,
        )
        if world.rank == 0:
            self.telemetry: Telemetry | Silence = Telemetry(self.total, self.start, attempt, Reporter())
        else:
            self.telemetry = Silence()
        if checkpoint:
            log.info("resuming from step %d of %s", self.start, checkpoint.committed.uri)
            self.telemetry.saved(checkpoint.committed)

    def _prepare(self) -> None:
        if self.spec.data.prepare:
            with shown_progress() as progress:
                made = prepare(self.spec, progress)
            log.info(
                "%d training tokens in %s; their unigram entropy is %.3f nats",
                made.train.tokens,
                made.train.url,
                made.unigram_entropy,
            )

    def _row_settings(self) -> dict[str, Any]:
        """How rows are cut, the same for training and validation."""
        spec = self.spec
        return {
            "row_tokens": self.row_tokens,
            "seq_len": spec.model.seq_len,
            "packing": spec.data.packing,
            "seed": spec.training.seed,
            "vocab_size": config.model_shape(spec.model).vocab_size,
        }

    def _open_training_data(self) -> RowLoader:
        return RowLoader(self.spec.data.train, **self._row_settings())

    def _read_validation_rows(self) -> list[Row]:
        spec = self.spec
        if not spec.data.validation:
            return []
        return validation_rows(
            spec.data.validation,
            **self._row_settings(),
            count=spec.training.validation_rows,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _loss(self, row: Row) -> Tensor:
        """Sum of the losses of a row's tokens, in nats."""
        device = self.world.device
        lengths = tuple(int(n) for n in row.cu_seqlens[1:] - row.cu_seqlens[:-1])
        documents = Documents(
            torch.from_numpy(row.cu_seqlens).to(device, non_blocking=True),
            torch.from_numpy(row.positions).to(device, non_blocking=True),
            lengths,
        )
        logits = self.model(torch.from_numpy(row.tokens).to(device, non_blocking=True), documents)
        labels = torch.from_numpy(row.labels).to(device, non_blocking=True)
        return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")

    def train_step(self, step: int) -> tuple[bool, Tensor, Tensor]:
        """One optimizer step: (asked to stop, this rank's part of the mean loss, gradient norm)."""
        world, training = self.world, self.spec.training
        rows = self.loader.next_step(
            self.accumulation * world.size, range(world.rank, self.accumulation * world.size, world.size)
        )
        # The mean is over the tokens that carry loss in all rows of all ranks, so no layout changes it.
        labels, stop = world.count(sum(int((row.labels != -100).sum()) for row in rows))
        total = torch.zeros((), device=world.device)
        for index, row in enumerate(rows):
            self.zero.micro_batch(last=index == len(rows) - 1)
            loss = self._loss(row) / max(labels, 1)
            loss.backward()
            total += loss.detach()
        norm = self.zero.clip(training.optimizer.clip_grad_norm)
        self.optimizer.step(learning_rate(training, step, self.total))
        self.zero.publish()
        self.tokens += self.row_tokens * self.accumulation * world.size
        return stop, total, norm

    def measure(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Tell a step's values; a number that is none ends the job before it can reach a checkpoint."""
        dist.all_reduce(loss)
        values = torch.stack((loss, norm.to(loss.dtype))).tolist()
        if not all(math.isfinite(value) for value in values):
            raise StepFailed(
                f"loss {values[0]} and gradient norm {values[1]} at step {step}: lower training.optimizer.lr or "
                "lengthen training.schedule.warmupSteps; the last checkpoint is untouched"
            )
        rate = learning_rate(self.spec.training, step - 1, self.total)
        self.telemetry.measured(step, self.tokens, values[0], values[1], rate)

    @torch.no_grad()
    def validate(self) -> None:
        """Mean loss of the held-out tokens."""
        count = self.world.largest(len(self.held_out))
        if not count:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for index in range(count):
            # Ranks with fewer rows go along with the others' gathers of sharded parameters.
            row = self.held_out[index] if index < len(self.held_out) else _blank(self.row_tokens)
            sums[0] += self._loss(row)
            sums[1] += int((row.labels != -100).sum())
        dist.all_reduce(sums)
        loss, tokens = sums.tolist()
        self.telemetry.validated(loss / max(tokens, 1))

    def save(self, step: int, *, must_succeed: bool) -> None:
        """Save a checkpoint; a failing store is told, and fails the job only where nothing comes after."""
        if step == self.saved_step:
            return
        began, failures = time.monotonic(), []
        entry = committed = None
        first_copy = self.zero.layout.coordinates(self.world.rank)[3] == 0  # replicas hold the same
        try:
            if first_copy:
                entry = self.store.write_shard(step, self.world.rank, self._pieces())
        except SaveFailed as error:
            failures = [str(error)]
        entries = [found for found in self.world.gather(entry) if found]
        failures = self.world.agree(failures)
        if not failures and self.world.rank == 0:
            state = {"tokens": self.tokens, "loader": self.loader.state_dict()}
            try:
                committed = self.store.commit(step, entries, state, self.zero.shapes(), self.world.size)
            except SaveFailed as error:
                failures = [str(error)]
        failures = self.world.agree(failures)
        if failures:
            if self.world.rank == 0:
                self.store.abandon(step)
            if must_succeed:
                raise StepFailed(failures[0])
            log.error("%s; training goes on", failures[0])
        else:
            self.saved_step = step
        if committed:
            self.telemetry.saved(committed, time.monotonic() - began)

    def _pieces(self) -> Iterable[Piece]:
        for piece in self.optimizer.pieces():
            yield Piece(piece.kind, piece.parameter, piece.span.start, piece.span.stop, piece.values.cpu())

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this or any other layout."""
        pieces = list(self.optimizer.pieces())
        buffers = [
            piece.values if piece.values.device.type == "cpu" else piece.values.cpu() for piece in pieces
        ]
        checkpoint.load(
            [
                Want(piece.kind, piece.parameter, piece.span.start, piece.span.stop, buffer)
                for piece, buffer in zip(pieces, buffers, strict=True)
            ]
        )
        for piece, buffer in zip(pieces, buffers, strict=True):
            if buffer is not piece.values:
                piece.values.copy_(buffer)
        self.start, self.tokens = checkpoint.step, checkpoint.state["tokens"]
        if self.start > self.total:
            raise UserError(
                f"spec.training: asks for {self.total} steps, but {checkpoint.committed.uri} is further already: "
                "ask for more steps, or give another checkpoint.path"
            )
        self.loader.load_state_dict(checkpoint.state["loader"])
        self.optimizer.set_step(self.start)
        self.zero.publish()

    def show_completions(self) -> None:
        """Complete the spec's prompts; every rank takes part, since parameters may be sharded."""
        for prompt in self.spec.training.completions:
            ids = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
            words = complete(self.model, ids, stop=self.tokenizer.eos, context=self.spec.model.seq_len)
            log.info("the model completes %r with %r", prompt, self.tokenizer.decode(words))

    def close(self) -> None:
        self.loader.close()
        self.telemetry.close()


class Silence:
    """The telemetry of the ranks that say nothing."""

    def begin(self, tokens: int) -> None: ...
    def step(self, step: int) -> None: ...
    def measured(self, step: int, tokens: int, loss: float, grad_norm: float, lr: float) -> None: ...
    def validated(self, loss: float) -> None: ...
    def saved(self, committed: CommittedCheckpoint, seconds: float | None = None) -> None: ...
    def close(self) -> None: ...


def _blank(tokens: int) -> Row:
    """A row without any label."""
    return Row(
        tokens=np.zeros(tokens, np.int64),
        labels=np.full(tokens, -100, np.int64),
        cu_seqlens=np.array([0, tokens], np.int32),
        positions=np.arange(tokens),
        max_seqlen=tokens,
        source=0,
    )
