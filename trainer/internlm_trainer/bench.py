"""How fast this machine trains: a job on random tokens, ended before it saves anything, and what it says of itself."""

from __future__ import annotations

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import yaml

from internlm_operator.manifest import parse_spec
from internlm_trainer import config, machine
from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.errors import UserError
from internlm_trainer.plan.choose import make_plan

LOG_EVERY = 4
MICRO_BATCHES = 8
"""Of a step, at most: larger steps take their time and tell no more."""
DATA_TOKENS = 2**22
"""More are not written, but read again."""
SECTIONS = ("data", "fwd_bwd", "reduce", "optimizer")
# The width of InternLM-7B; on CPUs, what takes seconds.
GPU_SHAPE = {"layers": 32, "hiddenSize": 4096, "heads": 32, "ffnSize": 11008, "vocabSize": 103168}
CPU_SHAPE = {"layers": 4, "hiddenSize": 256, "heads": 4, "ffnSize": 768, "vocabSize": 8192}

Values = dict[str, float]
Heard = Callable[[Values], None]


class FailedError(Exception):
    """The job ended by itself; the message is its log."""


def manifest(base: dict[str, Any], settings: list[str], folder: Path) -> dict[str, Any]:
    """A job on random tokens below `folder`: `base` is a spec, of which model, training and layout are taken.

    settings: fields of the spec, as `training.precision=fp8`.  Raises UserError.
    """
    spec: dict[str, Any] = {
        name: base[name] for name in ("model", "training", "parallel", "gpusPerNode") if name in base
    }
    spec["processesPerNode"] = base.get("processesPerNode", 1)
    spec["model"] = {name: value for name, value in base["model"].items() if name != "init"}
    dropped = ("tokens", "completions", "batchRampUp", "validateEverySteps")
    spec["training"] = {name: value for name, value in base["training"].items() if name not in dropped}
    spec["training"]["steps"] = 10**6
    spec["data"] = {
        "tokenizer": str(folder / "data" / "tokenizer.model"),
        "train": [{"path": str(folder / "data")}],
    }
    spec["checkpoint"] = {"path": str(folder / "checkpoints"), "everySteps": 10**6}
    apply(spec, settings)
    kind = {"apiVersion": "training.internlm.io/v1alpha1", "kind": "InternLMJob"}
    return kind | {"metadata": {"name": "bench"}, "spec": spec}


def apply(spec: dict[str, Any], settings: list[str]) -> None:
    """Set fields of a spec, as `training.precision=fp8`.  Raises UserError."""
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise UserError(
                f"{setting}: give a field of the job's spec and its value, as training.precision=fp8"
            )
        *parents, last = path.split(".")
        place = spec
        for depth, parent in enumerate(parents, 1):
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"{path}: spec.{'.'.join(parents[:depth])} is no group of fields")
        place[last] = yaml.safe_load(value)


def default_spec(layers: int | None, seq: int, sequences: int | None, settings: list[str]) -> dict[str, Any]:
    """InternLM-7B, or as many of its layers as this machine's GPUs hold with `settings` by the plan; something small
    on CPUs.  Raises UserError."""
    gpus = machine.gpu_count()
    shape = (GPU_SHAPE if gpus else CPU_SHAPE) | {"seqLen": seq}
    spec: dict[str, Any] = {"gpusPerNode": gpus} if gpus else {"processesPerNode": 1}
    spec |= {
        "model": shape | ({"layers": layers} if layers else {}),
        "training": {
            "steps": 1,
            "microBatchSize": sequences or 1,
            "precision": "bf16" if gpus else "fp32",
            "optimizer": {"lr": 1e-4},
        },
    }
    if not gpus:
        return spec
    depths = [layers] if layers else [32, 24, 16, 8, 4, 2, 1]
    for batches in [(sequences,)] if sequences else [(16, 8, 4), (2, 1)]:
        for depth, batch in itertools.product(depths, batches):
            spec["model"]["layers"], spec["training"]["microBatchSize"] = depth, batch
            if _fits(spec, settings, gpus):
                return spec
    return spec  # what is asked for, or the least there is: the job says what is wrong with it


def _fits(spec: dict[str, Any], settings: list[str], gpus: int) -> bool:
    whole = parse_spec(manifest(spec, settings, Path("/bench"))["spec"], gpus)
    own = make_plan(whole, gpus, gpus, machine.gpu_memory() or 0).own
    return own is not None and own.memory.fits(machine.gpu_memory() or 0)


