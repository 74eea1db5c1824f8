"""What the processes of a job can send each other, as one of torchrun's processes; rank 0 prints it as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_trainer.processes import Processes
from internlm_trainer.transfer import Moment

BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
ROUNDS = 10


def main() -> None:
    """Bytes a second of each collective that Hybrid ZeRO uses, for buffers of `BYTES` on every rank.

    Bus bandwidth, as NCCL's own tests define it: what each rank must at least send, by the time.
    """
    world = Processes()
    size, device = world.size, world.device
    elements = BYTES[device.type] // 4 // size * size
    whole = torch.ones(elements, device=device)
    part = whole.new_ones(elements // size)
    share = (size - 1) / size * elements * 4
    found = {
        "all_gather": share / _seconds(lambda: dist.all_gather_into_tensor(whole, part), whole),
        "reduce_scatter": share / _seconds(lambda: dist.reduce_scatter_tensor(part, whole), whole),
        "all_reduce": 2 * share / _seconds(lambda: dist.all_reduce(whole), whole),
    }
    if world.rank == 0:
        print(json.dumps(found))
    world.close()


def _seconds(collective: Callable[[], object], whole: Tensor) -> float:
    """Of the slowest rank; the median of some rounds, the first of which do not count."""
    times = []
    for _ in range(ROUNDS):
        whole.fill_(1)
        dist.barrier()
        before = Moment(whole.device)
        collective()
        after = Moment(whole.device)
        if whole.is_cuda:
            torch.cuda.synchronize()
        times.append(after.since(before))
    slowest = torch.tensor(median(times[ROUNDS // 2 :]))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


if __name__ == "__main__":
    main()
