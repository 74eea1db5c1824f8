"""Train a job with `internlm run`, killing its training process twice on the way, and keep its loss curve.

    python benchmarks/loss_curve/run.py JOB.yaml OUT.csv [--kills 2]

The processes get SIGKILL at equal shares of the steps; each time the same command goes on from the newest checkpoint.
Losses of steps that were done twice are the later ones, which is what the final weights come from.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from internlm_operator.manifest import load_manifests, parse_job

STEP = re.compile(r"step (\d+)/\d+ +loss ([\d.]+) +(\S+) tokens/s")
VALIDATION = re.compile(r"validation loss ([\d.]+)")


def workers(pid: int) -> list[int]:
    """Training processes below a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [
        int(c) for c in children if b"internlm_trainer.worker" in Path(f"/proc/{c}/cmdline").read_bytes()
    ]
    agents = [int(c) for c in children if b"torch.distributed.run" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return [w for agent in agents for w in workers(agent)] + [c for c in found if c not in agents]


def attempt(job: Path, kill_at: int | None, losses: dict[int, float], validation: dict[int, float]) -> int:
    """One `internlm run`, killed after step `kill_at`; its exit code."""
    command = [sys.executable, "-m", "internlm_trainer.cli", "run", str(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    step = 0
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := STEP.search(line):
            step = int(found[1])
            losses[step] = float(found[2])
            if kill_at and step >= kill_at:
                for pid in workers(process.pid):
                    os.kill(pid, signal.SIGKILL)
                kill_at = None
                print(f"--- killed at step {step}", flush=True)
        elif found := VALIDATION.search(line):
            validation[step] = float(found[1])
    return process.wait()


def main() -> None:
    """Train to the end and write (step, loss, validation loss)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=2)
    arguments = parser.parse_args()
    steps = parse_job(load_manifests(arguments.job)[0]).spec.training.steps
    assert steps
    losses: dict[int, float] = {}
    validation: dict[int, float] = {}
    for kill in range(1, arguments.kills + 1):
        # Not at a checkpoint: the steps since the last one are lost, and done again.
        kill_at = steps * kill // (arguments.kills + 1) + 3
        code = attempt(arguments.job, kill_at, losses, validation)
        if max(losses, default=0) < kill_at or code == 0:
            sys.exit(f"ended with {code} before it could be killed at step {kill_at}")
    if code := attempt(arguments.job, None, losses, validation):
        sys.exit(code)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss", "validation_loss"))
        writer.writerows((step, losses[step], validation.get(step, "")) for step in sorted(losses))


if __name__ == "__main__":
    main()
