"""Tokens per GPU per second of `internlm run` on random tokens, for models of InternLM-7B's width.

    python benchmarks/throughput.py --layers 8 --seq 2048 --sequences 16 [--trace DIR] [parallel.compile=none ...]

It trains on all GPUs of this machine, or on one CPU process, and ends the job after the given steps, so that nothing
is saved.  What follows the options are fields of the job's spec.  The last line is the median of the second half.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sentencepiece
import torch
import yaml

from internlm_trainer.data.bin_format import write_bin

LOG_EVERY = 4
STEP = re.compile(r"step (\d+)/\d+ +loss")


def job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The manifest."""
    spec: dict[str, Any] = {
        "model": {
            "layers": arguments.layers,
            "hiddenSize": arguments.hidden,
            "heads": arguments.hidden // 128,
            "ffnSize": arguments.hidden * 43 // 16,
            "vocabSize": arguments.vocab,
            "seqLen": arguments.seq,
        },
        "data": {
            "tokenizer": str(folder / "data" / "tokenizer.model"),
            "train": [{"path": str(folder / "data")}],
        },
        "training": {
            "steps": 10**6,
            "microBatchSize": arguments.sequences,
            "precision": "bf16",
            "optimizer": {"lr": 1e-4},
            "logEverySteps": LOG_EVERY,
        },
        "checkpoint": {"path": str(folder / "checkpoints"), "everySteps": 10**6},
    }
    if gpus := torch.cuda.device_count():
        spec["gpusPerNode"] = gpus
    if arguments.trace:
        first = arguments.steps // 2 - 2
        spec["telemetry"] = {"profile": {"path": arguments.trace, "firstStep": first, "steps": 1}}
    for setting in arguments.settings:
        path, _, value = setting.partition("=")
        *parents, last = path.split(".")
        place = spec
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(value)
    return {
        "apiVersion": "training.internlm.io/v1alpha1",
        "kind": "InternLMJob",
        "metadata": {"name": "throughput"},
        "spec": spec,
    }


def write_tokenizer(path: Path, words: int) -> None:
    """A tokenizer of so many words, nearly all of them made up: no text is tokenized here."""
    letters = 10  # those of the text below and what SentencePiece adds
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c"]),
            model_writer=file,
            model_type="bpe",
            vocab_size=words,
            hard_vocab_limit=False,
            user_defined_symbols=[f"<{number}>" for number in range(words - letters)],
            minloglevel=2,
        )


def write_tokens(folder: Path, arguments: argparse.Namespace) -> None:
    """Random sequences of exactly the length, enough for an epoch that is longer than the run."""
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.model", arguments.vocab)
    random = np.random.default_rng(0)
    with write_bin(str(folder / "random.bin")) as writer:
        for _ in range((arguments.steps + 4) * arguments.sequences * max(1, torch.cuda.device_count())):
            writer.write(random.integers(3, arguments.vocab, arguments.seq).tolist())


def memory_used() -> str:
    """Of all GPUs, by the driver."""
    if not torch.cuda.is_available():
        return ""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    return ", ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=103168)
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--trace", help="folder for a trace of one step")
    parser.add_argument("settings", nargs="*", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "data", arguments)
        manifest = folder / "job.yaml"
        manifest.write_text(json.dumps(job(arguments, folder)))
        command = [sys.executable, "-m", "internlm_trainer.cli", "run", str(manifest)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ends, memory = [], ""
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            if STEP.search(line):
                ends.append(time.perf_counter())
                if len(ends) * LOG_EVERY >= arguments.steps:
                    memory = memory_used()
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.1)
                    process.send_signal(signal.SIGINT)  # at once, without saving
        process.wait()
    if len(ends) * LOG_EVERY < arguments.steps:
        sys.exit("it ended before it was done")
    seconds = median(np.diff(ends)[len(ends) // 2 :]) / LOG_EVERY
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"RESULT internlm {where}: {arguments.layers} layers, {arguments.seq} x {arguments.sequences} "
        f"{' '.join(arguments.settings)}: {arguments.seq * arguments.sequences / seconds:.0f} TGS, "
        f"{seconds * 1e3:.1f} ms a step, {memory}"
    )


if __name__ == "__main__":
    main()
