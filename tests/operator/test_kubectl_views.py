"""What `kubectl internlm` draws and what it packs: pure functions of what the API gives."""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from operator_world import make_job
from rich.console import Console, RenderableType

from internlm_operator.kubectl import bundle, views
from internlm_operator.kubectl.cli import guilty_pod, rank_prefix
from internlm_operator.objects import ATTEMPT_LABEL, INDEX_LABEL

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
STATUS: dict[str, Any] = {
    "phase": "Running",
    "conditions": [{"type": "Running", "status": "True", "reason": "AllWorkersRun", "message": "All 2 run."}],
    "workers": {"desired": 2, "ready": 2},
    "progress": {
        "step": 120, "totalSteps": 400, "loss": 2.5, "tokensPerSecond": 481000, "etaSeconds": 7300,
        "lastReportTime": "2026-01-02T11:59:30Z",
    },
    "progressText": "120/400",
    "checkpoint": {"step": 100, "uri": "s3://b/step-100", "time": "2026-01-02T11:50:00Z", "bytes": 5_000_000},
    "restarts": 1,
    "attempts": [
        {"number": 1, "startTime": "2026-01-02T10:00:00Z", "endTime": "2026-01-02T11:00:00Z", "startStep": 0,
         "endStep": 90, "reason": "NodeLost"},
        {"number": 2, "startTime": "2026-01-02T11:00:00Z", "startStep": 50},
    ],
    "lastFailure": {"attempt": 1, "class": "Hardware", "reason": "NodeLost", "message": "gone", "pod": "job-worker-1",
                    "node": "gpu-17", "exitCode": 137},
    "goodput": {"asOf": "2026-01-02T12:00:00Z", "queuedSeconds": 600, "productiveSeconds": 6000, "redoneSeconds": 600,
                "checkpointStallSeconds": 0, "furthestStep": 120},
}  # fmt: skip


def job(**status: Any) -> dict[str, Any]:
    made = make_job()
    made["metadata"]["creationTimestamp"] = "2026-01-02T10:00:00Z"
    return made | {"status": STATUS | status}


def drawn(what: RenderableType, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_what_one_wants_to_know_of_a_running_job() -> None:
    header, line = drawn(views.job_table([job()], NOW)).splitlines()
    assert header.split()[:4] == ["NAME", "PHASE", "WORKERS", "STEP"]
    assert line.split() == [
        "job",
        "Running",
        "2/2",
        "120/400",
        "2.500",
        "481k",
        "10m",
        "1",
        "83%",
        "2h1m",
        "2h",
    ]


def test_jobs_that_need_somebody_come_first_with_their_reason() -> None:
    mistake = {
        "type": "Failed",
        "status": "True",
        "reason": "UserError",
        "message": "data.tokenizer: no such file",
    }
    failed = job(phase="Failed", conditions=[mistake])
    failed["metadata"]["name"] = "zebra"
    lines = drawn(
        views.job_table([job(), failed, {"metadata": {**failed["metadata"], "name": "new"}}], NOW)
    ).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["zebra", "job", "new"]
    assert "UserError: data.tokenizer: no such file" in lines[1]


def test_a_description_tells_the_failure_the_attempts_and_where_the_time_went() -> None:
    event = {
        "metadata": {},
        "type": "Warning",
        "reason": "NodeLost",
        "message": "gone",
        "lastTimestamp": "2026-01-02T11:00:00Z",
    }
    text = drawn(views.description(job(), [event], NOW))
    for part in (
        "s3://b/step-100 (step 100, 5MB, 10m old)",
        "Hardware",
        "gpu-17",
        "0-90",
        "50-120",
        "current",
        "1h NodeLost gone",
    ):
        assert part in " ".join(text.split())
    first, second = (line for line in text.splitlines() if "━" in line)
    assert first.count("━") == second.count("━") == views.TIMELINE_WIDTH // 2
    bar = next(line for line in text.splitlines() if line.startswith("....."))
    assert (bar.count("."), bar.count("#"), bar.count("=")) == (5, 50, 5)
    assert len(bar.rstrip()) == views.BAR_WIDTH
    assert "83.3%" in text


def test_a_straggler_is_told() -> None:
    progress = STATUS["progress"] | {"stragglerRank": 3, "stragglerScore": 1.4142}
    text = " ".join(drawn(views.description(job(progress=progress), [], NOW)).split())
    assert "straggler rank 3 computes 1.41 times as long as the median rank" in text


def test_a_status_of_an_older_operator_is_drawn_too() -> None:
    bare = make_job()
    for status in (
        {},
        {"phase": "Pending"},
        {"attempts": [{"number": 1, "startTime": "2026-01-02T10:00:00Z"}]},
    ):
        drawn(views.description(bare | {"status": status}, [], NOW))
        drawn(views.job_table([bare | {"status": status}], NOW))


@given(
    st.dictionaries(st.sampled_from(list(views.GOODPUT_STYLES)), st.floats(1e-3, 1e9), min_size=1),
    st.integers(1, 200),
)
def test_a_bar_is_as_wide_as_asked_and_each_part_within_a_cell_of_its_share(
    parts: dict[str, float], width: int
) -> None:
    shared = views.cells(parts, width)
    assert sum(shared.values()) == width
    for name, value in parts.items():
        assert abs(shared[name] - value / sum(parts.values()) * width) < 1


def pod(name: str = "job-worker-1", attempt: int = 1) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {ATTEMPT_LABEL: str(attempt), INDEX_LABEL: name[-1]}}}


