"""The process groups of a layout and the streams that their communication runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_trainer.parallel.layout import REPLICAS, Level, ZeroLayout


class Done(NamedTuple):
    """The end of communication that was started; nothing to wait for where there is no event."""

    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Make computation that is queued from here on wait for it; the host goes on."""
        if self.event:
            torch.cuda.current_stream().wait_event(self.event)

    def synchronize(self) -> None:
        """Make the host wait for it."""
        if self.event:
            self.event.synchronize()


class Stream:
    """Runs communication beside computation on a GPU, and in place on a CPU."""

    def __init__(self, device: torch.device) -> None:
        # Of high priority, so that a transfer does not queue behind the many blocks of a matrix product.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def launch(self, work: Callable[[], None], after: Done = Done()) -> Done:
        """Start `work` after the computation that is queued so far, and after `after`."""
        if self.stream is None:
            work()
            return Done()
        self.stream.wait_stream(torch.cuda.current_stream())
        if after.event:
            self.stream.wait_event(after.event)
        with torch.cuda.stream(self.stream):
            work()
            return Done(self.stream.record_event())


class Streams:
    """Those of Hybrid ZeRO.  What runs on two of them uses different process groups, so that NCCL can run both."""

    def __init__(self, device: torch.device) -> None:
        self.publish = Stream(device)  # updated parameters, gathered within o
        self.gather = Stream(device)  # parameters, gathered within p
        self.scatter = Stream(device)  # gradients, scattered within o
        self.finish = Stream(device)  # their sums across groups, and the copy to the host


class Mesh:
    """The process groups of a `ZeroLayout`, as this rank sees them."""

    def __init__(self, layout: ZeroLayout, device: torch.device) -> None:
        self.layout = layout
        self.rank = dist.get_rank()
        self.levels = layout.levels
        self.has_replicas = layout.sizes[REPLICAS] > 1
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Gathers have groups of their own: NCCL runs the operations of one group one after the other.
        self._reducing = [_new_group(layout.groups(level), backend) for level in self.levels]
        self._gathering = [
            _new_group(layout.groups(level), backend) if level.kind != REPLICAS else None
            for level in self.levels
        ]
        copies = [
            list(range(start, start + layout.optimizer))
            for start in range(0, layout.world_size, layout.optimizer)
        ]
        same = [
            group
            for level, group in zip(self.levels, self._reducing, strict=True)
            if layout.groups(level) == copies
        ]
        self.shard_group = same[0] if same else _new_group(copies, backend) if layout.optimizer > 1 else None
        """The ranks that together hold one copy of the optimizer shards; None for one."""

    def _along(
        self, kinds: Sequence[int], groups: list[dist.ProcessGroup | None]
    ) -> list[tuple[Level, dist.ProcessGroup | None]]:
        return [
            (level, group) for level, group in zip(self.levels, groups, strict=True) if level.kind in kinds
        ]

    def reduce_scatter(self, full: Tensor, out: Tensor, kinds: Sequence[int], dtype: torch.dtype) -> None:
        """Write this rank's part of the sum of `full` along the levels of `kinds` to `out`; `dtype` is sent."""
        part, steps = full, self._along(kinds, self._reducing)
        for index, (level, group) in enumerate(steps):
            part = part.to(dtype)
            direct = index == len(steps) - 1 and out.dtype == dtype
            target = out if direct else part.new_empty(part.numel() // level.size)
            dist.reduce_scatter_tensor(target, part, group=group)
            part = target
        if part is not out:
            out.copy_(part)

    def all_reduce(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """Sum in place across the replicas; `dtype` is sent."""
        for _, group in self._along((REPLICAS,), self._reducing):
            sent = tensor.to(dtype)
            dist.all_reduce(sent, group=group)
            if sent is not tensor:
                tensor.copy_(sent)

    def all_gather(self, full: Tensor, part: Tensor, kinds: Sequence[int]) -> None:
        """Fill `full` with the parts along the levels of `kinds`, of which this rank's is `part`.

        `part` may be its place in `full`.
        """
        regions, steps = [full], self._along(kinds, self._gathering)
        for level, _ in steps:
            size = regions[-1].numel() // level.size
            start = level.place(self.rank) * size
            regions.append(regions[-1][start : start + size])
        regions[-1] = part
        for index in reversed(range(len(steps))):
            dist.all_gather_into_tensor(regions[index], regions[index + 1], group=steps[index][1])


def _new_group(groups: list[list[int]], backend: str) -> dist.ProcessGroup | None:
    """This rank's group among `groups`.  Every rank makes all of them."""
    mine = None
    for ranks in groups:
        group = dist.new_group(ranks, backend=backend)
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine
