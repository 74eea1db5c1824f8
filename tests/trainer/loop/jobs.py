"""Small jobs in real processes: what tests of the loop describe, start, watch and read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ports import free_port

STEPS, EVERY = 120, 20
WORKER = "internlm_trainer.worker"


@dataclass(frozen=True)
class Corpus:
    """Tokenized text and its tokenizer."""

    tokenizer: Path
    train: Path
    validation: Path


@dataclass
class TinyJob:
    """A job of two layers on `corpus`, with its files below `folder`."""

    corpus: Corpus
    folder: Path
    processes: int = 2
    zero: tuple[int, int, int] = (1, 1, 2)
    name: str = "tiny"
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def manifest(self) -> dict[str, Any]:
        """The job as a user would write it; the dicts given override single fields."""
        parameters, gradients, optimizer = self.zero
        spec = {
            "processesPerNode": self.processes,
            "model": {
                "layers": 2,
                "hiddenSize": 32,
                "heads": 4,
                "ffnSize": 64,
                "vocabSize": 512,
                "seqLen": 64,
            }
            | self.model,
            "data": {
                "tokenizer": str(self.corpus.tokenizer),
                "train": [{"path": str(self.corpus.train)}],
                "validation": [{"path": str(self.corpus.validation)}],
            }
            | self.data,
            "training": {
                "steps": STEPS,
                "globalBatchTokens": 512,
                "microBatchSize": 2,
                "precision": "fp32",
                "optimizer": {"lr": 0.01},
                "schedule": {"warmupSteps": 10, "minLr": 0.001},
                "validationRows": 8,
                "logEverySteps": 1,
            }
            | self.training,
            "parallel": {
                "zero": {"parameters": parameters, "gradients": gradients, "optimizer": optimizer},
            }
            | self.parallel,
            # Steps of a millisecond would overtake saves beside training, and which of them are taken would be chance.
            "checkpoint": {"path": str(self.checkpoints), "everySteps": EVERY, "async": False}
            | self.checkpoint,
            "telemetry": self.telemetry,
            "recovery": self.recovery,
        }
        if self.evaluation:
            spec["evaluation"] = self.evaluation
        return {
            "apiVersion": "training.internlm.io/v1alpha1",
            "kind": "InternLMJob",
            "metadata": {"name": self.name},
            "spec": spec,
        }

    def write(self) -> Path:
        """The manifest's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "job.yaml"
        file.write_text(yaml.safe_dump(self.manifest()))
        return file

    def torchrun(self, **environment: str) -> Running:
        """The job's processes, as a pod starts them."""
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        return self._start([*command, "-m", WORKER], environment)

    def agent(self, **environment: str) -> Running:
        """The job's processes below the agent, as a pod has them."""
        place = [f"--nproc-per-node={self.processes}", f"--master-port={free_port()}"]
        return self._start(["-m", "internlm_trainer.agent", *place], environment)

    def alone(self, **environment: str) -> Running:
        """The job's only process, without torchrun."""
        assert self.processes == 1
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        return self._start(["-m", WORKER], place | {"MASTER_PORT": str(free_port())} | environment)

    def internlm_run(self, *options: str) -> Running:
        """`internlm run`."""
        return self._start(["-m", "internlm_trainer.cli", "run", str(self.write()), *options], {})

    def _start(self, arguments: list[str], environment: dict[str, str]) -> Running:
        job = self.write()
        number = len(list(self.folder.glob("log-*")))
        message = self.folder / f"message-{number}"
        own = {"INTERNLM_JOB_FILE": str(job), "INTERNLM_TERMINATION_LOG": str(message)}
        log = self.folder / f"log-{number}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | own | environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return Running(process, log, message)


@dataclass
class Running:
    """Processes at work, with what they print and the message that they leave."""

    process: subprocess.Popen[bytes]
    log_file: Path
    message_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def message(self) -> dict[str, Any]:
        """The termination message."""
        message: dict[str, Any] = json.loads(self.message_file.read_text())
        return message

    def wait_for(self, text: str) -> None:
        """Until the log has `text`."""
        end = time.monotonic() + 200
        while text not in self.log:
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.log}"
            assert time.monotonic() < end, f"no {text!r}:\n{self.log}"
            time.sleep(0.005)

    def workers(self) -> list[int]:
        """Process ids of the training processes below torchrun."""
        found = []
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                if WORKER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]:
                    found.append(pid)
        return found

    def end(self) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(250)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.log}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End what is left of it."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            if self.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


def descendants(pid: int) -> list[int]:
    """A process's children, their children and so on."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in descendants(child)]


def steps(checkpoints: Path) -> list[int]:
    """Steps that are saved."""
    return sorted(int(file.parent.name.removeprefix("step-")) for file in checkpoints.glob("*/manifest.json"))


def weights(checkpoints: Path, step: int = STEPS) -> list[str]:
    """Digests of a checkpoint's shards: weights and optimizer states, to the bit."""
    manifest = json.loads((checkpoints / f"step-{step:08d}" / "manifest.json").read_text())
    return [shard["digest"] for shard in manifest["shards"]]


def losses(log: str) -> dict[int, float]:
    """The losses in a log, by step."""
    found = {}
    for line in log.splitlines():
        if line.startswith("{"):
            event = json.loads(line)
            if "loss" in event:
                found[int(event["step"])] = float(event["loss"])
        elif "  loss " in line:
            words = line.split()
            found[int(words[words.index("step") + 1].split("/")[0])] = float(words[words.index("loss") + 1])
    return found
