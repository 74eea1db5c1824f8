"""The training part of a job's description.

One definition serves four readers: the CRD's OpenAPI schema, the command line's checks, the trainer's
configuration and the documentation.  `internlm_operator.api` wraps it with the Kubernetes part.  Nothing here
imports torch, so the operator can import it.

YAML is camelCase, Python is snake_case.  Numbers of tokens may carry a unit (`4Mi`, `200B`).
"""

from __future__ import annotations

from internlm_trainer.config.base import Spec, parse_quantity
from internlm_trainer.config.checkpoint import CheckpointSpec
from internlm_trainer.config.data import (
    CacheSpec,
    DataSpec,
    PrepareSpec,
    SourceSpec,
    skipped_after,
    step_range,
)
from internlm_trainer.config.evaluation import EvaluationSpec, is_due
from internlm_trainer.config.model import LOSS_CHUNK, InitSpec, ModelShape, ModelSpec, model_shape
from internlm_trainer.config.parallel import ParallelSpec, ZeroSpec
from internlm_trainer.config.telemetry import METRICS_PORT, TelemetrySpec
from internlm_trainer.config.training import (
    BatchRampUpSpec,
    Float8Spec,
    LossScaleSpec,
    OptimizerSpec,
    ScheduleSpec,
    SkipSpec,
    TrainingSpec,
)

__all__ = [
    "LOSS_CHUNK",
    "METRICS_PORT",
    "BatchRampUpSpec",
    "CacheSpec",
    "CheckpointSpec",
    "DataSpec",
    "EvaluationSpec",
    "Float8Spec",
    "InitSpec",
    "LossScaleSpec",
    "ModelShape",
    "ModelSpec",
    "OptimizerSpec",
    "ParallelSpec",
    "PrepareSpec",
    "ScheduleSpec",
    "SkipSpec",
    "SourceSpec",
    "Spec",
    "TelemetrySpec",
    "TrainSpec",
    "TrainingSpec",
    "ZeroSpec",
    "batch_tokens",
    "global_batch_tokens",
    "gradient_accumulation",
    "is_due",
    "model_shape",
    "parse_quantity",
    "row_tokens",
    "skipped_after",
    "step_range",
    "total_steps",
]


class TrainSpec(Spec):
    """Everything that the trainer needs to know."""

    model: ModelSpec
    """The model to train."""
    data: DataSpec
    """What it is trained on."""
    training: TrainingSpec
    """How long and in which batches."""
    parallel: ParallelSpec = ParallelSpec()
    """How its states are laid out."""
    checkpoint: CheckpointSpec
    """Where its state is saved."""
    evaluation: EvaluationSpec | None = None
    """What checkpoints are evaluated on, while training goes on."""
    telemetry: TelemetrySpec = TelemetrySpec()
    """Where its numbers go, and what it leaves for those who look into it."""


def row_tokens(spec: TrainSpec) -> int:
    """Tokens of one packed row: what one rank processes in one micro-batch."""
    training = spec.training
    return training.micro_batch_tokens or (training.micro_batch_size or 1) * spec.model.seq_len


def global_batch_tokens(spec: TrainSpec, world_size: int) -> int:
    """Tokens of one optimizer step."""
    return spec.training.global_batch_tokens or row_tokens(spec) * world_size


def gradient_accumulation(spec: TrainSpec, world_size: int) -> int:
    """Micro-batches of one rank in one optimizer step."""
    return global_batch_tokens(spec, world_size) // (row_tokens(spec) * world_size)


def batch_tokens(spec: TrainSpec, world_size: int, consumed: int) -> int:
    """Tokens of the step before which the job has trained on `consumed` tokens."""
    full, ramp = global_batch_tokens(spec, world_size), spec.training.batch_ramp_up
    if ramp is None:
        return full
    increments = (full - ramp.start_tokens) // ramp.increment_tokens
    return min(full, ramp.start_tokens + consumed * increments // ramp.over_tokens * ramp.increment_tokens)


def total_steps(spec: TrainSpec, world_size: int) -> int:
    """Optimizer steps of the whole job."""
    training, full = spec.training, global_batch_tokens(spec, world_size)
    if training.steps:
        return training.steps
    assert training.tokens
    steps = consumed = 0
    if ramp := training.batch_ramp_up:
        increments = (full - ramp.start_tokens) // ramp.increment_tokens
        for grown in range(increments):
            end = min(-(-(grown + 1) * ramp.over_tokens // increments), training.tokens)
            size = ramp.start_tokens + grown * ramp.increment_tokens
            more = max(0, -((consumed - end) // size))
            steps, consumed = steps + more, consumed + more * size
    return steps + max(0, -((consumed - training.tokens) // full))
