"""Running a job on this machine: torchrun with the job's processes, stopped cleanly by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from internlm_trainer import machine
from internlm_trainer.errors import EXIT_USER_ERROR, UserError

EXIT_INTERRUPTED = 130  # what a shell says of Ctrl-C


def scale_down(manifest: dict[str, Any], nodes: int | None, processes: int | None) -> dict[str, Any]:
    """The manifest with other numbers of nodes and of processes a node; None leaves a number as it is."""
    spec = dict(manifest.get("spec") or {})
    if nodes is not None:
        spec["nodes"] = nodes
    if processes is not None:
        spec["gpusPerNode" if spec.get("gpusPerNode") else "processesPerNode"] = processes
    return manifest | {"spec": spec}


def check_machine(nodes: int, gpus: int) -> None:
    """Raises UserError where a job asks for more than this machine has, naming the switch that helps."""
    if nodes > 1:
        raise UserError(
            f"spec.nodes: asks for {nodes} nodes, and this is one machine: run it with --nodes 1, or on a cluster "
            "with kubectl apply"
        )
    if gpus > (found := machine.gpu_count()):
        hint = (
            f"run it with --processes {found}" if found else "set spec.gpusPerNode to 0 to train on the CPU"
        )
        raise UserError(f"spec.gpusPerNode: asks for {gpus} GPUs, and this machine has {found}: {hint}")


def run(manifest: dict[str, Any], processes: int) -> int:
    """Train with that many processes and return the exit code; Ctrl-C saves a checkpoint first.

    A second Ctrl-C ends the processes at once.
    """
    with tempfile.TemporaryDirectory(prefix="internlm-") as folder:
        job, message = Path(folder, "job.yaml"), Path(folder, "message")
        job.write_text(yaml.safe_dump(manifest))
        environment = os.environ | {"INTERNLM_JOB_FILE": str(job), "INTERNLM_TERMINATION_LOG": str(message)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // processes)))
        # torchrun's own account of a failed process says less than the process did, in thirty lines.
        environment.setdefault("TORCHELASTIC_ERROR_FILE", str(Path(folder, "error.json")))
        # torchrun kills what has not ended 30 s after Ctrl-C; a large checkpoint takes longer to save.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(24 * 3600))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            f"--log-dir={folder}",  # torchrun leaves a folder of its own behind
        ]
        command += ["-m", "internlm_trainer.worker"]
        agent: subprocess.Popen[str] | None = None
        evaluator = _start_evaluator(environment) if manifest["spec"].get("evaluation") else None
        asked: list[int] = []

        def stop(number: int, _: object) -> None:
            asked.append(number)
            if len(asked) == 1:
                print("\nstopping after this step, and saving; Ctrl-C again to stop at once", file=sys.stderr)
                if agent:
                    agent.terminate()
                if evaluator:
                    evaluator.kill()
            elif agent:
                os.killpg(agent.pid, signal.SIGKILL)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            # In a session of its own, so that Ctrl-C reaches it through us, and once.
            agent = subprocess.Popen(
                command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
            )
            if asked:  # before there was anything to end
                agent.terminate()
            errors = _relay(agent)
            code = agent.wait()
            if evaluator:
                _end_evaluator(evaluator, training_succeeded=not code and not asked)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code and not message.exists() and not asked:
            sys.stderr.write(errors)  # nobody left a sentence: show all there is
        return exit_code(code, _reason(message), asked=bool(asked))


def _start_evaluator(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Evaluate checkpoints beside training; GPUs, and the message about the end, are the training's."""
    own = {name: value for name, value in environment.items() if name != "INTERNLM_TERMINATION_LOG"}
    return subprocess.Popen(
        [sys.executable, "-m", "internlm_trainer.evaluator", "--follow"],
        env=own | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _end_evaluator(evaluator: subprocess.Popen[bytes], *, training_succeeded: bool) -> None:
    """Wait until the last checkpoint is evaluated, if there is one; Ctrl-C ends that, too."""
    assert evaluator.stdin
    if not training_succeeded:
        evaluator.kill()
    evaluator.stdin.close()
    evaluator.wait()


def exit_code(code: int, reason: str | None, *, asked: bool) -> int:
    """What `internlm run` ends with: torchrun says 1 for every failure, `reason` is what a process said of it.

    `asked`: whether Ctrl-C was pressed, which the processes may have been too far, or broken, to answer.
    """
    if asked and reason == "Completed":
        return 0
    if reason in ("UserError", "DataError"):
        return EXIT_USER_ERROR
    if asked and reason not in ("Error", "Diverged", "StorageUnreachable"):
        return EXIT_INTERRUPTED
    return code


def _reason(message: Path) -> str | None:
    try:
        return str(json.loads(message.read_bytes())["reason"])
    except (OSError, ValueError, KeyError):
        return None  # killed before, or while, it wrote


def _relay(agent: subprocess.Popen[str]) -> str:
    """Pass on what processes write to standard error, but hold back torchrun's own lines; returns those."""
    held: list[str] = []
    ending = False  # torchrun's account of a failure is the last thing that it writes
    assert agent.stderr
    for line in agent.stderr:
        ending = ending or "elastic/multiprocessing" in line
        if ending or "torch/distributed/" in line:
            held.append(line)
        else:
            sys.stderr.write(line)
    return "".join(held)
