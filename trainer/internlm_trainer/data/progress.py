"""How far a long job on text is, on a terminal or in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LOG_SECONDS = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextProgress:
    """What was done so far: files and bytes of all, and tokens written."""

    stage: str
    files: int
    total_files: int
    bytes: int
    total_bytes: int
    tokens: int = 0


Report = Callable[[TextProgress], None]


def silent(_: TextProgress) -> None:
    """Reports nothing."""


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[Report]:
    """A bar on a terminal, a log line every ten seconds elsewhere; gives the function to report to."""
    console = console or Console(file=sys.stderr)
    if not console.is_terminal:
        yield _log_report()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def report(now: TextProgress) -> None:
            if now.stage not in tasks:
                task = bars.add_task(now.stage, total=now.total_bytes, detail="")
                tasks[now.stage] = task, time.monotonic()
            task, started = tasks[now.stage]
            bars.update(task, completed=now.bytes, detail=_detail(now, time.monotonic() - started))

        yield report


def _log_report() -> Report:
    started: dict[str, float] = {}
    last: dict[str, float] = {}

    def report(now: TextProgress) -> None:
        clock = time.monotonic()
        first = started.setdefault(now.stage, clock)
        ended = now.bytes >= now.total_bytes
        if ended or clock - last.get(now.stage, first) >= _LOG_SECONDS:
            last[now.stage] = clock
            logger.info("%s: %s", now.stage, _detail(now, clock - first))

    return report


def _detail(now: TextProgress, seconds: float) -> str:
    text = f"{now.files}/{now.total_files} files"
    if now.tokens:
        text += f", {now.tokens:,} tokens, {now.tokens / max(seconds, 1e-3):,.0f} tokens/s"
    return text
