"""`spec.parallel`: how the model's states are laid out over the processes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from internlm_trainer.config.base import Spec


class ZeroSpec(Spec):
    """Hybrid ZeRO: over how many consecutive data-parallel ranks each kind of state is sharded.

    1: replicated on every rank; -1: over all of them. Each degree divides the next one, and the last divides the
    data-parallel size. ZeRO-1 inside nodes of 8 GPUs is (1, 1, 8); FSDP is (-1, -1, -1).
    """

    parameters: Annotated[int, Field(ge=-1, le=65536)] = 1
    """Ranks that share one copy of the parameters."""
    gradients: Annotated[int, Field(ge=-1, le=65536)] = 1
    """Ranks that share one copy of the accumulated gradients."""
    optimizer: Annotated[int, Field(ge=-1, le=65536)] = -1
    """Ranks that share one copy of the fp32 master weights and the optimizer's states."""

    def degrees(self, data_parallel_size: int) -> tuple[int, int, int]:
        """(p, g, o) with -1 replaced by the data-parallel size."""
        p, g, o = (
            data_parallel_size if degree == -1 else degree
            for degree in (self.parameters, self.gradients, self.optimizer)
        )
        return p, g, o


class ParallelSpec(Spec):
    """How the model's states are laid out over the processes."""

    zero: ZeroSpec = ZeroSpec()
    """Sharding of parameters, gradients and optimizer states."""
