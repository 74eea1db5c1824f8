"""What the operator counts and limits of itself: metrics, token buckets, the log's lines."""

from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from internlm_operator import logs, metrics
from internlm_operator.kube import _verb_and_resource
from internlm_operator.limits import Buckets
from internlm_operator.times import stamp

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def status(restarts: int, running: bool, restarting: bool, since: datetime = NOW) -> dict[str, Any]:
    def condition(type: str, holds: bool) -> dict[str, str]:
        return {"type": type, "status": str(holds), "lastTransitionTime": stamp(since)}

    return {
        "restarts": restarts,
        "lastFailure": {"class": "Preemption", "reason": "Evicted"},
        "conditions": [condition("Running", running), condition("Restarting", restarting)],
    }


def test_a_restart_is_counted_once_and_its_recovery_timed_until_all_workers_run() -> None:
    restarts = value("internlm_operator_restarts_total", reason="Preemption")
    recoveries = value("internlm_operator_recovery_seconds_count")
    seconds = value("internlm_operator_recovery_seconds_sum")
    before, failed = status(0, True, False), status(1, False, True)
    metrics.note_transition(before, failed, NOW)
    metrics.note_transition(failed, failed, NOW + timedelta(seconds=5))
    metrics.note_transition(failed, status(1, True, False), NOW + timedelta(seconds=17))
    metrics.note_transition(status(1, True, False), status(1, True, False), NOW + timedelta(seconds=20))
    assert value("internlm_operator_restarts_total", reason="Preemption") == restarts + 1
    assert value("internlm_operator_recovery_seconds_count") == recoveries + 1
    assert value("internlm_operator_recovery_seconds_sum") == seconds + 17


def test_jobs_are_shown_by_the_leader_alone() -> None:
    def job(name: str, **status: Any) -> dict[str, Any]:
        return {"metadata": {"namespace": "a", "name": name}, "status": status}

    jobs = [
        job("one", phase="Running", checkpoint={"time": stamp(NOW - timedelta(seconds=90))}),
        job("two", phase="Running", goodput={"productiveSeconds": 40, "hungSeconds": 2, "furthestStep": 7}),
        job("three", phase="Failed", checkpoint={"time": stamp(NOW)}),
    ]
    leads = True
    registry = CollectorRegistry()
    registry.register(metrics.JobMetrics(lambda: jobs, lambda: leads, lambda: NOW))
    assert registry.get_sample_value("internlm_operator_jobs", {"phase": "Running"}) == 2
    assert registry.get_sample_value("internlm_operator_jobs", {"phase": "Failed"}) == 1
    labels = {"namespace": "a", "job": "one"}
    assert registry.get_sample_value("internlm_job_checkpoint_age_seconds", labels) == 90
    assert registry.get_sample_value("internlm_job_checkpoint_age_seconds", labels | {"job": "three"}) is None
    spent = labels | {"job": "two", "state": "productive"}
    assert registry.get_sample_value("internlm_job_goodput_seconds", spent) == 40
    states = {s.labels["state"] for m in registry.collect() for s in m.samples if "state" in s.labels}
    assert states == {"productive", "hung"}
    leads = False
    assert registry.get_sample_value("internlm_operator_leader") == 0
    assert registry.get_sample_value("internlm_operator_jobs", {"phase": "Running"}) is None


def test_calls_are_named_as_in_access_rules() -> None:
    pods, jobs = "/api/v1/namespaces/a/pods", "/apis/training.internlm.io/v1alpha1/internlmjobs"
    for method, path, expected in (
        ("GET", pods, ("list", "pods")),
        ("GET", f"{pods}/x", ("get", "pods")),
        ("DELETE", f"{pods}/x", ("delete", "pods")),
        ("GET", jobs, ("list", "internlmjobs")),
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", ("create", "tokenreviews")),
        ("PATCH", "/apis/g/v1/namespaces/a/internlmjobs/j/status", ("patch", "internlmjobs/status")),
    ):
        assert _verb_and_resource(method, path) == expected


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 5)), max_size=60))
def test_no_key_ever_takes_more_than_its_burst_and_its_rate(steps: list[tuple[str, float]]) -> None:
    """And it is told rightly how long to wait."""
    buckets: Buckets[str] = Buckets(rate=2.0, burst=3.0, max_keys=10)
    now, taken = 0.0, {"a": 0, "b": 0}
    for key, wait in steps:
        now += wait
        if buckets.take(key, now):
            taken[key] += 1
        else:
            assert buckets.take(key, now + buckets.wait(key, now) + 1e-6)
            taken[key] += 1
            now += buckets.wait(key, now)
        assert taken[key] <= 3 + 2 * now + 1e-6


def test_many_keys_do_not_fill_the_memory() -> None:
    buckets: Buckets[int] = Buckets(rate=1.0, burst=2.0, max_keys=100)
    for key in range(10_000):
        assert buckets.take(key, key / 1000)
    assert len(buckets._buckets) <= 100


def test_a_line_of_the_log_names_its_job() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("worker %d failed", 3, extra={"job": "a/b", "attempt": 2, "reason": "Evicted"})
    log.info("quiet")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["job"], first["attempt"], first["reason"]) == (
        "worker 3 failed", "a/b", 2, "Evicted",
    )  # fmt: skip
    assert "job" not in second
