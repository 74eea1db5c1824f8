"""Hybrid ZeRO: parameters, gradients and optimizer states sharded over groups of their own sizes.

Every unit of the model (embedding, block, norm, head) is a `Bucket`: one flat buffer whose views are the unit's
parameters.  `layout.ZeroLayout` says which rank holds which elements.  One training step is

    for each micro-batch: zero.micro_batch(last=...); loss.backward()
    norm = zero.clip(max_norm); optimizer.step(); zero.publish()

`clip` only says what the gradients are to be multiplied by: the update does it, in one pass where it can.
and communication runs beside computation on streams of its own: a unit's gradients are reduced as soon as its
backward is done, its parameters are gathered one unit ahead, and after the update each unit of the next forward
waits only for its own bucket.  The host waits for nothing, but with offload for the gradients.  On gloo the same
calls simply run in order.

Rajbhandari et al., ZeRO, arXiv:1910.02054; the three degrees follow Chen et al., AMSP, arXiv:2311.00257.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm_trainer.config import ZeroSpec
from internlm_trainer.parallel.bucket import Bucket
from internlm_trainer.parallel.layout import ALIGNMENT, ZeroLayout, bucket_layout
from internlm_trainer.parallel.mesh import Mesh, Streams


class HybridZero:
    """Applies a `ZeroLayout` to a model that was built on the meta device.

    model: its parameters are replaced by views of the buckets.
    units: the modules that make a bucket each, in the order of the forward pass; together they hold all parameters.
    spec: how gradients are accumulated and reduced, and what is offloaded; its degrees are those of `layout`.
    dtype: of parameters and activations; master weights and accumulation are fp32.
    initialise: fills one fp32 parameter in place, given its name; called alike on every rank.
    decays: whether weight decay applies to a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[nn.Module],
        layout: ZeroLayout,
        spec: ZeroSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        initialise: Callable[[str, Tensor], None],
        decays: Callable[[str], bool],
    ) -> None:
        self.layout, self.device = layout, device
        self.factor: Tensor | None = None
        self.updates = 0
        self.mesh, streams = Mesh(layout, device), Streams(device)
        self.last_micro_batch, self.watching = True, False
        self.reducing: deque[Bucket] = deque()
        self.buckets: list[Bucket] = []
        names = {parameter: name for name, parameter in model.named_parameters()}
        for unit in units:
            shapes = [(names.pop(p), tuple(p.shape)) for p in unit.parameters()]
            flat = bucket_layout(shapes, [decays(name) for name, _ in shapes], ALIGNMENT * layout.optimizer)
            self.buckets.append(Bucket(flat, self.mesh, streams, spec, dtype, device))
        assert not names, f"parameters outside of every unit: {list(names.values())}"
        self._fill(initialise)
        for index in range(len(units)):
            self._attach(model, units, index)
        self.publish()

    def _fill(self, initialise: Callable[[str, Tensor], None]) -> None:
        """Set the master shards, a whole fp32 bucket at a time, so that no layout changes the values."""
        for bucket in self.buckets:
            whole = torch.zeros(bucket.layout.padded, dtype=torch.float32, device=self.device)
            for name, view in bucket.views(whole):
                initialise(name, view)
            bucket.master.copy_(whole[slice(*bucket.optimizer_span)])

    def _attach(self, model: nn.Module, units: list[nn.Module], index: int) -> None:
        """Make the unit's parameters views of its bucket, and hook its forward and backward."""
        bucket, unit = self.buckets[index], units[index]
        for position, (name, view) in enumerate(bucket.views(bucket.full)):
            owner_name, _, attribute = name.rpartition(".")
            # .data: with a version counter of its own, so that autograd takes a gather for no change of the weights
            parameter = nn.Parameter(view.data)
            setattr(model.get_submodule(owner_name), attribute, parameter)
            parameter.register_post_accumulate_grad_hook(self._on_gradient(index, position))
            bucket.parameters.append(parameter)
        bucket.free()
        ahead = self.buckets[index + 1] if index + 1 < len(self.buckets) else None
        # What the backward reads; an embedding's reads no weights.
        own, behind = (
            self.buckets[i] if i >= 0 and not isinstance(units[i], nn.Embedding) else None
            for i in (index, index - 1)
        )

        def before_forward(*_: Any) -> None:
            if bucket.missing:
                return  # recomputation in the backward, for which the parameters are there
            bucket.gather()
            bucket.ready()
            if ahead:
                ahead.gather()

        def after_forward(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if bucket.missing or self.watching:
                return
            if ahead or not output.requires_grad:  # the last unit's backward is next
                bucket.free()
            if output.requires_grad:
                output.register_hook(before_backward)

        def before_backward(_gradient: Tensor) -> None:
            bucket.missing = len(bucket.parameters)
            if own:
                own.gather()
                own.ready()
            if behind:
                behind.gather()
            while len(self.reducing) > 1:  # so that no more than two buckets' gradients are in memory
                self.reducing.popleft().release()
            bucket.receive(self.last_micro_batch)

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
                bucket.reduce(self.last_micro_batch)
                self.reducing.append(bucket)

        return hook

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """For gradients that are no part of training, by `torch.autograd.grad`, where parameters are whole."""
        assert self.layout.parameters == 1
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    def micro_batch(self, *, last: bool) -> None:
        """Announce a backward; the `last` one of a step reduces the accumulated gradients."""
        self.last_micro_batch = last

    def reduced(self) -> None:
        """Make computation wait until the gradients of the last micro-batch are reduced."""
        for bucket in self.buckets:
            bucket.reduced.wait()
            bucket.release()
        self.reducing.clear()

    def clip(self, max_norm: float, loss_scale: Tensor | None = None) -> Tensor:
        """Wait for the gradients, and have the update scale them down to a global norm of `max_norm` (0: leave them).

        loss_scale: what the losses were multiplied by, 0-dim on the device; the gradients are divided by it.
        Returns the norm before clipping, a 0-dim fp32 tensor on the device; nothing waits for its value, but with
        offload the host, which scales the gradients.
        """
        self.reduced()
        for bucket in self.buckets:
            if bucket.offload:
                bucket.reduced.synchronize()
        gradients = [bucket.master_grad for bucket in self.buckets]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self.device)
        if self.mesh.shard_group is not None:
            dist.all_reduce(squares, group=self.mesh.shard_group)
        norm = squares.sqrt() if loss_scale is None else squares.sqrt() / loss_scale
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else None
        if loss_scale is not None:
            factor = 1 / loss_scale if factor is None else factor / loss_scale
        self.factor = factor
        return norm

    def take_factor(self) -> Tensor | None:
        """What the gradients are still to be multiplied by, a 0-dim fp32 tensor on the device; whoever asks does it."""
        factor, self.factor = self.factor, None
        return factor

    def scale_gradients(self) -> None:
        """Multiply them by what `clip` found."""
        if (factor := self.take_factor()) is not None:
            gradients = [bucket.master_grad for bucket in self.buckets]
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def publish(self, *, rounded: bool = False) -> None:
        """After an update of the master weights: round them, unless it did, and gather them where they are used."""
        self.updates += 1
        for bucket in self.buckets:
            bucket.publish(rounded=rounded)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape."""
        return {entry.name: entry.shape for bucket in self.buckets for entry in bucket.layout.entries}
