"""The model's units (embedding, blocks, norm, head) as Hybrid ZeRO's buckets have them: their sizes alone."""

from __future__ import annotations

from typing import NamedTuple

from internlm_trainer.config import ModelShape
from internlm_trainer.parallel.layout import ALIGNMENT


class Unit(NamedTuple):
    """A part of the model that is gathered, computed and reduced as a whole, and how often there is one like it."""

    name: str
    copies: int
    parameters: int
    other: int = 0
    """Of them norms and biases."""

    def padded(self, optimizer: int) -> int:
        """Elements of the unit's bucket with optimizer states over so many ranks."""
        multiple = ALIGNMENT * optimizer
        return -(-self.parameters // multiple) * multiple


class Units(NamedTuple):
    """In the order of the forward pass."""

    embedding: Unit
    block: Unit
    norm: Unit
    head: Unit


def model_units(shape: ModelShape) -> Units:
    """The units of a model of this shape."""
    hidden, ffn = shape.hidden_size, shape.ffn_size
    qkv = qkv_width(shape)
    matrices = (qkv + hidden) * hidden + 3 * hidden * ffn
    other = 2 * hidden + (qkv + hidden if shape.attention_bias else 0)
    return Units(
        Unit("embedding", 1, shape.vocab_size * hidden),
        Unit("block", shape.layers, matrices + other, other),
        Unit("norm", 1, hidden, hidden),
        Unit("head", 1, shape.vocab_size * hidden),
    )


def qkv_width(shape: ModelShape) -> int:
    """Numbers of a token's query, key and value heads."""
    return shape.hidden_size // shape.heads * (shape.heads + 2 * shape.kv_heads)
