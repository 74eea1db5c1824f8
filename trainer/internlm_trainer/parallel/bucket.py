"""One unit of the model under Hybrid ZeRO: its buffers, and how they are filled, reduced, gathered and published."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from internlm_trainer.config import ZeroSpec
from internlm_trainer.parallel.layout import (
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    BucketLayout,
    gradient_buffers,
)
from internlm_trainer.parallel.mesh import Done, Mesh, Streams
from internlm_trainer.transfer import page_locked


class Bucket:
    """One unit's parameters, gradients and optimizer shard.

    `full` holds all parameters in the model's type; under p > 1 its memory exists only while the unit computes and
    `shard` keeps this rank's part.  `master` is this rank's fp32 optimizer shard, `master_grad` the reduced gradient
    for it; with offload both are in (pinned) host memory.  `layout.gradient_buffers` says where a gradient is until
    then.  What is under way has a name each:

    published: the rounded master weights, on their way to `shard`
    gathered: the parameters, on their way from the shards to `full`
    reduced: the gradients, on their way to `master_grad`
    """

    def __init__(
        self,
        layout: BucketLayout,
        mesh: Mesh,
        streams: Streams,
        spec: ZeroSpec,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout, self.mesh, self.streams = layout, mesh, streams
        self.parameter_span, self.gradient_span, self.optimizer_span = mesh.layout.spans(
            mesh.rank, layout.padded
        )
        self.sharded = mesh.layout.parameters > 1
        self.full = torch.zeros(layout.padded, dtype=dtype, device=device)
        self.shard = self.full.new_zeros(self.parameter_span.size) if self.sharded else self.full
        self.parameters: list[nn.Parameter] = []
        self.published = self.gathered = self.reduced = Done()

        self.offload = spec.offload == "optimizer"
        host = torch.device("cpu") if self.offload else device
        locked, size = self.offload and device.type == "cuda", self.optimizer_span.size

        def zeros(dtype: torch.dtype) -> Tensor:
            return page_locked(size, dtype, device) if locked else torch.zeros(size, dtype=dtype, device=host)

        self.master, self.master_grad = zeros(torch.float32), zeros(torch.float32)
        # Where the host's weights are rounded before they are sent.
        self.staging = zeros(dtype) if locked else None

        # What gradients are reduced in.  Sums across groups are 1/o of the bytes, and so may stay fp32.
        lossy = spec.reduce_precision == "bf16" and mesh.layout.world_size > 1
        self.sent = torch.bfloat16 if lossy else torch.float32
        self.sent_across = self.sent if mesh.layout.optimizer == 1 else torch.float32
        buffers = gradient_buffers(
            mesh.layout, layout.padded, accumulation=spec.accumulation, offload=self.offload, micro_batches=2
        )
        self.whole, self.accumulator_size = buffers.whole, buffers.accumulated
        self.accumulated = self.master_grad if buffers.in_place else None
        self.incoming: Tensor | None = None  # where the gradients of this backward go
        self.held: tuple[Done, list[Tensor]] = (Done(), [])  # what a reduction reads, and until when
        self.micro_batches = 0  # since the last update, so far
        self.missing = 0  # parameters whose gradient of this backward is still to come

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        for entry in self.layout.entries:
            yield entry.name, flat[entry.span.start : entry.span.stop].view(entry.shape)

    def gather(self) -> None:
        """Start to make the parameters whole, unless they are."""
        storage = self.full.untyped_storage()
        if self.sharded and not storage.size():
            storage.resize_(self.full.numel() * self.full.element_size())
            self.gathered = self.streams.gather.launch(
                lambda: self.mesh.all_gather(self.full, self.shard, (PARAMETERS,)), self.published
            )

    def ready(self) -> None:
        """Make computation wait until the parameters are whole and those of the last update."""
        (self.gathered if self.sharded else self.published).wait()

    def free(self) -> None:
        """Give the parameters' memory back until the unit computes again."""
        if self.sharded and self.full.untyped_storage().size():
            # No record_stream: the memory was taken on the computing stream, and gathers into it wait for that one.
            self.full.untyped_storage().resize_(0)

    def receive(self, last: bool) -> None:
        """Choose where the gradients of a backward go."""
        if self.whole and not last:
            self.accumulated = self._accumulator()
        if self.whole and self.accumulated is not None:
            self.incoming = self.accumulated
        else:
            self.incoming = self.full.new_empty(self.layout.padded, dtype=self.sent)
        if not self._adds_up():
            # Gradients overwrite the rest.  What pads a bucket must count as nothing in the norm.
            self.incoming[self.layout.entries[-1].span.stop :].zero_()

    def _adds_up(self) -> bool:
        return self.whole and self.micro_batches > 0

    def _accumulator(self) -> Tensor:
        if self.accumulated is not None:
            return self.accumulated
        return self.full.new_zeros(self.accumulator_size, dtype=torch.float32)

    def add_gradient(self, index: int, gradient: Tensor) -> bool:
        """Take one parameter's gradient; true when it was the backward's last of this bucket."""
        assert self.incoming is not None
        span = self.layout.entries[index].span
        _put(self.incoming[span.start : span.stop], gradient.flatten(), add=self._adds_up())
        self.missing -= 1
        return self.missing == 0

    def reduce(self, last: bool) -> None:
        """Start to reduce this backward's gradients as far as they are not added up before, and after the `last`
        backward of a step their sum to `master_grad`."""
        incoming, self.incoming = self.incoming, None
        assert incoming is not None
        first = self.micro_batches == 0
        self.micro_batches = 0 if last else self.micro_batches + 1
        if self.whole and not last:
            return
        if not last:
            self.accumulated = self._accumulator()
        mesh, whole, accumulated = self.mesh, self.whole, self.accumulated
        kept = incoming if accumulated is None else accumulated
        reduced = self.master_grad
        if self.offload:
            same = kept.numel() == reduced.numel() and kept.dtype == reduced.dtype
            reduced = kept if same else kept.new_empty(reduced.numel(), dtype=reduced.dtype)

        def scatter() -> None:
            kinds: tuple[int, ...] = (PARAMETERS, GRADIENTS, OPTIMIZER)
            if accumulated is not None and not whole:
                part = accumulated if first else torch.empty_like(accumulated)
                mesh.reduce_scatter(incoming, part, (PARAMETERS, GRADIENTS), self.sent)
                if not first:
                    accumulated.add_(part)
                kinds = (OPTIMIZER,)
            if last:
                mesh.reduce_scatter(kept, reduced, kinds, self.sent)

        def finish() -> None:
            mesh.all_reduce(reduced, self.sent_across)
            if self.offload:
                self.master_grad.copy_(reduced, non_blocking=True)

        self.reduced = scattered = self.streams.scatter.launch(scatter)
        if last and (self.offload or mesh.has_replicas):
            self.reduced = self.streams.finish.launch(finish, scattered)
        if self.reduced.event:
            self.held = (self.reduced if self.offload else scattered, [incoming, reduced])

    def release(self) -> None:
        """Let go of what the reduction read, once computation waits for its end: the memory is computation's."""
        done, _ = self.held
        done.wait()
        self.held = (Done(), [])

    @property
    def own(self) -> Tensor:
        """The part of `shard` that this rank updates."""
        start = self.optimizer_span.start - self.parameter_span.start
        return self.shard[start : start + self.optimizer_span.size]

    def publish(self, *, rounded: bool = False) -> None:
        """Round the master weights to the model's type, unless `own` has them so, and start to gather `shard`."""
        own, staging = self.own, self.staging
        self.published.wait()
        if staging is not None:
            self.published.synchronize()  # the weights before are still read until then
            staging.copy_(self.master)
        elif not rounded:
            own.copy_(self.master)

        def work() -> None:
            if staging is not None:
                own.copy_(staging, non_blocking=True)
            self.mesh.all_gather(self.shard, own, (GRADIENTS, OPTIMIZER))

        self.published = self.streams.publish.launch(work)


def _put(target: Tensor, gradient: Tensor, *, add: bool) -> None:
    """Add a gradient to its place, or put it there."""
    if target.is_cuda and target.dtype != gradient.dtype:
        from internlm_trainer.kernels.widen import widen

        widen(target, gradient, add=add)
    elif add:
        target.add_(gradient)
    else:
        target.copy_(gradient)
