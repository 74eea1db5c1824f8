"""The page that a run of the faults writes: how long each took to be noticed and to be recovered from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import pytest

PASSED = pytest.StashKey[set[str]]()
"""Ids of the tests that passed so far."""


class Case(NamedTuple):
    """One fault that was recovered from, to the bit."""

    fault: str
    where: str
    action: str
    """What `status.lastFailure.action` says, or in words what was done."""
    recovered: float
    """Seconds from the fault until the first step that had not been done before; where training went on, the longest
    time between two such steps."""
    noticed: float | None = None
    """Seconds from the fault until the status told of it."""
    note: str = ""


class Run(NamedTuple):
    """Where and of what the times are."""

    date: str
    commit: str
    machine: str
    job: str


PAGE = """\
# Time to recover

Written by `make faults`, which hurts jobs on a real cluster of two nodes in every way below, one after the other. A row
is here only if the job went on by itself, its status named the failure and what was done about it, and its last
checkpoint is, digest by digest, that of the same job without faults.

- {date}, commit `{commit}`
- {machine}
- {job}

The times are those of a small machine, most of them the start of four Python processes on it, and of short limits for
hangs (10 s in a step). `noticed` is the time from the fault until the job's status told of it, `recovered` until the
first step that had not been done before; p50 and max over n times. Where no worker was restarted, `recovered` is the
longest time that training stood still.

{cases}

## By what was done

{actions}
{missing}"""


def page(run: Run, cases: Iterable[Case], not_seen: Iterable[str]) -> str:
    """The whole page. `not_seen`: faults that this run did not recover from, or did not try, in words."""
    cases, not_seen = list(cases), list(not_seen)
    missing = "\n## Not in this run\n\n" + "".join(f"- {fault}\n" for fault in not_seen) if not_seen else ""
    return PAGE.format(**run._asdict(), cases=_by_fault(cases), actions=_by_action(cases), missing=missing)


def _by_fault(cases: list[Case]) -> str:
    rows = []
    for fault, action in dict.fromkeys((case.fault, case.action) for case in cases):
        same = [case for case in cases if (case.fault, case.action) == (fault, action)]
        where = ", ".join(dict.fromkeys(case.where for case in same))
        note = "; ".join(dict.fromkeys(case.note for case in same if case.note))
        noticed = [case.noticed for case in same if case.noticed is not None]
        rows.append([fault, where, str(len(same)), action, *_times(noticed), *_times(recovered(same)), note])
    return _table(
        [
            *("fault", "where", "n", "what was done", "noticed, p50 s", "max s"),
            *("recovered, p50 s", "max s", ""),
        ],
        rows,
    )


def _by_action(cases: list[Case]) -> str:
    rows = []
    for action in dict.fromkeys(case.action for case in cases):
        same = [case for case in cases if case.action == action]
        rows.append([action, str(len(same)), *_times(recovered(same))])
    return _table(["what was done", "n", "recovered, p50 s", "max s"], rows)


def recovered(cases: list[Case]) -> list[float]:
    return [case.recovered for case in cases]


def _times(seconds: list[float]) -> list[str]:
    return [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
