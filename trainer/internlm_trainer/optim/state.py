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

    def pieces(self) -> Iterator[StatePiece]:
        for entry, met in self.bucket.layout.pieces(self.span):
            inside = Span(met.start - entry.span.start, met.stop - entry.span.start)
            own = slice(met.start - self.span.start, met.stop - self.span.start)
            for kind, values in {"master": self.weight, **self.states}.items():
                yield StatePiece(kind, entry.name, inside, values[own])


def store(state: Tensor, values: Tensor, first: int, seed: int) -> None:
    """Write fp32 `values` to a state, bf16 ones by stochastic rounding.

    A second moment that decays by less than half of bf16's last place, 0.2%, would stand still for ever if it were
    rounded to the nearest; rounded up or down at random it moves as it should on average.  The randomness is a hash
    of `seed` and each element's place from `first` on, so that neither the layout nor an interruption changes it.
    What is a bf16 number already stays what it is.
    """
    if state.dtype == torch.bfloat16:
        noise = torch.arange(first, first + values.numel(), dtype=torch.int32, device=values.device)
        # Mixing by Chris Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/; products wrap around.
        noise.mul_(-1640531527).add_(_int32(seed * 0x85EBCA6B))
        for shift, factor in ((16, 0x7FEB352D), (15, -2073319797)):
            noise.bitwise_xor_((noise >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
        noise.bitwise_xor_(noise >> 16).bitwise_and_(0xFFFF)
        values = (values.view(torch.int32) + noise).bitwise_and_(-0x10000).view(torch.float32)
    state.copy_(values)


def _int32(number: int) -> int:
    """The number modulo 2^32, as a signed one."""
    return (number + 2**31) % 2**32 - 2**31
