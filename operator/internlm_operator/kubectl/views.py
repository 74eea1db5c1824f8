"""How jobs look on a terminal: pure functions from what the API gives to what rich draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from internlm_operator.objects import Object
from internlm_operator.times import duration, parse_time, seconds_since

PHASE_STYLES = {
    "Running": "green",
    "Succeeded": "green",
    "Failed": "bold red",
    "Restarting": "yellow",
    "Suspending": "yellow",
}
# In the order of a job's life; what is not named here comes after.
GOODPUT_STYLES = {
    "queued": "bright_black",
    "scheduling": "blue",
    "image pull": "cyan",
    "rendezvous": "bright_blue",
    "load": "bright_cyan",
    "productive": "green",
    "redone": "yellow",
    "checkpoint stall": "magenta",
    "hung": "red",
    "restarting": "bright_red",
    "suspended": "white",
}
# Bars differ in their signs too, for a terminal without colours.
GOODPUT_SIGNS = dict(zip(GOODPUT_STYLES, ".:-~+#=%!*_", strict=True))
BAR_WIDTH = 60
TIMELINE_WIDTH = 32
EVENTS = 8


def quantity(number: float | None) -> str:
    """`481k`, `3.76k`, `512`; empty for None."""
    if number is None:
        return ""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def job_table(jobs: Iterable[Object], now: datetime, namespaces: bool = False) -> Table:
    """A line for each job, those that need somebody first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("NAMESPACE",) * namespaces + ("NAME", "PHASE"):
        table.add_column(name, no_wrap=True)
    for name in (
        "WORKERS",
        "STEP",
        "LOSS",
        "TOK/S",
        "TFLOPS/GPU",
        "CHECKPOINT",
        "RESTARTS",
        "GOODPUT",
        "ETA",
        "AGE",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("WHY", no_wrap=True, overflow="ellipsis")
    order = {"Failed": 0, "Restarting": 1, "Pending": 2, "Starting": 3, "Running": 4}
    for job in sorted(jobs, key=lambda job: (order.get(_status(job).get("phase", ""), 9), _name(job))):
        table.add_row(*_row(job, now, namespaces))
    return table


def _row(job: Object, now: datetime, namespaces: bool) -> list[RenderableType]:
    status = _status(job)
    progress: Object = status.get("progress") or {}
    workers: Object = status.get("workers") or {}
    ended = parse_time(status.get("completionTime"))
    share = productive_share(status)
    running = status.get("phase") == "Running"
    return [
        *([job["metadata"]["namespace"]] if namespaces else []),
        _name(job),
        phase(status),
        f"{workers.get('ready', 0)}/{workers.get('desired', 0)}" if workers else "",
        status.get("progressText", ""),
        f"{progress['loss']:.3f}" if progress.get("loss") is not None else "",
        quantity(progress.get("tokensPerSecond")) if running else "",
        quantity(progress.get("tflopsPerGpu")) if running else "",
        duration(seconds_since((status.get("checkpoint") or {}).get("time"), ended or now)),
        str(status.get("restarts", 0)),
        f"{share:.0%}" if share is not None else "",
        duration(progress.get("etaSeconds")) if running else "",
        duration(seconds_since(job["metadata"].get("creationTimestamp"), now)),
        "" if running else why(status),
    ]


def phase(status: Object) -> Text:
    word = status.get("phase", "")
    return Text(word, style=PHASE_STYLES.get(word, ""))


def why(status: Object) -> str:
    """The sentence of the condition that decides on the phase; empty where there is none."""
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    for type in ("Failed", "Succeeded", "Suspended", "Restarting"):
        if conditions.get(type, {}).get("status") == "True":
            return _reason(conditions[type])
    return _reason(conditions["Running"]) if "Running" in conditions else ""


def _reason(condition: Object) -> str:
    reason, message = condition.get("reason", ""), condition.get("message", "")
    return f"{reason}: {message}" if message and message != reason else reason


def productive_share(status: Object) -> float | None:
    """Share of the job's time that went into steps done for the first time; None where it is not counted."""
    parts = goodput(status)
    total = sum(parts.values())
    return parts.get("productive", 0) / total if total else None


def goodput(status: Object) -> dict[str, float]:
    """Seconds by what they went into, in the order of a job's life; what took none is left out."""
    found = {
        _words(name.removesuffix("Seconds")): float(value)
        for name, value in (status.get("goodput") or {}).items()
        if name.endswith("Seconds") and isinstance(value, int | float) and value > 0
    }
    order = list(GOODPUT_STYLES)
    return dict(
        sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    )


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])[A-Z]", lambda match: f" {match[0].lower()}", name)


def cells(parts: Mapping[str, float], width: int) -> dict[str, int]:
    """Shares a bar of `width` cells out by largest remainder: the cells add up to it, order is kept."""
    total = sum(parts.values())
    if total <= 0:
        return dict.fromkeys(parts, 0)
    exact = {name: value / total * width for name, value in parts.items()}
    found = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(parts, key=lambda name: found[name] - exact[name])
    for name in by_remainder[: width - sum(found.values())]:
        found[name] += 1
    return found


def goodput_bar(status: Object) -> RenderableType | None:
    """One bar of all the job's time, and what its signs mean; None where it is not counted."""
    parts = goodput(status)
    if not parts:
        return None
    bar = Text()
    for name, count in cells(parts, BAR_WIDTH).items():
        bar.append(_sign(name) * count, style=GOODPUT_STYLES.get(name, ""))
    legend = Table(box=None, pad_edge=False, show_header=False)
    total = sum(parts.values())
    for name, seconds in parts.items():
        sign = Text(_sign(name), style=GOODPUT_STYLES.get(name, ""))
        legend.add_row(sign, name, duration(seconds), f"{seconds / total:.1%}")
    return Group(Text("Goodput", style="bold"), bar, legend)


