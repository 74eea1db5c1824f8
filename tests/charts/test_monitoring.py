"""Alerts, dashboard and monitors: they parse, and they name what operator and trainer really serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import promql_parser
import pytest
import yaml

from charts.chart import CHART, ROOT, render
from internlm_operator import metrics
from internlm_operator.objects import JOB_LABEL
from internlm_trainer.telemetry.sinks import metric_of

ALERTS: dict[str, Any] = yaml.safe_load((CHART / "monitoring" / "alerts.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((CHART / "monitoring" / "dashboard.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [t["expr"] for panel in PANELS for t in panel["targets"]]


def operator_names() -> Iterator[str]:
    """Names of the samples that Prometheus finds at the operator."""
    status = {
        "phase": "Running",
        "checkpoint": {"time": "2026-01-01T00:00:00Z"},
        "goodput": {"queuedSeconds": 1},
    }
    job = {"metadata": {"name": "a", "namespace": "b"}, "status": status}
    jobs = metrics.JobMetrics(lambda: [job], lambda: True, lambda: datetime.now(UTC))
    for family in [*metrics.REGISTRY.collect(), *jobs.collect()]:
        yield family.name
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [])
        yield from (family.name + suffix for suffix in suffixes)


def trainer_names() -> set[str]:
    """Names of the samples that Prometheus finds at worker 0: from the fields of the log that docs/telemetry.md has."""
    page = (ROOT / "docs" / "telemetry.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return {metric_of(field)[0] for row in rows for field in re.findall(r"`([a-z_0-9/NAME]+)`", row)}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_parses_and_names_what_is_served(expression: str) -> None:
    expression = expression.replace("$namespace", ".*").replace("$job", ".*")
    promql_parser.parse(expression)
    used = set(re.findall(r"\binternlm_\w+", re.sub(r'"[^"]*"|\([a-z_, ]+\) \(', "", expression)))
    assert used
    assert used <= {*operator_names(), *trainer_names()}


def test_the_documented_metrics_are_those_that_the_operator_serves() -> None:
    page = (ROOT / "docs" / "operator.md").read_text()
    documented = set(re.findall(r"^\| `(internlm_\w+)` \|", page, re.MULTILINE))
    jobs = metrics.JobMetrics(list, lambda: True, lambda: datetime.now(UTC))
    served = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in [*metrics.REGISTRY.collect(), *jobs.collect()]
    }
    assert documented == served


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_dashboards_panels_do_not_overlap() -> None:
    places = [[p["gridPos"][k] for k in "xywh"] for p in DASHBOARD["panels"]]
    cells = [
        (column, line) for x, y, w, h in places for column in range(x, x + w) for line in range(y, y + h)
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_monitors_find_their_ports_and_the_files_arrive_whole(helm: str) -> None:
    names = ("serviceMonitor", "podMonitor", "rules", "dashboard")
    made = {o["kind"]: o for o in render(helm, *(f"--set=monitoring.{name}.enabled=true" for name in names))}
    service, endpoint = made["Service"], made["ServiceMonitor"]["spec"]["endpoints"][0]
    assert (
        made["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        <= service["metadata"]["labels"].items()
    )
    [port] = [p for p in service["spec"]["ports"] if p["name"] == endpoint["port"]]
    [container] = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert port["targetPort"] in {p["name"] for p in container["ports"]}
    pods = made["PodMonitor"]["spec"]
    assert pods["podTargetLabels"] == [JOB_LABEL]
    assert pods["podMetricsEndpoints"][0]["port"] == "metrics"
    assert made["PrometheusRule"]["spec"] == ALERTS
    assert json.loads(made["ConfigMap"]["data"]["internlm-jobs.json"]) == DASHBOARD
