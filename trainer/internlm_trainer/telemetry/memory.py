"""How much memory this process has needed."""

from __future__ import annotations

import resource
import sys

import torch


def peaks(device: torch.device) -> dict[str, int]:
    """Peaks since the process started, in bytes: of the host's memory, and of a GPU's as PyTorch's allocator has
    used it and has taken it from the driver."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    found = {"memory_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found["memory_allocated"] = torch.cuda.max_memory_allocated(device)
        found["memory_reserved"] = torch.cuda.max_memory_reserved(device)
    return found