def write_data(folder: Path, words: int, tokens: int, count: int) -> None:
    """A tokenizer of `words` words and `count` random sequences of `tokens` tokens."""
    folder.mkdir()
    letters = 10  # those of the text below and what SentencePiece adds
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c"]),
            model_writer=file,
            model_type="bpe",
            vocab_size=words,
            hard_vocab_limit=False,
            user_defined_symbols=[f"<{number}>" for number in range(words - letters)],
            minloglevel=2,
        )
    random = np.random.default_rng(0)
    with write_bin(str(folder / "random.bin")) as writer:
        for _ in range(count):
            writer.write(random.integers(3, words, tokens).tolist())


def measure(job: dict[str, Any], folder: Path, steps: int, seconds: float, heard: Heard) -> dict[str, Any]:
    """Train `steps` steps, or for `seconds` after the first ones, and return what the second half of them gave.

    heard: is told the values of every log line.  Raises FailedError.
    """
    spec = parse_spec(job["spec"], None)
    shape, row = config.model_shape(spec.model), config.row_tokens(spec)
    micro_batches = min(config.gradient_accumulation(spec, spec.world_size), MICRO_BATCHES)
    tokens = micro_batches * row * spec.world_size
    every = max(1, LOG_EVERY // micro_batches)
    job["spec"]["training"] |= {"globalBatchTokens": tokens, "logEverySteps": every}
    written = max(row * spec.world_size, min((steps + 4) * tokens, DATA_TOKENS))
    write_data(folder / "data", shape.vocab_size, spec.model.seq_len, -(-written // spec.model.seq_len))
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    found: list[Values] = []
    began = 0.0
    for values in _lines(file):
        found.append(values)
        heard(values)
        began = began or time.monotonic()
        if len(found) * every >= steps or (len(found) > 2 and time.monotonic() - began > seconds):
            break
    # All of one line, so that its numbers agree.
    counted = sorted(found[len(found) // 2 :], key=lambda values: values["tgs"])
    middle = counted[len(counted) // 2]
    split = {name: middle.get(f"{name}_time", 0.0) for name in SECTIONS}
    split["other"] = max(0.0, middle["step_time"] - sum(split.values()))
    return {
        "tgs": middle["tgs"],
        "tflops": middle["tflops"],
        "mfu": middle.get("mfu"),
        "stepSeconds": middle["step_time"],
        "split": split,
        "memory": middle.get("memory_allocated") or middle["memory_rss"],
        "tokens": tokens,
        "rowTokens": row,
        "processes": spec.world_size,
        "precision": spec.training.precision,
        "steps": len(found) * every,
        "spec": {
            name: job["spec"][name] for name in ("model", "training", "parallel") if name in job["spec"]
        },
        **where(),
    }


def _lines(file: Path) -> Iterator[Values]:
    """What a job logs of its steps, until nobody asks for more: then it ends at once, without saving."""
    command = [sys.executable, "-m", "internlm_trainer.cli", "run", str(file)]
    # With an address to report to, even none, the log is JSON.
    environment = os.environ | {"INTERNLM_REPORT_URL": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    other: list[str] = []
    assert process.stdout
    try:
        for line in process.stdout:
            event = json.loads(line) if line.startswith("{") else {}
            if "tgs" in event:
                yield {name: value for name, value in event.items() if isinstance(value, int | float)}
            else:
                other.append(event.get("message", line.rstrip()))
        raise FailedError("\n".join(other))
    finally:
        # Asked twice, it ends at once.
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.wait()
        process.stdout.close()


def bandwidth(processes: int, folder: Path) -> dict[str, float]:
    """Bus bandwidth of the collectives between so many processes, in bytes a second.

    folder: where torchrun may write.  Raises FailedError.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, f"--log-dir={folder}", "-m", "internlm_trainer.bandwidth"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise FailedError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def where() -> dict[str, Any]:
    """What a measurement was made on, and with."""
    import torch

    gpus = machine.gpu_count()
    return {
        "card": torch.cuda.get_device_name() if gpus else platform.processor() or "CPU",
        "gpus": gpus,
        "driver": _driver() if gpus else None,
        "torch": torch.__version__,
        "internlm": machine.version_of("internlm-k8s"),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return None
