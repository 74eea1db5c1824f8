"""This project and torchtitan in turn on the same GPUs: ours, theirs, theirs, ours.

    python benchmarks/beside/beside.py e --results benchmarks/beside/results.jsonl [--torchtitan FOLDER]

Rows: InternLM-7B's width, fp32 master weights and moments, no recomputation, compiled, random tokens.  A line of JSON a
row: the medians of the last steps, `tgs` and `peer_tgs`, and their `ratio`, with card, driver, versions and commit.
--torchtitan: where torchtitan 0.2.2 and what it needs are installed, if that is not in this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SPEED = re.compile(r"step: +(\d+) .*?tps: ([\d,]+)")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
STEPS = 24


class Row(NamedTuple):
    """What is measured."""

    gpus: int
    layers: int
    seq: int
    sequences: int
    precision: str = "bf16"


ROWS = {
    "a": Row(2, 32, 2048, 8),
    "b": Row(2, 32, 8192, 2),
    "c": Row(2, 32, 2048, 8, "fp8"),
    "c-8192": Row(2, 32, 8192, 2, "fp8"),
    "e": Row(1, 8, 2048, 16),
    "e-8192": Row(1, 8, 8192, 4),
    "e-fp8": Row(1, 8, 2048, 16, "fp8"),
    "e-fp8-8192": Row(1, 8, 8192, 4, "fp8"),
}


def ours(row: Row, folder: Path) -> dict[str, Any]:
    """What `internlm bench` finds."""
    out = folder / "ours.json"
    command = [
        sys.executable,
        "-m",
        "internlm_trainer.cli",
        "bench",
        "--json",
        str(out),
        "--steps",
        str(STEPS),
    ]
    command += ["--layers", str(row.layers), "--seq", str(row.seq), "--sequences", str(row.sequences)]
    command += ["--set", f"training.precision={row.precision}", "--set", f"gpusPerNode={row.gpus}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def theirs(row: Row, folder: Path, packages: str | None) -> float:
    """Tokens per GPU per second that torchtitan logs, the median of the second half."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.gpus}"]
    command += [
        str(HERE / "torchtitan_train.py"),
        "--model.name",
        "internlm",
        "--model.flavor",
        str(row.layers),
    ]
    command += ["--training.seq_len", str(row.seq), "--training.local_batch_size", str(row.sequences)]
    command += [
        "--training.steps",
        str(STEPS),
        "--metrics.log_freq",
        "2",
        "--activation_checkpoint.mode",
        "none",
    ]
    command += ["--compile.enable", "--checkpoint.no-enable"]
    if row.precision == "fp8":
        options = ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")
        command += ["--model.converters", "quantize.linear.float8"]
        command += [f"--quantize.linear.float8.{option}" for option in options]
        command += ["--quantize.linear.float8.filter_fqns", "output"]
    environment = os.environ | ({"PYTHONPATH": packages} if packages else {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    log = COLOUR.sub("", done.stdout + done.stderr)
    speeds = [float(number.replace(",", "")) for step, number in SPEED.findall(log) if int(step) > STEPS // 2]
    if done.returncode or not speeds:
        sys.exit(f"torchtitan failed:\n{log[-4000:]}")
    return median(speeds)


def measure(name: str, packages: str | None) -> dict[str, Any]:
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        first = ours(row, Path(folder))
        peer = [theirs(row, Path(folder), packages) for _ in range(2)]
        second = ours(row, Path(folder))
    tgs, peer_tgs = mean((first["tgs"], second["tgs"])), mean(peer)
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    same = {key: first[key] for key in ("card", "driver", "torch", "mfu", "split", "memory", "stepSeconds")}
    return {
        "row": name,
        **row._asdict(),
        "tgs": round(tgs),
        "peer_tgs": round(peer_tgs),
        "ratio": round(tgs / peer_tgs, 4),
        "runs": [round(number) for number in (first["tgs"], *peer, second["tgs"])],
        "commit": commit or None,
        **same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--results", type=Path, help="file to add a line of JSON a row to")
    parser.add_argument("--torchtitan", help="folder with torchtitan's packages")
    arguments = parser.parse_args()
    for name in arguments.rows:
        line = json.dumps(measure(name, arguments.torchtitan))
        print(line, flush=True)
        if arguments.results:
            with arguments.results.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
