"""What a training process tells the operator over the job channel."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat

from internlm_trainer.config import Spec

# Whatever a pod sends ends in the job's status, which every watcher of the job reads: keep it small.
MAX_REPORT_BYTES = 64 * 1024
# Name of a checkpoint that is asked for.
MAX_REQUEST = 253
_Step = Annotated[int, Field(ge=0, le=2**53)]
_Seconds = Annotated[FiniteFloat, Field(ge=0, le=2**31)]
_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class Message(BaseModel):
    """Base of the report's parts: camelCase; fields that a newer trainer adds are ignored."""

    model_config = Spec.model_config | {"extra": "ignore"}


class CheckpointReport(Message):
    """A committed checkpoint."""

    step: _Step
    """Optimizer steps that it holds."""
    uri: Annotated[str, Field(min_length=1, max_length=2048)]
    """Where it is."""
    time: Annotated[str, Field(max_length=20, pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
    """When it was committed."""
    bytes: _Count = 0
    """Its size."""
    digest: Annotated[str, Field(max_length=256)] = ""
    """Digest of its manifest."""
    verified: bool = False
    """Its bytes came back from the store as they were written."""


class EndedReport(Message):
    """The end of a worker's processes, as its container would have ended with them."""

    exit_code: Annotated[int, Field(ge=0, le=255)]
    """The exit code."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """The termination message."""


class AgentReport(Message):
    """How the processes of one worker are, as its agent tells it."""

    worker: Annotated[int, Field(ge=0, le=2**16)]
    """The worker's index."""
    gang: Annotated[int, Field(ge=1, le=2**31)]
    """The attempt that its pod was made for."""
    attempt: Annotated[int, Field(ge=1, le=2**31)]
    """The attempt that its processes belong to."""
    ended: EndedReport | None = None
    """Null while they run."""


class Report(Message):
    """One rank's progress. Numbers are finite; what is not known is null."""

    attempt: Annotated[int, Field(ge=1, le=2**31)]
    """The attempt that the rank belongs to."""
    rank: Annotated[int, Field(ge=0, le=2**24)] = 0
    """The process's rank among all of the job."""
    start_step: _Step = 0
    """The step that this attempt resumed from."""
    step: _Step
    """Optimizer steps done."""
    total_steps: _Step
    """Optimizer steps of the whole job."""
    tokens: _Count = 0
    """Tokens trained on."""
    skipped_steps: _Count = 0
    """Steps whose update was left out, as their loss or gradient norm was a spike or no number."""
    failed_saves: _Count = 0
    """Saves that failed since the newest good checkpoint."""
    loss: FiniteFloat | None = None
    """Training loss of the last step, in nats a token."""
    validation_loss: FiniteFloat | None = None
    """Loss of the last evaluation."""
    tokens_per_second: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Speed of the whole gang."""
    tokens_per_gpu_per_second: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Speed of one process."""
    tflops_per_gpu: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Model TFLOPS of one process."""
    straggler_rank: Annotated[int, Field(ge=0, le=2**24)] | None = None
    """The rank that stays slower than the others, and for which all wait."""
    straggler_score: Annotated[FiniteFloat, Field(ge=1)] | None = None
    """How many times as long as the median rank it computes."""
    load_seconds: _Seconds = 0
    """Seconds from this attempt's rendezvous to its first step."""
    checkpoint_stall_seconds: _Seconds = 0
    """Seconds of this attempt that training stood still for checkpoints."""
    eta_seconds: _Count | None = None
    """Seconds that the rest will take at this speed."""
    checkpoint_request: Annotated[str, Field(max_length=MAX_REQUEST)] = ""
    """The name of the last checkpoint that was asked for and is there."""
    checkpoint: CheckpointReport | None = None
    """The newest committed checkpoint."""
