"""`spec.model`: the model's shape."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from internlm_trainer.config.base import Spec

LOSS_CHUNK = 8192
"""Tokens whose logits exist at a time on GPUs: enough for matrix products at full speed, 1.6 GiB of InternLM's logits.
"""


class InitSpec(Spec):
    """The weights that training starts from."""

    source: Annotated[str, Field(alias="from", min_length=1, max_length=1024)]
    """Folder (path or URL) of weights of this shape, in Hugging Face's format or InternLM's, or of checkpoints. Read
    before the first step alone; a job that has a checkpoint goes on from that."""


Preset = Literal[
    "internlm-7b",
    "internlm-20b",
    "internlm2-1.8b",
    "internlm2-7b",
    "internlm2-20b",
    "internlm3-8b",
]


class ModelSpec(Spec):
    """The model: a preset, or its shape. `seqLen` and `init` go with either."""

    preset: Preset | None = None
    """A released model's shape. Leave out layers, hiddenSize, heads, kvHeads, ffnSize and vocabSize with it."""
    init: InitSpec | None = None
    """Weights to start from. Default: random ones, by `training.seed`."""
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
    norm_eps: Annotated[float, Field(gt=0, le=0.1)] | None = None
    """Epsilon of RMSNorm. Default: the preset's, or 1e-6."""
    rope_base: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Base of the rotary position embedding. Default: the preset's, or 10000."""
    attention_bias: bool | None = None
    """Bias on the q, k, v and output projections, as InternLM has it; InternLM2 has none. Default: the preset's, or
    true."""


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


# As released; the 1.8B, 7B and 20B of InternLM2.5 have the shapes of InternLM2.
PRESETS = {
    "internlm-7b": ModelShape(32, 4096, 32, 32, 11008, 103168, 1e-6, 10000, True),
    "internlm-20b": ModelShape(60, 5120, 40, 40, 13824, 103168, 1e-6, 10000, False),
    "internlm2-1.8b": ModelShape(24, 2048, 16, 8, 8192, 92544, 1e-5, 1_000_000, False),
    "internlm2-7b": ModelShape(32, 4096, 32, 8, 14336, 92544, 1e-5, 1_000_000, False),
    "internlm2-20b": ModelShape(48, 6144, 48, 8, 16384, 92544, 1e-5, 1_000_000, False),
    "internlm3-8b": ModelShape(48, 4096, 32, 2, 10240, 128512, 1e-5, 50_000_000, False),
}


def model_shape(spec: ModelSpec) -> ModelShape:
    """The shape that a valid `spec` describes."""
    if spec.preset:
        shape = PRESETS[spec.preset]
    else:
        assert spec.layers
        assert spec.hidden_size
        assert spec.heads
        assert spec.vocab_size
        ffn = spec.ffn_size or -(-spec.hidden_size * 8 // (3 * 256)) * 256
        kv_heads = spec.kv_heads or spec.heads
        shape = ModelShape(
            spec.layers, spec.hidden_size, spec.heads, kv_heads, ffn, spec.vocab_size, 1e-6, 10000, True
        )
    given = {name: getattr(spec, name) for name in ("norm_eps", "rope_base", "attention_bias")}
    return shape._replace(**{name: value for name, value in given.items() if value is not None})
