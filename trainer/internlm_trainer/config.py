"""The training part of a job's description.

One definition serves four readers: the CRD's OpenAPI schema, the command line's checks, the trainer's
configuration and the documentation.  `internlm_operator.api` wraps it with the Kubernetes part.  Nothing here
imports torch, so the operator can import it.

YAML is camelCase, Python is snake_case.  Numbers of tokens may carry a unit (`4Mi`, `200B`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "B": 10**9,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
QUANTITY_PATTERN = r"^([1-9][0-9]*(Ki|Mi|Gi|Ti)?|[0-9]+([.][0-9]{1,3})?(k|M|B|G|T))$"
MAX_QUANTITY_LENGTH = 16
QUANTITY_SENTENCE = (
    "must be a whole number of tokens of at least 1, or one with a unit: k, M, B, G, T (powers of 1000) or "
    "Ki, Mi, Gi, Ti (powers of 1024), such as 4Mi or 200B"
)


def parse_quantity(value: object) -> int:
    """Tokens as an integer: `4194304`, `"4Mi"` and `"1.5B"` are all accepted.

    Raises ValueError for anything else, with the sentence that the cluster gives too.
    """
    tokens = 0
    if isinstance(value, str) and len(value) > MAX_QUANTITY_LENGTH:
        raise ValueError(f"Too long: may not be more than {MAX_QUANTITY_LENGTH} bytes")
    if isinstance(value, int) and not isinstance(value, bool):
        tokens = value
    elif isinstance(value, str) and re.fullmatch(QUANTITY_PATTERN, value):
        number, unit = re.match(r"([0-9.]+)(.*)", value).groups()  # type: ignore[union-attr]
        whole, _, fraction = number.partition(".")
        tokens = int(whole + fraction) * UNITS[unit] // 10 ** len(fraction)
    if not 1 <= tokens < 2**63:
        raise ValueError(QUANTITY_SENTENCE)
    return tokens


Tokens = Annotated[
    int,
    BeforeValidator(parse_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": MAX_QUANTITY_LENGTH,
            "x-kubernetes-validations": [
                {
                    "rule": f"type(self) == int ? int(self) >= 1 : string(self).matches('{QUANTITY_PATTERN}') "
                    "&& quantity(string(self).replace('B', 'G')).isInteger() "
                    "&& quantity(string(self).replace('B', 'G')).isGreaterThan(quantity('0'))",
                    "message": QUANTITY_SENTENCE,
                }
            ],
        }
    ),
]


class Spec(BaseModel):
    """Base of every part of the description: camelCase, strict types, nothing unknown, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        """`field: null` is a field that was left out, as it is for the API server."""
        if not isinstance(value, dict):
            return value
        known = {field.alias for field in cls.model_fields.values()}
        return {name: item for name, item in value.items() if item is not None or name not in known}


class ModelSpec(Spec):
    """The model: a preset, or its shape. `seqLen` goes with either."""

    preset: Literal["internlm-7b", "internlm-20b"] | None = None
    """A released model's shape. Leave out layers, hiddenSize, heads, kvHeads, ffnSize and vocabSize with it."""
    layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Transformer blocks."""
    hidden_size: Annotated[int, Field(ge=8, le=131072)] | None = None
    """Width of the residual stream; a multiple of `heads`."""
    heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Attention heads."""
    kv_heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Key and value heads (grouped-query attention); a divisor of `heads`. Default: `heads`."""
    ffn_size: Annotated[int, Field(ge=8, le=1048576)] | None = None
    """Width of the SwiGLU feed-forward. Default: 8/3 of hiddenSize, rounded up to a multiple of 256."""
    vocab_size: Annotated[int, Field(ge=260, le=1048576)] | None = None
    """Words in the tokenizer's vocabulary; the tokenizer must have exactly as many."""
    seq_len: Annotated[int, Field(ge=2, le=1048576)] = 2048
    """Longest sequence that attention sees, in tokens."""
    norm_eps: Annotated[float, Field(gt=0, le=0.1)] = 1e-6
    """Epsilon of RMSNorm."""
    rope_base: Annotated[int, Field(ge=1, le=2**31 - 1)] = 10000
    """Base of the rotary position embedding."""
    attention_bias: bool = True
    """Bias on the q, k, v and output projections, as InternLM has it; InternLM2 has none."""


class SourceSpec(Spec):
    """A tokenized data set."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder or URL (any fsspec protocol) of `.bin` files with their `.bin.meta`, searched recursively, or one
    `.bin` file."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the rows drawn from this source, relative to the other sources' weights."""


class PrepareSpec(Spec):
    """Raw text to make the tokenizer and the tokenized data from, where they do not exist yet."""

    text: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=64)
    ]
    """Text files: paths or URLs with `*` and `**`. `${NAME}` stands for an environment variable;
    `${PYTHON_STDLIB}` is always known: the sources of the Python that runs the job."""
    exclude: Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=64)] = []
    """Files to leave out of `text`: patterns like those."""
    sample: Literal["file", "line"] = "file"
    """What one training sample is: a whole file, or a line of it."""
    validation_percent: Annotated[int, Field(ge=1, le=50)] = 2
    """Share of the samples held out for `data.validation`."""


