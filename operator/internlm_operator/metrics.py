"""What the operator measures of itself, for Prometheus; docs/operator.md explains every name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from internlm_operator.objects import Object
from internlm_operator.times import parse_time, seconds_since

REGISTRY = CollectorRegistry()
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

RECONCILE = Histogram(
    "internlm_operator_reconcile_duration_seconds",
    "Time of one look at a job, its API calls included, by result.",
    ["result"],
    buckets=_FAST,
    registry=REGISTRY,
)
QUEUE_DEPTH = Histogram(
    "internlm_operator_queue_depth",
    "Jobs that waited for their turn when one was taken.",
    buckets=(0, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000),
    registry=REGISTRY,
)
QUEUE_DELAY = Histogram(
    "internlm_operator_queue_delay_seconds",
    "Time that a job waited for its turn.",
    buckets=_FAST,
    registry=REGISTRY,
)
API_REQUESTS = Counter(
    "internlm_operator_api_requests",
    "Calls of the Kubernetes API by verb, resource and HTTP code (0: no answer); watches not included.",
    ["verb", "resource", "code"],
    registry=REGISTRY,
)
CHANNEL_REQUESTS = Counter(
    "internlm_operator_channel_requests",
    "Requests on the job channel by route and HTTP code.",
    ["route", "code"],
    registry=REGISTRY,
)
RESTARTS = Counter(
    "internlm_operator_restarts",
    "Restarts of jobs by the class or reason of the failure.",
    ["reason"],
    registry=REGISTRY,
)
RECOVERY = Histogram(
    "internlm_operator_recovery_seconds",
    "Time from a failure until all workers ran again.",
    buckets=(1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1800, 3600),
    registry=REGISTRY,
)
EVENTS_DROPPED = Counter(
    "internlm_operator_events_dropped",
    "Events that were only logged, since their job had many.",
    registry=REGISTRY,
)


def page() -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)


def note_transition(old: Object, new: Object, now: datetime) -> None:
    """Count what happened to a job between two of its statuses."""
    restarts = (new.get("restarts") or 0) - (old.get("restarts") or 0)
    if restarts > 0:
        failure = new.get("lastFailure") or {}
        RESTARTS.labels(failure.get("class") or failure.get("reason") or "Unknown").inc(restarts)
    failed_at = _true_since(old, "Restarting")
    if failed_at is not None and _true_since(new, "Restarting") is None and _true_since(new, "Running"):
        RECOVERY.observe(max(0.0, (now - failed_at).total_seconds()))


def _true_since(status: Object, type: str) -> datetime | None:
    for condition in status.get("conditions") or []:
        if condition.get("type") == type and condition.get("status") == "True":
            return parse_time(condition.get("lastTransitionTime"))
    return None


class JobMetrics(Collector):
    """Numbers of the jobs as they are when Prometheus asks; only the leader's, or each would be there twice."""

    def __init__(
        self, jobs: Callable[[], Iterable[Object]], leads: Callable[[], bool], now: Callable[[], datetime]
    ) -> None:
        self._jobs, self._leads, self._now = jobs, leads, now

    def collect(self) -> Iterable[Metric]:
        leads = self._leads()
        yield GaugeMetricFamily(
            "internlm_operator_leader", "1 on the replica that leads.", value=float(leads)
        )
        phases = GaugeMetricFamily("internlm_operator_jobs", "Jobs by phase.", labels=["phase"])
        name = ["namespace", "job"]
        age = GaugeMetricFamily(
            "internlm_job_checkpoint_age_seconds", "Age of a running job's newest checkpoint.", labels=name
        )
        goodput = GaugeMetricFamily(
            "internlm_job_goodput_seconds", "What a job's wall time went into.", labels=[*name, "state"]
        )
        counts: dict[str, int] = {}
        for job in self._jobs() if leads else ():
            status = job.get("status") or {}
            phase = str(status.get("phase") or "New")
            counts[phase] = counts.get(phase, 0) + 1
            labels = [job["metadata"]["namespace"], job["metadata"]["name"]]
            seconds = seconds_since((status.get("checkpoint") or {}).get("time"), self._now())
            if phase == "Running" and seconds is not None:
                age.add_metric(labels, max(0.0, seconds))
            for state, spent in _numbers(status.get("goodput")):
                goodput.add_metric([*labels, state], spent)
        for phase, count in counts.items():
            phases.add_metric([phase], count)
        yield from (phases, age, goodput)


def _numbers(goodput: Any) -> Iterable[tuple[str, float]]:
    if isinstance(goodput, dict):
        for state, seconds in goodput.items():
            if state.endswith("Seconds") and isinstance(seconds, int | float):
                yield state.removesuffix("Seconds"), float(seconds)
