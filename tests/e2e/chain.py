"""What the end-to-end tests do with jobs: apply, watch and hurt them, and read what they left behind."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import s3fs

from cluster import images
from cluster.cluster import GPU, Cluster
from cluster.controlplane import wait_until
from internlm_operator import api
from internlm_operator.api import API_VERSION, KIND

Manifest = dict[str, Any]
SECRET = "s3-credentials"
OPERATOR_NAMESPACE = "internlm-system"
# One restart costs the start of 4 processes and 2 agents on the machine's few cores.
START_SECONDS = 240
STEPS = 300


def helm(cluster: Cluster, command: str, *arguments: str) -> None:
    """Run helm in the operator's namespace; RuntimeError with its words."""
    place = (f"--kubeconfig={cluster.kubeconfig}", f"--namespace={OPERATOR_NAMESPACE}")
    done = subprocess.run(
        [str(cluster.helm), command, *arguments, *place],
        env={"PATH": "/usr/bin:/bin", "HOME": str(cluster.root)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}")


@dataclass(frozen=True)
class Jobs:
    """The jobs of one namespace, and the bucket in which their data and checkpoints are."""

    cluster: Cluster
    namespace: str
    torch_claim: str

    # Manifests

    def url(self, path: str) -> str:
        return f"s3://{self.cluster.s3.bucket}/{self.namespace}/{path}"

    def manifest(self, name: str, **changes: object) -> Manifest:
        """A small model on 2 nodes x 2 processes; `changes` are fields of the spec: `training__steps=7`."""
        spec: Manifest = {
            "nodes": 2,
            "processesPerNode": 2,
            "model": {"layers": 2, "hiddenSize": 64, "heads": 4, "vocabSize": 512, "seqLen": 128},
            "data": {
                "tokenizer": self.url("tokenizer.model"),
                "prepare": {"text": [self.url("text/**/*.txt")], "sample": "line", "validationPercent": 5},
                "train": [{"path": self.url("train")}],
                "validation": [{"path": self.url("valid")}],
            },
            "training": {
                "steps": STEPS,
                "microBatchSize": 4,
                "precision": "fp32",
                "optimizer": {"lr": 1e-3},
                "schedule": {"warmupSteps": 20, "minLr": 1e-4},
                "logEverySteps": 10,
            },
            "parallel": {"zero": {"parameters": 1, "gradients": 2, "optimizer": 4}},
            "checkpoint": {"path": self.url(f"checkpoints/{name}"), "everySteps": 50, "keep": 3},
            "recovery": {"maxRestarts": 3, "windowSeconds": 3600},
            "template": {"spec": self.pod()},
        }
        for path, value in changes.items():
            *parents, field = path.split("__")
            functools.reduce(lambda place, parent: place.setdefault(parent, {}), parents, spec)[field] = value
        metadata = {"name": name, "namespace": self.namespace}
        return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": copy.deepcopy(spec)}

    def pod(self, secret: str = SECRET) -> Manifest:
        """The part of the pods that is this cluster's: the credentials, and torch from a volume."""
        mount = {"name": "torch", "mountPath": images.TORCH_MOUNT, "readOnly": True}
        claim = {"claimName": self.torch_claim, "readOnly": True}
        container = {
            "name": "trainer",
            "imagePullPolicy": "Never",
            "envFrom": [{"secretRef": {"name": secret}}],
            # There are no devices behind these, so training runs on the CPU; they put each worker on a node.
            "resources": {"limits": {GPU: "2"}},
            # More threads than cores would only wait for each other.
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "volumeMounts": [mount],
        }
        return {"containers": [container], "volumes": [{"name": "torch", "persistentVolumeClaim": claim}]}

    # The cluster's side

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, check=check)

    def apply(self, manifest: Manifest) -> str:
        return self.cluster.kubectl("apply", "--filename=-", input=json.dumps(manifest))

    def objects(self, kinds: str, name: str) -> list[Manifest]:
        """The objects of these kinds that belong to a job."""
        selector = f"--selector=training.internlm.io/job-name={name}"
        items: list[Manifest] = json.loads(self.kubectl("get", kinds, selector, "--output=json"))["items"]
        return items

    def job(self, name: str) -> Manifest:
        found: Manifest = json.loads(self.kubectl("get", "ilj", name, "--output=json"))
        return found

    def status(self, name: str) -> Manifest:
        found: Manifest = self.job(name).get("status", {})
        return found

    def condition(self, name: str, type: str) -> Manifest:
        found: list[Manifest] = self.status(name).get("conditions", [])
        return next((c for c in found if c["type"] == type), {})

    def events(self, name: str) -> list[tuple[str, str]]:
        """(reason, message) of the job's events."""
        selector = f"--field-selector=involvedObject.name={name},involvedObject.kind={KIND}"
        found = json.loads(self.kubectl("get", "events", selector, "--output=json"))["items"]
        return [(event["reason"], event["message"]) for event in found]

    def wait(
        self, name: str, reached: Callable[[Manifest], object], what: str, timeout: float = START_SECONDS
    ) -> Manifest:
        """Wait until the job's status is as wanted; if that cannot come, says all there is to know."""
        last: Manifest = {}

        def look() -> bool:
            last.clear()
            last.update(self.status(name))
            if reached(last):
                return True
            if last.get("phase") in ("Failed", "Succeeded"):
                raise AssertionError(f"{name} ended before {what}\n{self.story(name)}")
            return False

        try:
            wait_until(look, what, timeout, interval=0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.story(name)}") from None
        return last

    def wait_phase(self, name: str, phase: str, timeout: float = START_SECONDS) -> Manifest:
        return self.wait(name, lambda status: status.get("phase") == phase, f"{name} to be {phase}", timeout)

    def story(self, name: str) -> str:
        """The status, events and logs, for a failed test's message."""
        parts = [json.dumps(self.status(name), indent=1)]
        parts += [f"{reason}: {message}" for reason, message in self.events(name)]
        for pod in self.objects("pods", name):
            pod_name = pod["metadata"]["name"]
            parts.append(f"--- {pod_name}\n" + self.kubectl("logs", pod_name, "--tail=40", check=False))
        return "\n".join(parts)

    @contextmanager
    def watched(self, file: Path) -> Iterator[None]:
        """Record what `kubectl get ilj --watch` prints."""
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        environment["KUBECONFIG"] = str(self.cluster.kubeconfig)
        command = [str(self.cluster.root / "bin" / "kubectl"), "get", "ilj", "--watch"]
        # A job that waits for nothing is printed at once: from then on, nothing is missed.
        self.apply(self.manifest("bystander", suspend=True))
        with file.open("w") as output:
            watch = subprocess.Popen(
                [*command, f"--namespace={self.namespace}"], stdout=output, env=environment
            )
            try:
                wait_until(lambda: "bystander" in file.read_text(), "the watch to begin", 30)
                yield
                wait_until(lambda: self._prints_no_more(file), "the watch to end", 30)
            finally:
                watch.terminate()
                watch.wait()
                self.kubectl("delete", "ilj", "bystander")

    def _prints_no_more(self, file: Path) -> bool:
        size = file.stat().st_size
        time.sleep(1)
        return file.stat().st_size == size

    # Misfortune

    def training_processes(self, name: str, index: int) -> list[int]:
        """The training processes of a worker, without their agent."""
        pids = self.cluster.container_pids(self.namespace, f"{name}-worker-{index}", "trainer")
        found = []
        for pid in pids[1:]:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"internlm_trainer.worker" in arguments:
                found.append(pid)
        return found

    def kill_a_training_process(self, name: str, index: int) -> None:
        os.kill(self.training_processes(name, index)[-1], signal.SIGKILL)

    # The store's side

    @property
    def store(self) -> s3fs.S3FileSystem:
        s3 = self.cluster.s3
        return s3fs.S3FileSystem(
            key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint, use_listings_cache=False
        )

    def weights(self, name: str, step: int) -> list[tuple[str, str]]:
        """(rank, digest) of the shards of a job's checkpoint: the fp32 weights and the optimizer's states."""
        folder = self.url(f"checkpoints/{name}/step-{step:08d}")
        manifest = json.loads(self.store.cat(f"{folder}/manifest.json"))
        return [(shard["file"][: len("shard-00000")], shard["digest"]) for shard in manifest["shards"]]


@dataclass(frozen=True)
class Row:
    """A line of `kubectl get ilj`."""

    phase: str
    step: int
    loss: float | None


def rows(printed: str, name: str) -> list[Row]:
    """What `kubectl get ilj --watch` printed about one job, line by line.

    Each line has column widths of its own, and what is not known yet is left empty, so the values are found
    by their shape.
    """
    found = []
    for line in printed.splitlines():
        if line.split()[0] == name:
            phase = re.search(f" ({'|'.join(get_args(api.Phase))}) ", line)
            step = re.search(r" (\d+)/\d+ +(\d+\.\d+)?", line)
            loss = float(step[2]) if step and step[2] else None
            found.append(Row(phase[1] if phase else "", int(step[1]) if step else 0, loss))
    return found