def _sign(name: str) -> str:
    return GOODPUT_SIGNS.get(name, "?")


def timeline(job: Object, now: datetime) -> Table:
    """A line for each attempt that the status still has, with its place in the job's time."""
    status = _status(job)
    attempts = status.get("attempts") or []
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ATTEMPT", "START", "TOOK", "STEPS"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("END")
    end = parse_time(status.get("completionTime")) or now
    start = parse_time(attempts[0]["startTime"]) if attempts else None
    for attempt in attempts:
        began, ended = parse_time(attempt["startTime"]), parse_time(attempt.get("endTime")) or end
        if began is None or start is None:
            continue
        reason = attempt.get("reason") or ("" if attempt.get("endTime") else "current")
        table.add_row(
            str(attempt["number"]),
            f"{began:%m-%d %H:%M:%S}",
            duration((ended - began).total_seconds()),
            _steps(attempt, status),
            Text(_segment(start, began, ended, end), style=_attempt_style(attempt)),
            reason,
        )
    return table


def _segment(start: datetime, began: datetime, ended: datetime, end: datetime) -> str:
    whole = max((end - start).total_seconds(), 1.0)
    first = min(int((began - start).total_seconds() / whole * TIMELINE_WIDTH), TIMELINE_WIDTH - 1)
    last = max(first + 1, round((ended - start).total_seconds() / whole * TIMELINE_WIDTH))
    return ("·" * first + "━" * (last - first)).ljust(TIMELINE_WIDTH, "·")


def _steps(attempt: Object, status: Object) -> str:
    first, last = attempt.get("startStep"), attempt.get("endStep")
    if last is None and not attempt.get("endTime"):
        last = (status.get("progress") or {}).get("step")
    return (
        ""
        if first is None and last is None
        else f"{'?' if first is None else first}-{'?' if last is None else last}"
    )


def _attempt_style(attempt: Object) -> str:
    """Green for one that goes on or is done, yellow for one that was ended from outside, red for one that failed."""
    if attempt.get("reason", "") in ("", "Completed"):
        return "green"
    return "yellow" if attempt.get("class", "Preemption") == "Preemption" else "red"


def description(job: Object, events: list[Object], now: datetime) -> Group:
    """All that there is to say about a job, the most important first."""
    status = _status(job)
    head = Text.assemble((_name(job), "bold"), "  ", phase(status), "  ", status.get("progressText", ""))
    parts: list[RenderableType] = [head]
    if sentence := why(status):
        parts.append(Text(sentence))
    parts.append(_facts(status, now))
    if failure := status.get("lastFailure"):
        parts += [Text("\nLast failure", style="bold"), _failure(failure)]
    if status.get("attempts"):
        parts += [Text(""), timeline(job, now)]
    if bar := goodput_bar(status):
        parts += [Text(""), bar]
    if events:
        parts += [Text("\nEvents", style="bold"), event_table(events, now)]
    return Group(*parts)


def _facts(status: Object, now: datetime) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    progress, checkpoint = status.get("progress") or {}, status.get("checkpoint") or {}
    if progress:
        speed = (
            f"{quantity(progress.get('tokensPerSecond'))} tokens/s" if progress.get("tokensPerSecond") else ""
        )
        loss = f"loss {progress['loss']:.4f}" if progress.get("loss") is not None else ""
        reported = duration(seconds_since(progress.get("lastReportTime"), now))
        said = f"reported {reported} ago" if reported else ""
        eta = f"ETA {duration(progress['etaSeconds'])}" if progress.get("etaSeconds") is not None else ""
        table.add_row("progress", ", ".join(filter(None, (loss, speed, eta, said))))
        if (rank := progress.get("stragglerRank")) is not None:
            times = f"{progress.get('stragglerScore', 0):.2f} times as long as the median rank"
            table.add_row("straggler", f"rank {rank} computes {times}")
    if checkpoint:
        age = duration(seconds_since(checkpoint.get("time"), now))
        size = f"{quantity(checkpoint['bytes'])}B, " if checkpoint.get("bytes") else ""
        table.add_row("checkpoint", Text(f"{checkpoint['uri']} (step {checkpoint['step']}, {size}{age} old)"))
    if nodes := status.get("excludedNodes"):
        table.add_row("nodes left out", ", ".join(node["node"] for node in nodes))
    return table


def _failure(failure: Object) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in (
        "class",
        "reason",
        "message",
        "evidence",
        "rank",
        "pod",
        "node",
        "exitCode",
        "signal",
        "action",
        "lostSteps",
    ):
        if failure.get(name) not in (None, ""):
            table.add_row(_words(name), Text(str(failure[name])))
    return table


def event_table(events: list[Object], now: datetime) -> Table:
    """The newest events, oldest first."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for event in sorted(events, key=event_time)[-EVENTS:]:
        table.add_row(
            duration(seconds_since(event_time(event), now)),
            Text(event.get("reason") or "", style="yellow" if event.get("type") == "Warning" else ""),
            Text(" ".join((event.get("message") or "").split())),
        )
    return table


def event_time(event: Object) -> str:
    return str(
        event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )


def _status(job: Object) -> dict[str, Any]:
    return job.get("status") or {}


def _name(job: Object) -> str:
    return str(job["metadata"]["name"])
