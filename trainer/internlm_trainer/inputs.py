"""What a job reads before its first step: tokenizer and data.  Whatever the user may have got wrong about
them is found here, the cheap checks before the long work, and told alike on all ranks."""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

from pydantic.alias_generators import to_camel

from internlm_trainer import config
from internlm_trainer.checkpoint import BadCheckpoint, CheckpointStore, check_store, claim_store
from internlm_trainer.config import TrainSpec
from internlm_trainer.data.loader import RowLoader, validation_rows
from internlm_trainer.data.packing import Row
from internlm_trainer.data.prepare import prepare
from internlm_trainer.data.progress import shown_progress
from internlm_trainer.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.processes import Processes
from internlm_trainer.telemetry.heartbeat import Heartbeat
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import Weights

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """A job's inputs, open and checked."""

    tokenizer: Tokenizer
    loader: RowLoader
    held_out: list[Row]
    """This rank's part of the validation rows."""
    initial: Weights | None
    """What `model.init` names, for a job that has no checkpoint yet."""


def open_store(name: str, spec: TrainSpec) -> CheckpointStore:
    """Where the job `name` saves."""
    asked = spec.checkpoint
    return CheckpointStore(
        asked.path,
        config.model_shape(spec.model)._asdict(),
        asked.keep,
        name,
        patience=asked.retry_seconds,
        keep_every=asked.keep_every_steps,
        verify=asked.verify,
    )


def open_inputs(spec: TrainSpec, store: CheckpointStore, world: Processes, attempt: int) -> Inputs:
    """Raises UserError, alike on all ranks."""
    _check_skipped(spec, config.total_steps(spec, world.size))
    check_store(store, world)
    claim_store(store, world, os.environ.get("INTERNLM_JOB_UID", ""), attempt)
    initial = world.together(
        lambda: initial_weights(spec) if spec.model.init and not store.candidates() else None
    )
    heartbeat = Heartbeat(world.rank)
    heartbeat.beat("prepare", 0)
    world.first(lambda: _prepare(spec))
    heartbeat.beat("setup", 0)
    tokenizer = world.together(lambda: load_tokenizer(spec.data.tokenizer))
    vocab_size = config.model_shape(spec.model).vocab_size
    world.together(lambda: check_vocabulary(tokenizer, vocab_size, spec.data.tokenizer))
    loader = world.together(
        lambda: RowLoader(spec.data.train, **row_settings(spec), min_length=spec.data.min_length)
    )
    held_out = world.together(lambda: _validation_rows(spec, world))
    return Inputs(tokenizer, loader, held_out, initial)


def _check_skipped(spec: TrainSpec, total_steps: int) -> None:
    """A job ends with a step that was trained."""
    for index, steps in enumerate(spec.data.skip_steps):
        if config.step_range(steps)[1] >= total_steps:
            raise UserError(
                f"data.skipSteps[{index}]: {steps} includes the last step, {total_steps}; end before it, or ask for "
                "more steps"
            )


def initial_weights(spec: TrainSpec) -> Weights:
    """What `model.init` names.  Only headers are read here, so that what does not fit is found before the data is
    prepared.  Raises UserError."""
    assert spec.model.init
    what, ours = "model.init.from", config.model_shape(spec.model)
    try:
        weights = open_weights(spec.model.init.source, what, ours)
    except BadCheckpoint as error:
        raise UserError(f"{what}: {error}") from error
    theirs, mine = weights.shape._asdict(), ours._asdict()
    different = [
        f"{to_camel(field)} is {theirs[field]} there and {mine[field]} here"
        for field in mine
        if theirs[field] != mine[field]
    ]
    if different:
        raise UserError(
            f"{what}: {weights.url} holds another model: {', '.join(different)}; describe that one in spec.model, or "
            "give weights of this one"
        )
    return weights


def _prepare(spec: TrainSpec) -> None:
    if spec.data.prepare:
        with shown_progress() as progress:
            made = prepare(spec, progress)
        log.info(
            "%d training tokens in %s; their unigram entropy is %.3f nats",
            made.train.tokens,
            made.train.url,
            made.unigram_entropy,
        )


def row_settings(spec: TrainSpec) -> dict[str, Any]:
    """How rows are cut, the same for training and validation."""
    return {
        "row_tokens": config.row_tokens(spec),
        "seq_len": spec.model.seq_len,
        "packing": spec.data.packing,
        "seed": spec.training.seed,
        "vocab_size": config.model_shape(spec.model).vocab_size,
        "cache": spec.data.cache,
    }


def _validation_rows(spec: TrainSpec, world: Processes) -> list[Row]:
    if not spec.data.validation:
        return []
    return validation_rows(
        spec.data.validation,
        **row_settings(spec),
        count=spec.training.validation_rows,
        rank=world.rank,
        world_size=world.size,
    )
