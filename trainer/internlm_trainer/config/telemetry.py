"""`spec.telemetry`: where a job's numbers go, and what it leaves for those who look into it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from internlm_trainer.config.base import Spec

METRICS_PORT = 9464
"""The port of a worker's metrics on a cluster, where the job names none."""

Location = Annotated[str, Field(min_length=1, max_length=1024)]


class TensorBoardSpec(Spec):
    """Event files for TensorBoard, written by rank 0. The package `tensorboard` must be installed."""

    path: Location
    """Folder of the event files; a URL where TensorBoard's file system knows it, such as `s3://`."""


class WandbSpec(Spec):
    """A run of Weights & Biases, written by rank 0. The package `wandb` must be installed; its key is in the
    environment: WANDB_API_KEY."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    """Project of the run."""
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """User or team. Default: that of the key."""


class ProfileSpec(Spec):
    """A trace of some steps by torch.profiler, for Perfetto or chrome://tracing."""

    path: Location
    """Folder or URL (any fsspec protocol) of the traces, one file a rank."""
    first_step: Annotated[int, Field(ge=1, le=2**31 - 1)] = 10
    """First step to trace."""
    steps: Annotated[int, Field(ge=1, le=100)] = 3
    """How many steps to trace."""
    ranks: Annotated[int, Field(ge=1, le=65536)] = 1
    """How many ranks to trace, from 0 on."""


class TelemetrySpec(Spec):
    """Where the job's numbers go besides log and status, and what it leaves for those who look into it."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of rank 0's metrics for Prometheus; 0: none. Default: 9464 on a cluster, none with `internlm run`."""
    tensorboard: TensorBoardSpec | None = None
    """Write event files for TensorBoard."""
    wandb: WandbSpec | None = None
    """Write a run of Weights & Biases."""
    profile: ProfileSpec | None = None
    """Trace some steps."""
    diagnostics_path: Location | None = None
    """Folder in every worker for what is left when something goes wrong: NCCL's flight recorder after a hang, and
    the history of a GPU's memory when it is full. Default: `internlm-diagnostics` in the temporary folder."""
    memory_history: bool = False
    """Record who took a GPU's memory, to be left in `diagnosticsPath` when it is full; slows allocations down."""
