"""Muon for hidden matrices: momentum, orthogonalised, on optimizer shards.

Keller Jordan, https://kellerjordan.github.io/posts/muon/; the size of an update and its weight decay, and momentum
that stays sharded while whole matrices are gathered for the iteration, follow Liu et al., Muon is Scalable for LLM
Training, arXiv:2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.optim.state import Part
from internlm_trainer.parallel.bucket import Bucket
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import Span

KINDS = ("momentum",)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen by Jordan for the steepest slope at 0."""
ITERATIONS = 5
ADAMW_RMS = 0.2
"""Root mean square of an AdamW update's elements, by Liu et al.; it lets both rules share a learning rate."""

Rows = Callable[[str], tuple[int, ...]]
"""Rows of each of the matrices that lie below one another in a parameter; none where Muon is not for it."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """`U V^T`, roughly, of a matrix's singular value decomposition `U S V^T`, by the Newton-Schulz iteration.

    The singular values of the result are between 0.7 and 1.2, which trains as well as 1.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon:
    """Updates, of each bucket with matrices, this rank's part of them.

    Every rank of a group that shares a copy of the states calls `step` alike, since it gathers their momentum.  Each
    then orthogonalises the matrices that meet its own shard: so the work is divided, but for those cut by a border.
    """

    def __init__(self, zero: HybridZero, rows: Rows, spec: OptimizerSpec, dtype: torch.dtype) -> None:
        self.zero, self.spec = zero, spec
        self.buckets: list[tuple[Bucket, Part | None, list[tuple[Span, int]]]] = []
        for bucket in zero.buckets:
            if matrices := list(_matrices(bucket, rows)):
                assert Span(matrices[0][0].start, matrices[-1][0].stop) == bucket.layout.decayed
                span = bucket.optimizer_span.meet(bucket.layout.decayed)
                part = Part(bucket, span, KINDS, dtype) if span else None
                self.buckets.append((bucket, part, matrices))
        self.parts = [part for _, part, _ in self.buckets if part]

    def step(self, lr: float, skip: Tensor) -> None:
        """One update, unless `skip` (0-dim bool on the device)."""
        for bucket, part, matrices in self.buckets:
            # fp32 jobs iterate in fp32, others in bf16, whose range holds any momentum.
            dtype = torch.float32 if bucket.full.dtype == torch.float32 else torch.bfloat16
            ahead = torch.zeros(bucket.optimizer_span.size, dtype=dtype, device=self.zero.device)
            if part:
                ahead[: part.span.size].copy_(self._advance(part, skip))
            whole = self._gather(bucket, ahead)
            if part:
                for span, rows in matrices:
                    if met := span.meet(part.span):
                        turned = orthogonalised(whole[slice(*span)].view(rows, -1)).flatten()
                        own = turned[met.start - span.start : met.stop - span.start].to(part.weight)
                        scale = ADAMW_RMS * max(rows, span.size // rows) ** 0.5
                        weight = part.weight[met.start - part.span.start : met.stop - part.span.start]
                        new = weight * (1 - lr * self.spec.weight_decay) - lr * scale * own
                        weight.copy_(torch.where(skip.to(weight.device), weight, new))

    def _advance(self, part: Part, skip: Tensor) -> Tensor:
        """Move the momentum on, and give Nesterov's look ahead of it."""
        state, gradient, skip = part.states["momentum"], part.gradient, skip.to(part.weight.device)
        old = state.float()
        new = old.lerp(gradient, 1 - self.spec.momentum)
        state.copy_(torch.where(skip, old, new))
        return gradient.lerp(new, self.spec.momentum)

    def _gather(self, bucket: Bucket, own: Tensor) -> Tensor:
        """The whole bucket of which each rank has its optimizer shard."""
        mesh = self.zero.mesh
        if mesh.shard_group is None:
            return own
        layout, whole = mesh.layout, own.new_empty(bucket.layout.padded)
        first = mesh.rank - mesh.rank % layout.optimizer
        places = [
            whole[slice(*layout.spans(first + index, bucket.layout.padded)[2])]
            for index in range(layout.optimizer)
        ]
        dist.all_gather(places, own, group=mesh.shard_group)
        return whole


def _matrices(bucket: Bucket, rows: Rows) -> Iterator[tuple[Span, int]]:
    """(elements of the bucket, rows) of every matrix that Muon is for."""
    for entry in bucket.layout.entries:
        start = entry.span.start
        for count in rows(entry.name):
            stop = start + count * entry.shape[1]
            yield Span(start, stop), count
            start = stop
