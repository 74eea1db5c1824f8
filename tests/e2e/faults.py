"""Jobs that are hurt, one fault after the other, and what is to be true of them each time."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cluster.controlplane import wait_until
from e2e import inside
from e2e.chain import Jobs, Manifest
from e2e.misfortune import CLOCK_FOLDER, CLOCK_MAP, clock_variables
from e2e.recovery_times import Case
from e2e.watching import History, Stepped, Watcher

STEPS = int(os.environ.get("INTERNLM_FAULT_STEPS", "1500"))
EVERY_STEPS = 10
RECOVERY_SECONDS = 300
# Seconds of training that a restart and its new checkpoints cost, at most.
CYCLE_SECONDS = 15
CONFIG_MAP, FOLDER = "orders", "/opt/orders"
RANKS_OF_A_WORKER = 2


class Fault(NamedTuple):
    """Something that befalls a training process, and what the status must say of it."""

    name: str
    how: str | signal.Signals
    """One of the orders in `inside`, or a signal from outside."""
    reason: str
    text: str
    """A pattern in `lastFailure.message` or `evidence`; `RANK` stands for the rank."""
    class_: str = "Unknown"
    signal: int | None = None
    action: str = "InPlaceRestart"


STOPPED = ("Stopped", r"stopped after step \d+, which is saved", "Preemption", None, "Reschedule")
IN_PROCESSES = (
    Fault("GPU error as an exception", "gpu-error", "Error", "rank RANK: AcceleratorError: CUDA error"),
    Fault("hung kernel", "hung-kernel", "Hung", r"rank RANK hangs in step \d+, fwd_bwd.* in deadlock"),
    Fault("workload exception", "workload-exception", "Error", "rank RANK: ValueError: a mistake in the"),
    Fault("asynchronous exception", "asynchronous-exception", "Error", "rank RANK: AsynchronousError"),
    Fault("exception by a signal's handler", "exception-by-signal", "Error", "rank RANK: SignalError"),
    Fault("abort", "abort", "Killed", "rank RANK was ended by signal 6 .SIGABRT.", signal=6),
    Fault("stuck interpreter lock", "stuck-interpreter-lock", "Hung", "a call holds its interpreter"),
    Fault("segmentation fault", "segmentation-fault", "Killed", "RANK was .* signal 11 .SIGSEGV.", signal=11),
    Fault("SIGINT", signal.SIGINT, *STOPPED),
    Fault("SIGKILL", signal.SIGKILL, "Killed", "rank RANK was ended by signal 9 .SIGKILL.", signal=9),
    Fault("SIGTERM", signal.SIGTERM, *STOPPED),
    Fault("SIGSTOP", signal.SIGSTOP, "Hung", r"rank RANK hangs .* it was stopped by a signal .SIGSTOP."),
)
FULL_MEMORY = Fault(
    "container out of memory", "full-memory", "OOMKilled", "RANK was killed: .* limit", "OutOfMemory", 9
)


def manifest(jobs: Jobs, name: str, clock: int = 0) -> Manifest:
    """A job whose processes take orders, with short limits; `clock`: seconds by which theirs is ahead."""
    pod = jobs.pod()
    [container] = pod["containers"]
    folders = {CONFIG_MAP: FOLDER} | ({CLOCK_MAP: CLOCK_FOLDER} if clock else {})
    container["env"] += [{"name": "PYTHONPATH", "value": FOLDER}, *(clock_variables(clock) if clock else [])]
    for config_map, folder in folders.items():
        container["volumeMounts"] += [{"name": config_map, "mountPath": folder, "readOnly": True}]
        pod["volumes"] += [{"name": config_map, "configMap": {"name": config_map}}]
    # Both workers fit on one node, so that a gang can leave the other one; memory that one process can fill.
    container["resources"] = {"limits": {"nvidia.com/gpu": "1", "memory": "3Gi"}}
    apart = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"training.internlm.io/job-name": name}},
    }
    preference = {"weight": 100, "podAffinityTerm": apart}
    pod["affinity"] = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preference]}}
    recovery = {
        "hangTimeouts": {"setupSeconds": 300, "stepSeconds": 10, "checkpointSeconds": 30},
        # Of two nodes none can be left out.
        "excludeNodeSeconds": 0,
    }
    changes: dict[str, object] = {"training__steps": STEPS, "checkpoint__everySteps": EVERY_STEPS}
    return jobs.manifest(name, **changes, recovery=recovery, template={"spec": pod})


class Ward:
    """Jobs of one shape, a new one whenever the last has too few steps left to be hurt again."""

    def __init__(self, jobs: Jobs, watcher: Watcher) -> None:
        self.jobs, self.watcher = jobs, watcher
        self.names: list[str] = []
        self.cases: list[Case] = []
        self._admitted = 0
        self._broken = ""
        data = {"sitecustomize.py": Path(inside.__file__).read_text()}
        metadata = {"name": CONFIG_MAP, "namespace": jobs.namespace}
        jobs.cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})

    # Patients

    def admit(self, clock: int = 0) -> str:
        """Make a job, after the end of the one before; it is compared to the reference at the end."""
        self.finish()
        self._admitted += 1
        name = f"hurt-{self._admitted}"
        self.names.append(name)
        self.jobs.apply(manifest(self.jobs, name, clock))
        return name

    def finish(self) -> None:
        """Let the last job train to its end; one that a test has failed with is removed."""
        if self.names and self.names[-1] == self._broken:
            self.jobs.kubectl("delete", "ilj", self.names.pop(), "--timeout=120s")
        elif self.names:
            name = self.names[-1]
            self.until(name, lambda: self._phase(name) == "Succeeded", "its end", RECOVERY_SECONDS)

    def compare(self) -> tuple[dict[str, Any], Any]:
        """The shards of all hurt jobs' last checkpoints, and of the reference's."""
        hurt = {name: self.jobs.weights(name, STEPS) for name in self.names}
        return hurt, self.jobs.weights("whole", STEPS)

    def patient(self, seconds: float = 0.0) -> str:
        """A job in steady training, which it will still be after `seconds` and another restart."""
        name = self.names[-1] if self.names else self._broken
        if name != self._broken and self._phase(name) != "Succeeded":
            self.steady(name)
            if self.seconds_left(name) > seconds + CYCLE_SECONDS:
                return name
        name = self.admit()
        self.steady(name)
        return name

    def steady(self, name: str) -> None:
        """Wait until the newest attempt runs and has certainly saved a checkpoint."""

        def trains() -> bool:
            attempt = self.status(name).get("attempts", [{}])[-1].get("number")
            steps = [seen.step for seen in self.history(name).steps if seen.attempt == attempt]
            return (
                self._phase(name) == "Running" and len(steps) > 0 and steps[-1] - steps[0] > 2 * EVERY_STEPS
            )

        self.until(name, trains, "steady training", RECOVERY_SECONDS)

    def history(self, name: str) -> History:
        return self.watcher.jobs[name]

    def status(self, name: str) -> dict[str, Any]:
        seen = self.history(name).statuses
        return seen[-1].status if seen else {}

    def _phase(self, name: str) -> str:
        return str(self.status(name).get("phase"))

    def seconds_left(self, name: str) -> float:
        """Until the job's last step, at the speed of the newest attempt."""
        last = self.history(name).steps[-1]
        first = next(seen for seen in self.history(name).steps if seen.attempt == last.attempt)
        speed = (last.step - first.step) / max(last.time - first.time, 0.1)
        return (STEPS - last.step) / max(speed, 0.1)

    def suspend(self, name: str, value: bool) -> None:
        patch = json.dumps({"spec": {"suspend": value}})
        self.jobs.kubectl("patch", "ilj", name, "--type=merge", f"--patch={patch}")

    def until(self, name: str, reached: Callable[[], object], what: str, timeout: float) -> None:
        """Wait for it; if it cannot come, says all there is to know."""

        def look() -> bool:
            over = self._phase(name) in ("Failed", "Succeeded")
            if reached():
                return True
            if over:
                raise TimeoutError(f"it ended before {what}")
            return False

        try:
            wait_until(look, what, timeout, interval=0.1)
        except TimeoutError as error:
            self._broken = name
            raise AssertionError(f"{name}: {error}\n{self.jobs.story(name)}") from None

    # Faults

    def strike(self, name: str, fault: Fault, worker: int) -> int:
        """Let it befall a process of this worker; the rank."""
        rank = 0 if worker == 0 else (worker + 1) * RANKS_OF_A_WORKER - 1
        pid = self.watcher.workers(name)[rank].pid
        if isinstance(fault.how, signal.Signals):
            os.kill(pid, fault.how)
            return rank
        own = re.search(r"^NSpid:.*\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert own is not None
        order = Path(f"/proc/{pid}/root") / inside.ORDER.format(pid=own[1]).lstrip("/")
        draft = order.with_suffix(".new")
        draft.write_text(fault.how)
        draft.chmod(0o644)
        draft.rename(order)
        return rank

    def hurt(self, name: str, act: Callable[[], object], timeout: float = RECOVERY_SECONDS) -> Hurt:
        """Do it to the job, and wait until it has gone on by restarts."""
        history, before = self.history(name), self.status(name)
        attempt, begun = before["attempts"][-1]["number"], time.time()
        act()

        def first_step() -> Stepped | None:
            return next((seen for seen in history.steps if seen.attempt > attempt), None)

        self.until(name, first_step, "a step that had not been done before", timeout)
        first = first_step()
        assert first is not None

        def told() -> bool:
            newest = self.status(name)["attempts"][-1]
            return bool(newest["number"] >= first.attempt and newest.get("startStep") is not None)

        self.until(name, lambda: self._phase(name) == "Running" and told(), "the news of it", 60)
        later = [seen for seen in history.statuses if seen.time > begun]
        noticed = [seen.time for seen in later if seen.status["restarts"] > before["restarts"]]
        failures = {}
        for seen in later:
            if failure := seen.status.get("lastFailure"):
                failures[failure["attempt"]] = failure
        found = [failures[number] for number in sorted(failures) if number >= attempt]
        self.check(name)
        return Hurt(found, first.time - begun, noticed[0] - begun, self.status(name))

    def check(self, name: str) -> None:
        """What the status says of attempts and time agrees with itself and with what was seen."""
        job = self.jobs.job(name)
        status, history = job["status"], self.history(name)
        numbers = [attempt["number"] for attempt in status["attempts"]]
        assert numbers == sorted(set(numbers))
        for attempt in status["attempts"]:
            if attempt["number"] in history.first and attempt.get("startStep") is not None:
                assert attempt["startStep"] <= history.first[attempt["number"]], attempt
            assert attempt.get("endStep", 0) <= history.furthest, attempt
        ledger = status["goodput"]
        created, told = (
            datetime.fromisoformat(text) for text in (job["metadata"]["creationTimestamp"], ledger["asOf"])
        )
        seconds = [value for key, value in ledger.items() if key.endswith("Seconds")]
        assert sum(seconds) == round((told - created).total_seconds()), ledger
        assert min(seconds) >= 0, ledger

    def note(self, fault: str, where: str, found: Hurt, note: str = "") -> None:
        actions = ", then ".join(failure["action"] for failure in found.failures)
        self.cases.append(Case(fault, where, actions, found.recovered, found.noticed, note))

    def note_leader(self, fault: str, seconds: float) -> None:
        self.cases.append(
            Case(fault, "operator", "another leads", seconds, None, "until another replica led")
        )

    @contextmanager
    def unharmed(self, name: str, fault: str, where: str, note: str = "") -> Iterator[None]:
        """What is done meanwhile stops no worker, and training goes on; then the status is right again."""
        pods, begun = self.pods(name), time.time()
        restarts = self.status(name)["restarts"]
        yield
        ended, step = time.time(), self.history(name).furthest
        self.until(name, lambda: self.history(name).furthest > step, "a step after it", 60)
        stood = self.history(name).longest_stand(begun, time.time())
        self.until(name, lambda: told_step(self.status(name)) > step, "news after it", 120)
        heard = next(seen.time for seen in self.history(name).statuses if told_step(seen.status) > step)
        assert self.pods(name) == pods, self.jobs.story(name)
        assert self.status(name)["restarts"] == restarts
        self.check(name)
        told = f"new steps in the status {heard - ended:.1f} s after its end"
        self.cases.append(Case(fault, where, "none", stood, None, "; ".join(filter(None, (note, told)))))

    def pods(self, name: str) -> list[str]:
        """Uids of the workers."""
        return sorted(pod["metadata"]["uid"] for pod in self.jobs.objects("pods", name))

    def pod(self, name: str, worker: int) -> Manifest:
        found: Manifest = json.loads(
            self.jobs.kubectl("get", "pod", f"{name}-worker-{worker}", "--output=json")
        )
        return found

    def node_of(self, name: str, worker: int) -> str:
        return str(self.pod(name, worker)["spec"]["nodeName"])


def told_step(status: dict[str, Any]) -> int:
    return int(status.get("progress", {}).get("step", 0))


class Hurt(NamedTuple):
    """How a job went on."""

    failures: list[dict[str, Any]]
    """`status.lastFailure`, of each attempt that failed until then."""
    recovered: float
    noticed: float
    status: dict[str, Any]
