"""What is left behind for those who look into a failure.  The agent, too, imports this: torch only where needed."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# What PyTorch's allocators raise, and Python's own; the CPU's raises a plain RuntimeError.
_CPU_OUT_OF_MEMORY = "can't allocate memory"
HISTORY_ENTRIES = 200_000
FLIGHT_RECORDER = "flight-recorder-"


def folder(path: str | None) -> Path:
    """`telemetry.diagnosticsPath`, or its default."""
    return Path(path) if path else Path(tempfile.gettempdir(), "internlm-diagnostics")


def set_flight_recorder(path: str | None, environment: MutableMapping[str, str]) -> None:
    """Have NCCL's flight recorder on, and leave `flight-recorder-RANK` when a collective times out.

    To be called before the process group is made.  What the environment says already stays.  `torchfrtrace`, which
    comes with PyTorch, reads the files.
    """
    import torch

    if not torch.cuda.is_available():
        return
    target = folder(path)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s: cannot be made: %s; a hang will leave no record there", target, error)
        return
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(target / FLIGHT_RECORDER),
        # Whoever writes to the pipe `flight-recorder-RANK.pipe` gets the record at once.
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(target / FLIGHT_RECORDER),
    }.items():
        environment.setdefault(name, value)


def record_memory(device: torch.device) -> None:
    """Record from now on who takes memory of a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)


def leave_memory_snapshot(path: str | None, rank: int) -> Path | None:
    """Leave the recorded history of a full GPU, for https://pytorch.org/memory_viz; None where that fails."""
    import torch

    file = folder(path) / f"memory-{rank}.pickle"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(os.fspath(file))
    except Exception as error:
        log.warning("%s: the memory's history cannot be written: %s", file, error)
        return None
    return file


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of a GPU or the host."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)
