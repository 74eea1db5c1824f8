"""One training process, as torchrun or the pod's agent starts it: `python -m internlm_trainer.worker`.

Environment: INTERNLM_JOB_FILE (the manifest), INTERNLM_JOB_UID, INTERNLM_ATTEMPT, INTERNLM_TERMINATION_LOG, and the
job channel's INTERNLM_REPORT_URL, INTERNLM_REPORT_TOKEN_FILE and INTERNLM_REPORT_CA_FILE.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

from internlm_operator.api import JobSpec
from internlm_operator.manifest import Job, JobError, load_manifests, parse_job, parse_spec
from internlm_trainer import machine
from internlm_trainer.checkpoint import StorageUnavailable
from internlm_trainer.errors import (
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    DataError,
    Diverged,
    StepFailed,
    UserError,
)
from internlm_trainer.plan.choose import out_of_memory_advice
from internlm_trainer.processes import Processes, SiblingDied, Stopped
from internlm_trainer.storage import StorageUnreachableError
from internlm_trainer.telemetry.diagnostics import (
    is_out_of_memory,
    leave_memory_snapshot,
    set_flight_recorder,
)
from internlm_trainer.telemetry.heartbeat import Heartbeat, start_pulse
from internlm_trainer.telemetry.progress import set_up_logging
from internlm_trainer.telemetry.stacks import answer_for_stacks
from internlm_trainer.telemetry.termination import leave_message

log = logging.getLogger("internlm_trainer.worker")


def main() -> int:
    """Train, and leave the reason for the end where the operator finds it.  Returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(rank)
    answer_for_stacks(rank)
    start_pulse(rank)
    _end_with_torchrun()
    try:
        return _train(rank)
    except Stopped as stopped:
        at = stopped.args[0] if stopped.args else None
        told = "before the first step" if at is None else f"after step {at}, which is saved"
        return _end("Stopped", f"stopped {told}", EXIT_STOPPED, at)
    except SiblingDied:
        return 1


def _end_with_torchrun() -> None:
    """torchrun gives each process a session of its own: killed, it would leave them behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _train(rank: int) -> int:
    """All of `main` but for being stopped, which may happen in any line of this, its handlers included."""
    world: Processes | None = None
    job: Job | None = None
    try:
        from internlm_trainer.train import train

        Heartbeat(rank).beat("setup", 0)
        manifest = load_manifests(Path(os.environ["INTERNLM_JOB_FILE"]))[0]
        job = parse_job(manifest)
        diagnostics_path = job.spec.telemetry.diagnostics_path
        set_flight_recorder(diagnostics_path, os.environ)
        world = Processes()
        spec = parse_spec(manifest["spec"], world.size)
        try:
            step = train(job.name, spec, world, int(os.environ.get("INTERNLM_ATTEMPT", "1")))
        except StepFailed as error:
            return _end("Diverged" if isinstance(error, Diverged) else "Error", str(error), 1)
        world.close()
    except (StorageUnreachableError, StorageUnavailable) as error:
        return _end("StorageUnreachable", str(error), 1)
    except DataError as error:
        return _end("DataError", str(error), EXIT_USER_ERROR)
    except (UserError, JobError) as error:
        return _end("UserError", str(error), EXIT_USER_ERROR)
    except Exception as error:
        if job is not None and is_out_of_memory(error):
            return _end("OutOfMemory", _what_to_change(error, job.spec, rank), 1)
        # A process that was killed leaves no message. What its peers saw of that must not stand for it: without
        # one, the log's end does, where torchrun names who died first and how.
        killed = world is not None and world.another_died()
        first = not killed and leave_message("Error", f"rank {rank}: {type(error).__name__}: {error}")
        # Where another process of this machine failed before, this is what its peers saw of that.
        log.error("rank %d failed: %s: %s", rank, type(error).__name__, error, exc_info=first)
        return 1
    leave_message("Completed", f"all {step} steps are done", step)
    return 0


def _what_to_change(error: Exception, spec: JobSpec, rank: int) -> str:
    """What to do when memory is full."""
    snapshot = None
    if spec.telemetry.memory_history and spec.gpus_per_node:
        snapshot = leave_memory_snapshot(spec.telemetry.diagnostics_path, rank)
    history = f"; who took it is in {snapshot}, for https://pytorch.org/memory_viz" if snapshot else ""
    advice = "make training.microBatchSize or model.seqLen smaller, or shard more by parallel.zero"
    if spec.gpus_per_node and (memory := machine.gpu_memory()):
        advice = out_of_memory_advice(spec, spec.world_size, spec.gpus_per_node, memory)
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"rank {rank}: memory is full: {what}: {advice}{history}"


def _end(reason: str, sentence: str, code: int, step: int | None = None) -> int:
    # Most ends are the same on all ranks; what only one has found, it must tell itself.
    if leave_message(reason, sentence, step):
        log.log(logging.WARNING if reason == "Stopped" else logging.ERROR, "%s", sentence)
    return code


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    # Not sys.exit: after a failure, destructors of process groups may wait for peers that are gone.
    os._exit(code)
