"""Floating-point operations of a training step, and the peak of a card.  Pure.

A matrix product of a parameter with a token's activation is one multiplication and one addition forward, and
twice that backward: 6 operations a parameter and token.  Attention's two products cost 4 operations a pair of
positions and hidden number forward, 12 in all.  Recomputation is never counted: it is no progress.

Two definitions differ in the pairs.  *Full*: every token is paired with all `seqLen` positions, as InternLM, PaLM
(arXiv:2204.02311, appendix B) and Megatron count; it makes numbers comparable.  *Causal*: the pairs that the mask
leaves, positions of the same document up to the token itself; that is the work that there is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internlm_trainer.config import ModelShape

# bf16 without sparsity, in TFLOPS, by a part of the name that CUDA gives the card; the first that fits counts.
# From NVIDIA's data sheets; cards for workstations with fp32 accumulation.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that every token is multiplied with: all matrices but the embedding, which is looked up."""
    head_dim = shape.hidden_size // shape.heads
    projections = shape.hidden_size * head_dim * 2 * (shape.heads + shape.kv_heads)  # q and out; k and v
    block = projections + 3 * shape.hidden_size * shape.ffn_size
    return shape.layers * block + shape.vocab_size * shape.hidden_size


def full_flops(shape: ModelShape, tokens: int, seq_len: int) -> float:
    """Model FLOPs of `tokens` tokens, each paired with `seq_len` positions: InternLM's definition."""
    return _flops(shape, tokens, tokens * seq_len)


def causal_flops(shape: ModelShape, tokens: int, pairs: int) -> float:
    """Model FLOPs of `tokens` tokens with `pairs` pairs of positions, from `causal_pairs`: what is to be computed."""
    return _flops(shape, tokens, pairs)


def causal_pairs(cu_seqlens: NDArray[np.int32]) -> int:
    """Pairs of a token and a position of its sequence up to itself; `cu_seqlens` [sequences + 1]."""
    bounds = cu_seqlens.astype(np.int64)
    lengths = bounds[1:] - bounds[:-1]
    return int((lengths * (lengths + 1) // 2).sum())


def peak_flops(card: str) -> float | None:
    """FLOPs a second that the card of this name can do in bf16; None for one that is not known."""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS if part.lower() in card.lower()), None)


def _flops(shape: ModelShape, tokens: int, pairs: int) -> float:
    return 6.0 * matmul_parameters(shape) * tokens + 12.0 * shape.layers * shape.hidden_size * pairs
