"""Where numbers go besides log and status: TensorBoard, Weights & Biases, Prometheus; one interface for all.

Sinks live in a thread of their own.  Whatever one of them does, raise or hang, training goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from internlm_trainer.config import TrainSpec
from internlm_trainer.errors import UserError

log = logging.getLogger(__name__)

Values = Mapping[str, float]
"""Numbers of a step by name; docs/telemetry.md says what they are.  `loss/NAME` is the loss of source NAME."""

CLOSE_SECONDS = 30.0
WAITING_VALUES = 1000


class Sink(Protocol):
    """A place for numbers.  All calls come from one thread, and may raise."""

    def write(self, step: int, values: Values) -> None:
        """Take some values of a step; a step may be written more than once, with other names."""

    def close(self) -> None:
        """Nothing comes any more."""


class TensorBoard:
    """Event files."""

    def __init__(self, path: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond the checkpoint that this one resumes from is not shown.
        self._writer = SummaryWriter(path, purge_step=start_step + 1)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases: the same one after a restart."""

    def __init__(self, name: str, spec: TrainSpec) -> None:
        import wandb

        assert spec.telemetry.wandb
        self._run = wandb.init(
            project=spec.telemetry.wandb.project,
            entity=spec.telemetry.wandb.entity,
            name=name,
            id=hashlib.sha256(f"{name}\0{spec.checkpoint.path}".encode()).hexdigest()[:16],
            resume="allow",
            config=spec.model_dump(
                mode="json", by_alias=True, include={"model", "data", "training", "parallel"}
            ),
            settings=wandb.Settings(console="off", silent=True),
        )
        # By a step of their own: W&B drops what is older than its own count, as a resumed job's first steps are.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The newest values at http://HOST:PORT/metrics."""

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._newest: dict[str, float] = {}
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)

    def write(self, step: int, values: Values) -> None:
        self._newest = (
            self._newest | dict(values) | {"step": step}
        )  # anew: a scrape may be reading the old one

    def collect(self) -> Iterable[Any]:
        """The metrics, as a registry asks for them."""
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, GaugeMetricFamily] = {}
        for name, value in self._newest.items():
            metric, source = metric_of(name)
            labels = ["source"] if source else []
            family = families.setdefault(metric, GaugeMetricFamily(metric, name.split("/")[0], labels=labels))
            family.add_metric([source] if source else [], value)
        return families.values()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def metric_of(name: str) -> tuple[str, str]:
    """(Prometheus' name, source) of a value: with units as its conventions ask for, and sources as a label."""
    name, _, source = name.partition("/")
    if name.endswith("_time"):
        name = name.removesuffix("time") + "seconds"
    elif name.startswith("memory_"):
        name += "_bytes"
    return f"internlm_{'source_' if source else ''}{name}", source


class Opener(NamedTuple):
    """A sink that is asked for."""

    name: str
    open: Callable[[int], Sink]
    """Given the step that the run starts from."""


def asked_sinks(name: str, spec: TrainSpec, environment: Mapping[str, str] = os.environ) -> list[Opener]:
    """The sinks of a job.  Raises UserError where a package is missing."""
    asked, found = spec.telemetry, []
    if asked.tensorboard:
        path = asked.tensorboard.path
        _need("tensorboard", "spec.telemetry.tensorboard")
        found.append(Opener(f"TensorBoard in {path}", lambda start_step: TensorBoard(path, start_step)))
    if asked.wandb:
        _need("wandb", "spec.telemetry.wandb")
        found.append(Opener("Weights & Biases", lambda _: Wandb(name, spec)))
    port = asked.metrics_port
    if port is None:
        port = int(environment.get("INTERNLM_METRICS_PORT", "0"))
    if port:
        # A laptop's numbers are its user's; in a pod, Prometheus comes from outside.
        host = "0.0.0.0" if "INTERNLM_REPORT_URL" in environment else "127.0.0.1"  # noqa: S104
        found.append(Opener(f"metrics on port {port}", lambda _: Prometheus(host, port)))
    return found


def _need(package: str, field: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{field}: the package {package} is not installed: install it, or leave the field out"
        )


class Sinks:
    """Hands values to all sinks, in the background."""

    def __init__(self, asked: Iterable[Opener], start_step: int) -> None:
        self._asked, self._start_step = list(asked), start_step
        self._values: queue.Queue[tuple[int, Values] | None] = queue.Queue(WAITING_VALUES)
        # A daemon: a sink that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)
        if self._asked:
            self._thread.start()

    def write(self, step: int, values: Values) -> None:
        """Take over some values of a step; they are lost where sinks are a thousand steps behind."""
        with suppress(queue.Full):
            if self._asked:
                self._values.put_nowait((step, values))

    def close(self) -> None:
        """Write what is waiting, within some seconds."""
        if not self._asked:
            return
        with suppress(queue.Full):
            self._values.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            names = " and ".join(opener.name for opener in self._asked)
            log.warning("%s did not take the last values within %.0f s", names, CLOSE_SECONDS)

    def _run(self) -> None:
        sinks = [(opener.name, sink) for opener in self._asked if (sink := _open(opener, self._start_step))]
        failing: set[str] = set()
        while (item := self._values.get()) is not None:
            for name, sink in sinks:
                try:
                    sink.write(*item)
                    failing.discard(name)
                except Exception as error:
                    if name not in failing:  # once, not at every step of an outage
                        log.warning("%s does not take values: %s; training goes on", name, error)
                    failing.add(name)
        for name, sink in sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s cannot be closed: %s", name, error)


def _open(opener: Opener, start_step: int) -> Sink | None:
    try:
        return opener.open(start_step)
    except (Exception, SystemExit) as error:
        log.warning("%s cannot be opened: %s; training goes on without", opener.name, error)
        return None