def test_the_guilty_pod_is_of_the_attempt_that_failed_not_its_namesake() -> None:
    assert guilty_pod(job(), [pod("job-worker-0"), pod()]) == pod()
    assert guilty_pod(job(), [pod(attempt=2)]) is None
    assert guilty_pod(job(lastFailure=None), [pod()]) is None
    in_place = [{"number": 1, "startTime": ""}, {"number": 2, "startTime": "", "gang": 1}]
    failure = STATUS["lastFailure"] | {"attempt": 2}
    assert guilty_pod(job(attempts=in_place, lastFailure=failure), [pod()]) == pod()


def test_lines_carry_the_ranks_of_their_worker() -> None:
    assert rank_prefix(make_job(gpusPerNode=8), pod("job-worker-3")) == "[24-31] "
    assert rank_prefix(make_job(processesPerNode=1), pod("job-worker-3")) == "[3] "


def test_a_bundle_holds_no_secret() -> None:
    key, other = "wJalrXUtnFEMIK7MDENG", "hunter2-hunter2"
    environment = [
        {"name": "AWS_SECRET_ACCESS_KEY", "value": key},
        {"name": "MY_SETTING", "value": other},
        {"name": "NCCL_DEBUG", "value": "INFO"},
        {"name": "INTERNLM_API_TOKEN", "value": "tok-en-tok-en"},
        {"name": "FROM", "valueFrom": {"secretKeyRef": {"name": "s3-credentials", "key": "k"}}},
    ]
    template = {"spec": {"containers": [{"name": "trainer", "env": environment}]}}
    made = make_job(template=template)
    made["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/last-applied-configuration": key,
        "note": "kept",
    }
    lines = [
        *(f"connecting with {key}", "https://user:pass-word@host/x", "Authorization: Bearer abcdefghijk"),
        *("AKIAABCDEFGHIJKLMNOP", "-----BEGIN RSA PRIVATE KEY-----", "MIIE", "-----END RSA PRIVATE KEY-----"),
        *("step 10 loss 2.5", "aws_secret_access_key = abc123"),
    ]
    log = "\n".join(lines)
    packed = bundle.archive("d", bundle.files({"job.yaml": [made]}, {"logs/w.log": log}), 0.0)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        texts = {member.name: tar.extractfile(member).read().decode() for member in tar}  # type: ignore[union-attr]
    everything = "".join(texts.values())
    for secret in (key, other, "tok-en", "pass-word", "abcdefghijk", "AKIAABC", "MIIE", "abc123"):
        assert secret not in everything, secret
    assert texts.keys() == {"d/job.yaml", "d/logs/w.log"}
    for kept in ("value: INFO", "s3-credentials", "note: kept"):
        assert kept in texts["d/job.yaml"]
    assert "step 10 loss 2.5" in texts["d/logs/w.log"]