class DataSpec(Spec):
    """What the model is trained on."""

    tokenizer: Annotated[str, Field(min_length=1, max_length=1024)]
    """SentencePiece model file (path or URL)."""
    prepare: PrepareSpec | None = None
    """Make the tokenizer, `train` and `validation` from raw text before training, if they are not there yet."""
    train: Annotated[list[SourceSpec], Field(min_length=1, max_length=256)]
    """Training sources, mixed by their weights."""
    validation: Annotated[list[SourceSpec], Field(max_length=64)] = []
    """Held-out sources; the loss on them is reported."""
    packing: Literal["documents", "contiguous"] = "documents"
    """`documents`: attention stays inside a document. `contiguous`: it sees the whole window of seqLen tokens."""


class OptimizerSpec(Spec):
    """AdamW with fp32 master weights."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Annotated[float, Field(gt=0, le=1)] = 4e-5
    """Peak learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0, le=0.1)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    clip_grad_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


class ScheduleSpec(Spec):
    """The learning rate over the steps: linear warm-up, then the named curve."""

    name: Literal["cosine", "constant"] = "cosine"
    """Curve after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps over which the learning rate rises linearly to its peak."""
    min_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step of the cosine."""


class TrainingSpec(Spec):
    """How long, in which batches and with which optimizer the model is trained."""

    steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Optimizer steps. Give this or `tokens`."""
    tokens: Tokens | None = None
    """Tokens to train on, rounded up to whole steps. Give this or `steps`."""
    global_batch_tokens: Tokens | None = None
    """Tokens of one optimizer step over all ranks; gradient accumulation follows from it. Default: one
    micro-batch a rank."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Sequences of seqLen tokens that a rank processes at once. Default 1, unless `microBatchTokens` is given."""
    micro_batch_tokens: Tokens | None = None
    """Tokens of one packed row, that is of a rank's micro-batch, where it is no multiple of seqLen; at least
    seqLen."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of parameters and activations. Master weights and optimizer states are fp32 always."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """The optimizer and its settings."""
    schedule: ScheduleSpec = ScheduleSpec()
    """The learning rate's schedule."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1024
    """Seed of initialisation and shuffling."""
    validate_every_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps between two evaluations on `data.validation`; 0: only after the last step."""
    validation_rows: Annotated[int, Field(ge=1, le=1048576)] = 64
    """Rows of `data.validation` that an evaluation looks at, at most."""
    log_every_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] = 10
    """Steps between two log lines."""
    completions: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=16)
    ] = []
    """Prompts that the trained model completes at the end, in the log."""


class ZeroSpec(Spec):
    """Hybrid ZeRO: over how many consecutive data-parallel ranks each kind of state is sharded.

    1: replicated on every rank; -1: over all of them. Each degree divides the next one, and the last divides the
    data-parallel size. ZeRO-1 inside nodes of 8 GPUs is (1, 1, 8); FSDP is (-1, -1, -1).
    """

    parameters: Annotated[int, Field(ge=-1, le=65536)] = 1
    """Ranks that share one copy of the parameters."""
    gradients: Annotated[int, Field(ge=-1, le=65536)] = 1
    """Ranks that share one copy of the accumulated gradients."""
    optimizer: Annotated[int, Field(ge=-1, le=65536)] = -1
    """Ranks that share one copy of the fp32 master weights and the optimizer's states."""

    def degrees(self, data_parallel_size: int) -> tuple[int, int, int]:
        """(p, g, o) with -1 replaced by the data-parallel size."""
        p, g, o = (
            data_parallel_size if degree == -1 else degree
            for degree in (self.parameters, self.gradients, self.optimizer)
        )
        return p, g, o


class ParallelSpec(Spec):
    """How the model's states are laid out over the processes."""

    zero: ZeroSpec = ZeroSpec()
    """Sharding of parameters, gradients and optimizer states."""


class CheckpointSpec(Spec):
    """Where and how often the state is saved. A job resumes from the newest checkpoint that verifies."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder or URL (any fsspec protocol) of this job's checkpoints; no two jobs may share one."""
    every_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] = 500
    """Steps between two checkpoints. The last step is always saved."""
    keep: Annotated[int, Field(ge=1, le=10000)] = 3
    """Newest checkpoints to keep."""


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


class ModelShape(NamedTuple):
    """A model's shape with every default filled in."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_base: int
    attention_bias: bool


# (layers, hidden size, heads, feed-forward, vocabulary) of InternLM's 2023 releases.
PRESETS = {
    "internlm-7b": (32, 4096, 32, 11008, 103168),
    "internlm-20b": (60, 5120, 40, 13824, 103168),
}


def model_shape(spec: ModelSpec) -> ModelShape:
    """The shape that a valid `spec` describes."""
    if spec.preset:
        layers, hidden, heads, ffn, vocab = PRESETS[spec.preset]
        kv_heads = heads
    else:
        assert spec.layers
        assert spec.hidden_size
        assert spec.heads
        assert spec.vocab_size
        layers, hidden, heads, vocab = spec.layers, spec.hidden_size, spec.heads, spec.vocab_size
        kv_heads = spec.kv_heads or heads
        ffn = spec.ffn_size or -(-hidden * 8 // (3 * 256)) * 256
    return ModelShape(
        layers, hidden, heads, kv_heads, ffn, vocab, spec.norm_eps, spec.rope_base, spec.attention_bias
    )


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


def total_steps(spec: TrainSpec, world_size: int) -> int:
    """Optimizer steps of the whole job."""
    training = spec.training
    if training.steps:
        return training.steps
    assert training.tokens
    return -(-training.tokens // global_batch_tokens(spec, world_size))
