"""What this machine has and what the trainer will use of it, and why."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Finding(NamedTuple):
    """One line of `internlm env`."""

    what: str
    found: str
    use: str


def find() -> list[Finding]:
    """Hardware and libraries, and what will be used."""
    import torch

    from internlm_trainer.kernels import attention

    gpus = torch.cuda.device_count()
    findings = [
        Finding(
            "CPU", f"{cores()} cores", "data preparation" if gpus else "training, with gloo between processes"
        ),
        Finding("PyTorch", torch.__version__, f"built for CUDA {torch.version.cuda or 'none'}"),
    ]
    for index in range(gpus):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        findings.append(
            Finding(f"GPU {index}", f"{properties.name}, {memory}", f"training, {capability}, NCCL")
        )
    if not gpus:
        findings.append(Finding("GPU", "none", "not used: set gpusPerNode to 0 and processesPerNode"))
    device = torch.device("cuda" if gpus else "cpu")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        choice = attention.choose(device, dtype)
        findings.append(Finding(f"attention, {precision}", choice.name, choice.reason))
    for package, use in (
        ("flash-attn", "attention of documents of different lengths"),
        ("s3fs", "s3:// paths"),
        ("gcsfs", "gs:// paths"),
        ("adlfs", "abfs:// paths"),
        ("tensorboard", "telemetry.tensorboard"),
        ("wandb", "telemetry.wandb"),
    ):
        found = version_of(package)
        findings.append(
            Finding(package, found or "not installed", use if found else f"not used; it serves {use}")
        )
    return findings


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_count() -> int:
    """GPUs that PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def gpu_memory() -> int | None:
    """Bytes of the first GPU's memory; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def card(device: torch.device) -> str:
    """The name that CUDA gives the device; empty for a CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def version_of(package: str) -> str | None:
    """Of an installed distribution; None where there is none of this name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
