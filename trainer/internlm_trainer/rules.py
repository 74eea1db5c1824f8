"""Rules over several fields of a job, stated once for the cluster (CEL) and once for Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from internlm_trainer.config import TrainSpec, global_batch_tokens, row_tokens


def cel_quantity(path: str) -> str:
    """A CEL expression for the integer that `parse_quantity` gives for the field at `path`.

    Kubernetes' own quantity library knows every unit but B, which is its G.
    """
    return f"(type({path}) == int ? int({path}) : quantity(string({path}).replace('B', 'G')).asInteger())"


class Rule(NamedTuple):
    """A rule over several fields, stated once for the cluster (CEL) and once for Python; a test holds the two
    against each other on a real API server.

    `holds` takes the spec and the number of processes; `cel` is evaluated with `self` as the job's `spec`.
    """

    path: str
    message: str
    cel: str
    holds: Callable[[Any, int], bool]


_SHAPE_FIELDS = ("layers", "hiddenSize", "heads", "vocabSize")
_OPTIONAL_SHAPE_FIELDS = ("kvHeads", "ffnSize")
_ZERO = "self.parallel.zero"
CEL_WORLD_SIZE = "(self.nodes * (self.gpusPerNode > 0 ? self.gpusPerNode : self.processesPerNode))"
_CEL_ROW = (
    f"(has(self.training.microBatchTokens) ? {cel_quantity('self.training.microBatchTokens')} : "
    "(has(self.training.microBatchSize) ? self.training.microBatchSize : 1) * self.model.seqLen)"
)


_RAMP = "self.training.batchRampUp"
_CEL_AT_ONCE = f"{_CEL_ROW} * {CEL_WORLD_SIZE}"
_CEL_BATCH = cel_quantity("self.training.globalBatchTokens")
_CEL_FULL_BATCH = f"(has(self.training.globalBatchTokens) ? {_CEL_BATCH} : {_CEL_AT_ONCE})"
_CEL_START, _CEL_INCREMENT = cel_quantity(f"{_RAMP}.startTokens"), cel_quantity(f"{_RAMP}.incrementTokens")


def _cel_divides(small: str, large: str) -> str:
    return f"({small} > 0 && {large} % ({small}) == 0)"


def _cel_degree(name: str) -> str:
    return f"({_ZERO}.{name} == -1 ? {CEL_WORLD_SIZE} : {_ZERO}.{name})"


def _preset_or_shape(spec: TrainSpec, _: int) -> bool:
    model = spec.model
    shape = (model.layers, model.hidden_size, model.heads, model.vocab_size)
    if model.preset:
        return not any((*shape, model.kv_heads, model.ffn_size))
    return all(shape)


def _ramp_starts(spec: TrainSpec, world_size: int) -> bool:
    ramp = spec.training.batch_ramp_up
    return ramp is None or (
        ramp.start_tokens % (row_tokens(spec) * world_size) == 0
        and ramp.start_tokens < global_batch_tokens(spec, world_size)
    )


def _ramp_arrives(spec: TrainSpec, world_size: int) -> bool:
    ramp = spec.training.batch_ramp_up
    return ramp is None or (
        ramp.increment_tokens % (row_tokens(spec) * world_size) == 0
        and (global_batch_tokens(spec, world_size) - ramp.start_tokens) % ramp.increment_tokens == 0
    )


def _multiplied(spec: TrainSpec) -> list[int]:
    model = spec.model
    of_a_head = model.hidden_size // model.heads if model.hidden_size and model.heads else 0
    return [row_tokens(spec), model.ffn_size or 0, of_a_head]


def _divides(small: int, large: int) -> bool:
    return small > 0 and large % small == 0


TRAINING_RULES: tuple[Rule, ...] = (
    Rule(
        "model",
        "give either preset, or layers, hiddenSize, heads and vocabSize (with kvHeads and ffnSize if they are not "
        "the default), not both",
        "has(self.model.preset) ? "
        + " && ".join(f"!has(self.model.{f})" for f in _SHAPE_FIELDS + _OPTIONAL_SHAPE_FIELDS)
        + " : "
        + " && ".join(f"has(self.model.{f})" for f in _SHAPE_FIELDS),
        _preset_or_shape,
    ),
    Rule(
        "model.hiddenSize",
        "must be an even multiple of heads: rotary embedding turns pairs of each head's hiddenSize / heads numbers",
        "!has(self.model.hiddenSize) || !has(self.model.heads) || "
        + _cel_divides("2 * self.model.heads", "self.model.hiddenSize"),
        lambda s, _: (
            not (s.model.hidden_size and s.model.heads) or s.model.hidden_size % (2 * s.model.heads) == 0
        ),
    ),
    Rule(
        "model.kvHeads",
        "must divide heads, so that equally many query heads share each key and value head",
        "!has(self.model.kvHeads) || !has(self.model.heads) || "
        + _cel_divides("self.model.kvHeads", "self.model.heads"),
        lambda s, _: not (s.model.kv_heads and s.model.heads) or s.model.heads % s.model.kv_heads == 0,
    ),
    Rule(
        "data.prepare",
        "writes one training folder and at most one validation folder: give exactly one data.train and no more "
        "than one data.validation with it",
        "!has(self.data.prepare) || (self.data.train.size() == 1 && "
        "(!has(self.data.validation) || self.data.validation.size() <= 1))",
        lambda s, _: s.data.prepare is None or (len(s.data.train) == 1 and len(s.data.validation) <= 1),
    ),
    Rule(
        "training",
        "give exactly one of steps and tokens",
        "has(self.training.steps) != has(self.training.tokens)",
        lambda s, _: (s.training.steps is None) != (s.training.tokens is None),
    ),
    Rule(
        "training.microBatchSize",
        "give microBatchSize (sequences) or microBatchTokens, not both",
        "!has(self.training.microBatchSize) || !has(self.training.microBatchTokens)",
        lambda s, _: s.training.micro_batch_size is None or s.training.micro_batch_tokens is None,
    ),
    Rule(
        "training.microBatchTokens",
        "a row must hold at least one whole sequence: make it model.seqLen or more, or model.seqLen smaller",
        "!has(self.training.microBatchTokens) || "
        f"{cel_quantity('self.training.microBatchTokens')} >= self.model.seqLen",
        lambda s, _: (
            s.training.micro_batch_tokens is None or s.training.micro_batch_tokens >= s.model.seq_len
        ),
    ),
    Rule(
        "training.globalBatchTokens",
        "must be a multiple of the tokens that all processes handle at once: microBatchSize x model.seqLen (or "
        "microBatchTokens) x nodes x processes of a node",
        "!has(self.training.globalBatchTokens) || "
        + _cel_divides(f"{_CEL_ROW} * {CEL_WORLD_SIZE}", cel_quantity("self.training.globalBatchTokens")),
        lambda s, n: (
            s.training.global_batch_tokens is None
            or s.training.global_batch_tokens % (row_tokens(s) * n) == 0
        ),
    ),
    Rule(
        "training.batchRampUp.startTokens",
        "must be less than training.globalBatchTokens, and a multiple of the tokens that all processes handle at once",
        f"!has({_RAMP}) || ({_cel_divides(_CEL_AT_ONCE, _CEL_START)} && {_CEL_START} < {_CEL_FULL_BATCH})",
        _ramp_starts,
    ),
    Rule(
        "training.batchRampUp.incrementTokens",
        "must be a multiple of the tokens that all processes handle at once, and lead from startTokens to "
        "training.globalBatchTokens in whole increments",
        f"!has({_RAMP}) || ({_cel_divides(_CEL_AT_ONCE, _CEL_INCREMENT)} && "
        f"({_CEL_FULL_BATCH} - {_CEL_START}) % {_CEL_INCREMENT} == 0)",
        _ramp_arrives,
    ),
    Rule(
        "training.optimizer.stateType",
        "bf16 needs a betas[1] of at most 0.99 and no beta2Exponent: it has 8 bits, and a second moment that moves "
        "by less at a time would stand still",
        "self.training.optimizer.stateType != 'bf16' || "
        "(self.training.optimizer.betas[1] <= 0.99 && self.training.optimizer.beta2Exponent == 0.0)",
        lambda s, _: (
            s.training.optimizer.state_type != "bf16"
            or (s.training.optimizer.betas[1] <= 0.99 and s.training.optimizer.beta2_exponent == 0)
        ),
    ),
    Rule(
        "training.precision",
        "fp8 multiplies blocks of 16 numbers: model.ffnSize, model.hiddenSize / model.heads and the tokens of a row "
        "(microBatchSize x model.seqLen, or microBatchTokens) must be multiples of 16",
        "self.training.precision != 'fp8' || "
        f"({_CEL_ROW} % 16 == 0 && (!has(self.model.ffnSize) || self.model.ffnSize % 16 == 0) && "
        "(!has(self.model.hiddenSize) || !has(self.model.heads) || "
        "self.model.hiddenSize / self.model.heads % 16 == 0))",
        lambda s, _: s.training.precision != "fp8" or not any(size % 16 for size in _multiplied(s)),
    ),
    Rule(
        "training.precision",
        "fp8 keeps copies of all weights on every GPU, which sharded parameters are to save: set "
        "parallel.zero.parameters to 1",
        f"self.training.precision != 'fp8' || {_cel_degree('parameters')} == 1",
        lambda s, n: s.training.precision != "fp8" or s.parallel.zero.degrees(n)[0] == 1,
    ),
    Rule(
        "training.schedule.warmupSteps",
        "must not exceed training.steps",
        "!has(self.training.steps) || self.training.schedule.warmupSteps <= self.training.steps",
        lambda s, _: s.training.steps is None or s.training.schedule.warmup_steps <= s.training.steps,
    ),
    Rule(
        "training.schedule.minLr",
        "must not exceed training.optimizer.lr",
        "self.training.schedule.minLr <= self.training.optimizer.lr",
        lambda s, _: s.training.schedule.min_lr <= s.training.optimizer.lr,
    ),
    Rule(
        "evaluation",
        "give tasks, text, or both",
        "!has(self.evaluation) || self.evaluation.tasks.size() + self.evaluation.text.size() > 0",
        lambda s, _: s.evaluation is None or bool(s.evaluation.tasks or s.evaluation.text),
    ),
    Rule(
        "evaluation.data",
        "must be given with tasks: the folder that has one folder a task",
        "!has(self.evaluation) || self.evaluation.tasks.size() == 0 || has(self.evaluation.data)",
        lambda s, _: s.evaluation is None or not s.evaluation.tasks or s.evaluation.data is not None,
    ),
    Rule(
        "parallel.zero.optimizer",
        "must divide the number of data-parallel ranks (nodes x processes of a node): use one of its divisors, or "
        "-1 for all of them",
        f"{_ZERO}.optimizer == -1 || {_cel_divides(f'{_ZERO}.optimizer', CEL_WORLD_SIZE)}",
        lambda s, n: _divides(s.parallel.zero.degrees(n)[2], n),
    ),
    Rule(
        "parallel.zero.gradients",
        "must divide parallel.zero.optimizer: gradients are sharded at most as widely as optimizer states (-1 "
        "means all ranks)",
        _cel_divides(_cel_degree("gradients"), _cel_degree("optimizer")),
        lambda s, n: _divides(s.parallel.zero.degrees(n)[1], s.parallel.zero.degrees(n)[2]),
    ),
    Rule(
        "parallel.zero.parameters",
        "must divide parallel.zero.gradients: parameters are sharded at most as widely as gradients (-1 means all "
        "ranks)",
        _cel_divides(_cel_degree("parameters"), _cel_degree("gradients")),
        lambda s, n: _divides(s.parallel.zero.degrees(n)[0], s.parallel.zero.degrees(n)[1]),
    ),
)


def broken_rules(spec: TrainSpec, world_size: int, rules: tuple[Rule, ...] = TRAINING_RULES) -> list[Rule]:
    """The rules that `spec` breaks on `world_size` processes; empty for a job that can run."""
    return [rule for rule in rules if not rule.holds(spec, world_size)]
