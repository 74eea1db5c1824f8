"""`spec.model`: the model's shape."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from internlm_trainer.config.base import Spec


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
