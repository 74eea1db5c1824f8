"""What every optimizer of sharded master weights is made of: parts of a rank's shard, and states beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from internlm_trainer.parallel.bucket import Bucket
from internlm_trainer.parallel.layout import Span


class StatePiece(NamedTuple):
    """This rank's part of one parameter's master weight or optimizer state."""

    kind: str
    parameter: str
    span: Span
    """Elements of the flattened parameter."""
    values: Tensor
    """A 1-dim view of the live state, where it lives: master weights are fp32, states may be bf16."""


class Part:
    """A run of elements of this rank's shard of a bucket that one rule updates, with its states.

    span: in elements of the bucket.  kinds: names of the states, each as large as the part.
    """

    def __init__(self, bucket: Bucket, span: Span, kinds: Sequence[str], dtype: torch.dtype) -> None:
        self.bucket, self.span = bucket, span
        start = span.start - bucket.optimizer_span.start
        self._own = slice(start, start + span.size)
        self.states = {
            kind: torch.zeros(span.size, dtype=dtype, device=bucket.master.device) for kind in kinds
        }

    @property
    def weight(self) -> Tensor:
        """fp32 view of the master weights."""
        return self.bucket.master[self._own]

    @property
    def gradient(self) -> Tensor:
        """fp32 view of the reduced gradient."""
        return self.bucket.master_grad[self._own]

    @property
    def rounded(self) -> Tensor:
        """The weights in the model's type, where they are gathered from."""
        return self.bucket.own[self._own]

    def pieces(self) -> Iterator[StatePiece]:
        for entry, met in self.bucket.layout.pieces(self.span):
            inside = Span(met.start - entry.span.start, met.stop - entry.span.start)
            own = slice(met.start - self.span.start, met.stop - self.span.start)
            for kind, values in {"master": self.weight, **self.states}.items():
                yield StatePiece(kind, entry.name, inside, values[own])
