"""Hybrid ZeRO: parameters, gradients and optimizer states sharded over groups of their own sizes.

Every unit of the model (embedding, block, norm, head) is a `Bucket`: one flat buffer whose views are the unit's
parameters.  `layout.ZeroLayout` says which rank holds which elements.  One training step is

    for each micro-batch: zero.micro_batch(last=...); loss.backward()
    norm = zero.clip(max_norm); optimizer.step(); zero.publish()

and communication runs beside computation on its own stream: a unit's gradients are reduced as soon as its backward
is done, its parameters are gathered one unit ahead, and after the update each unit of the next forward waits only
for its own bucket.  On gloo the same calls simply run in order.

Rajbhandari et al., ZeRO, arXiv:1910.02054; the three degrees follow Chen et al., AMSP, arXiv:2311.00257.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm_trainer.parallel.layout import BucketLayout, Span, ZeroLayout, bucket_layout

ALIGNMENT = 64  # elements: keeps every shard of every bucket aligned for vector loads and for NCCL


class Mesh:
    """The process groups of a `ZeroLayout`, as this rank sees them."""

    def __init__(self, layout: ZeroLayout) -> None:
        self.layout = layout
        self.rank = dist.get_rank()
        self.groups = [self._group(layout.groups(level)) for level in range(4)]
        shards = layout.optimizer
        self.shard_group = self._group(
            [list(range(start, start + shards)) for start in range(0, layout.world_size, shards)]
        )

    def _group(self, groups: list[list[int]]) -> dist.ProcessGroup | None:
        """This rank's group among `groups`; None where it would be alone.  Every rank makes all of them."""
        if len(groups[0]) == 1:
            return None
        mine = None
        for ranks in groups:
            group = dist.new_group(ranks)
            if self.rank in ranks:
                assert isinstance(group, dist.ProcessGroup)
                mine = group
        return mine

    def reduce_scatter(self, full: Tensor, level: int) -> Tensor:
        """The sum along a level of this rank's part of `full`; `full` itself where the level has one rank."""
        group = self.groups[level]
        if group is None:
            return full
        part = torch.empty(full.numel() // self.layout.sizes[level], dtype=full.dtype, device=full.device)
        dist.reduce_scatter_tensor(part, full, group=group)
        return part

    def all_gather(self, full: Tensor, part: Tensor, level: int) -> None:
        """Fill `full` with the level's parts, of which this rank's is `part` (it may lie inside `full`)."""
        group = self.groups[level]
        if group is not None:
            dist.all_gather_into_tensor(full, part, group=group)
        elif full.data_ptr() != part.data_ptr():
            full.copy_(part)

    def all_reduce(self, tensor: Tensor, level: int) -> None:
        """Sum in place along a level."""
        if (group := self.groups[level]) is not None:
            dist.all_reduce(tensor, group=group)


class Stream:
    """Runs communication beside computation on a GPU, and in place on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def launch(self, work: Callable[[], None]) -> Callable[[], None]:
        """Start `work` after what is queued so far; calling the result makes later computation wait for it."""
        if self.stream is None:
            work()
            return lambda: None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
            done = self.stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)


def _nothing() -> None:
    """Nothing to wait for."""


class Bucket:
    """One unit's parameters, gradients and optimizer shard.

    `full` holds all parameters in the model's type; under p > 1 its memory exists only while the unit computes and
    `shard` keeps this rank's part.  Gradients gather in fp32: in `grad_full` for g = 1, in `grad_shard` for g > 1.
    `master` is this rank's fp32 optimizer shard, `master_grad` the reduced gradient for it.
    """

    def __init__(self, layout: BucketLayout, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.mesh = layout, mesh
        self.parameter_span, self.gradient_span, self.optimizer_span = mesh.layout.spans(
            mesh.rank, layout.padded
        )
        self.sharded = mesh.layout.parameters > 1
        self.full = torch.zeros(layout.padded, dtype=dtype, device=device)
        self.shard = self.full.new_zeros(self.parameter_span.size) if self.sharded else self.full
        self.master = torch.zeros(self.optimizer_span.size, dtype=torch.float32, device=device)
        self.master_grad = torch.zeros_like(self.master)
        accumulator = self.gradient_span.size if mesh.layout.gradients > 1 else layout.padded
        self.accumulated = torch.zeros(accumulator, dtype=torch.float32, device=device)
        self.incoming: Tensor | None = None  # g > 1: this micro-batch's whole gradient, until it is scattered
        self.missing = 0  # parameters whose gradient of this backward is still to come
        self.wait: Callable[[], None] = _nothing
        self.parameters: list[nn.Parameter] = []

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        for entry in self.layout.entries:
            yield entry.name, flat[entry.span.start : entry.span.stop].view(entry.shape)

    def gather(self, stream: Stream) -> None:
        """Start to make the parameters whole, unless they are."""
        storage = self.full.untyped_storage()
        if not self.sharded or storage.size():
            return
        self.wait()  # an update of the shard may be under way
        storage.resize_(self.full.numel() * self.full.element_size())
        self.wait = stream.launch(lambda: self.mesh.all_gather(self.full, self.shard, 0))

    def ready(self) -> None:
        """Make computation wait until the parameters are whole."""
        self.wait()
        self.wait = _nothing

    def free(self) -> None:
        """Give the parameters' memory back until the unit computes again."""
        if self.sharded and self.full.untyped_storage().size():
            # No record_stream: the memory was taken on the computing stream, and gathers into it wait for that one.
            self.full.untyped_storage().resize_(0)

    def add_gradient(self, index: int, gradient: Tensor) -> bool:
        """Take one parameter's gradient; true when it was the backward's last of this bucket."""
        if self.mesh.layout.gradients == 1:
            target = self.accumulated
        else:
            if self.incoming is None:
                self.incoming = torch.zeros(self.layout.padded, dtype=torch.float32, device=gradient.device)
            target = self.incoming
        span = self.layout.entries[index].span
        target[span.start : span.stop].add_(gradient.flatten())
        self.missing -= 1
        return self.missing == 0

    def reduce(self, stream: Stream, last: bool) -> None:
        """Start to scatter this micro-batch's gradient; on the last one, to reduce the sum to `master_grad`."""
        mesh, incoming = self.mesh, self.incoming
        self.incoming = None

        def work() -> None:
            if incoming is not None:
                if incoming.is_cuda:
                    incoming.record_stream(torch.cuda.current_stream())
                self.accumulated.add_(mesh.reduce_scatter(mesh.reduce_scatter(incoming, 0), 1))
            if last:
                reduced = mesh.reduce_scatter(self.accumulated, 2)
                mesh.all_reduce(reduced, 3)
                self.master_grad.copy_(reduced)
                self.accumulated.zero_()

        self.wait = stream.launch(work)

    def publish(self, stream: Stream) -> None:
        """Round the master weights to the model's type and start to gather them into `shard`."""

        def within(outer: Span, inner: Span) -> slice:
            return slice(inner.start - outer.start, inner.stop - outer.start)

        region = self.shard[within(self.parameter_span, self.gradient_span)]
        own = region[within(self.gradient_span, self.optimizer_span)]
        own.copy_(self.master)

        def work() -> None:
            self.mesh.all_gather(region, own, 2)
            if self.mesh.layout.sizes[1] > 1:
                self.mesh.all_gather(self.shard, region, 1)

        self.wait = stream.launch(work)


class HybridZero:
    """Applies a `ZeroLayout` to a model that was built on the meta device.

    model: its parameters are replaced by views of the buckets.
    units: the modules that make a bucket each, in the order of the forward pass; together they hold all parameters.
    dtype: of parameters and activations; master weights, accumulation and reduction are fp32.
    initialise: fills one fp32 parameter in place, given its name and index; called alike on every rank.
    decays: whether weight decay applies to a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[nn.Module],
        layout: ZeroLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        initialise: Callable[[str, int, Tensor], None],
        decays: Callable[[str], bool],
    ) -> None:
        self.layout, self.device = layout, device
        self.mesh, self.stream = Mesh(layout), Stream(device)
        self.last_micro_batch = True
        self.buckets: list[Bucket] = []
        names = {parameter: name for name, parameter in model.named_parameters()}
        for unit in units:
            shapes = [(names.pop(p), tuple(p.shape)) for p in unit.parameters()]
            flat = bucket_layout(shapes, [decays(name) for name, _ in shapes], ALIGNMENT * layout.optimizer)
            self.buckets.append(Bucket(flat, self.mesh, dtype, device))
        assert not names, f"parameters outside of every unit: {list(names.values())}"
        self._fill(initialise)
        for index, unit in enumerate(units):
            self._attach(model, index, unit)
        self.publish()

    def _fill(self, initialise: Callable[[str, int, Tensor], None]) -> None:
        """Set the master shards, a whole fp32 bucket at a time, so that no layout changes the values."""
        index = 0
        for bucket in self.buckets:
            whole = torch.zeros(bucket.layout.padded, dtype=torch.float32, device=self.device)
            for name, view in bucket.views(whole):
                initialise(name, index, view)
                index += 1
            bucket.master.copy_(whole[slice(*bucket.optimizer_span)])

    def _attach(self, model: nn.Module, index: int, unit: nn.Module) -> None:
        """Make the unit's parameters views of its bucket, and hook its forward and backward."""
        bucket = self.buckets[index]
        for position, (name, view) in enumerate(bucket.views(bucket.full)):
            owner_name, _, attribute = name.rpartition(".")
            # .data: with a version counter of its own, so that autograd takes a gather for no change of the weights
            parameter = nn.Parameter(view.data)
            setattr(model.get_submodule(owner_name), attribute, parameter)
            parameter.register_post_accumulate_grad_hook(self._on_gradient(index, position))
            bucket.parameters.append(parameter)
        bucket.free()
        ahead = self.buckets[index + 1] if index + 1 < len(self.buckets) else None
        behind = self.buckets[index - 1] if index else None

        def before_forward(*_: Any) -> None:
            bucket.gather(self.stream)
            bucket.ready()
            if ahead:
                ahead.gather(self.stream)

        def after_forward(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            bucket.free()
            if output.requires_grad:
                output.register_hook(before_backward)

        def before_backward(_gradient: Tensor) -> None:
            bucket.missing = len(bucket.parameters)
            bucket.gather(self.stream)
            bucket.ready()
            if behind:
                behind.gather(self.stream)

        unit.register_forward_pre_hook(before_forward)
        unit.register_forward_hook(after_forward)

    def _on_gradient(self, index: int, position: int) -> Callable[[Tensor], None]:
        bucket = self.buckets[index]

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            complete = bucket.add_gradient(position, parameter.grad)
            parameter.grad = None
            if complete:
                bucket.free()
                bucket.reduce(self.stream, self.last_micro_batch)

        return hook

    def micro_batch(self, *, last: bool) -> None:
        """Announce a backward; the `last` one of a step reduces the accumulated gradients."""
        self.last_micro_batch = last

    def reduced(self) -> None:
        """Make computation wait until the gradients of the last micro-batch are reduced."""
        for bucket in self.buckets:
            bucket.ready()

    def clip(self, max_norm: float) -> Tensor:
        """Wait for the gradients and scale them down to a global norm of `max_norm` (0: leave them).

        Returns the norm before scaling, a 0-dim fp32 tensor on the device; nothing waits for its value.
        """
        self.reduced()
        gradients = [bucket.master_grad for bucket in self.buckets]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self.mesh.shard_group is not None:
            dist.all_reduce(squares, group=self.mesh.shard_group)
        norm = squares.sqrt()
        if max_norm:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def publish(self) -> None:
        """After an update of the master weights: round them and gather them where they are used."""
        for bucket in self.buckets:
            bucket.publish(self.stream)

    def master_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(decayed, not decayed) fp32 master weights for a torch optimizer; `.grad` is bound to the reduced
        gradients."""
        decayed: list[nn.Parameter] = []
        other: list[nn.Parameter] = []
        for bucket in self.buckets:
            own = bucket.optimizer_span
            end = bucket.layout.decayed.stop
            for target, span in (
                (decayed, own.meet(Span(0, end))),
                (other, own.meet(Span(end, bucket.layout.padded))),
            ):
                if span:
                    part = slice(span.start - own.start, span.stop - own.start)
                    weight = nn.Parameter(bucket.master[part])
                    weight.grad = bucket.master_grad[part]
                    target.append(weight)
        return decayed, other

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape."""
        return {entry.name: entry.shape for bucket in self.buckets for entry in bucket.layout.entries}
