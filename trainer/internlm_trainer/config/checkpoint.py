"""`spec.checkpoint`: where and how often the state is saved."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from internlm_trainer.config.base import Spec


class CheckpointSpec(Spec):
    """Where and how often the state is saved. A job resumes from the newest checkpoint that verifies."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder or URL (any fsspec protocol) of this job's checkpoints; no two jobs may share one."""
    every_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] = 500
    """Steps between two checkpoints. The last step is always saved."""
    keep: Annotated[int, Field(ge=1, le=10000)] = 3
    """Newest checkpoints to keep."""
    keep_every_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Of each span of so many steps, the first checkpoint is kept for ever."""
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Training goes on while a checkpoint is written, from a copy in host memory. false: it waits."""
    verify: bool = False
    """Each shard is read back from the store before the checkpoint counts: a save moves twice the bytes, beside
    training. What is damaged is found when it is read in any case."""
    retry_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    """How long a request to a failing store is tried again before the save fails."""
    max_age_seconds: Annotated[int, Field(ge=60, le=2**31 - 1)] = 21600
    """A failed save fails the job only when the last good checkpoint is older than this."""
