"""What evaluations of a job's checkpoints found, in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from internlm_trainer.checkpoint.format import time_string
from internlm_trainer.errors import UserError
from internlm_trainer.evaluation.run import Result, found_in
from internlm_trainer.storage import join, open_fs, user_errors, write_whole

FILE = "evaluations.jsonl"
WHAT = "the history of evaluations"
Entry = dict[str, Any]


def read(url: str) -> list[Entry]:
    """The entries of a folder of checkpoints, oldest first; none where nothing was evaluated."""
    file = join(url, FILE)
    fs, path = open_fs(file)
    with user_errors(file, WHAT):
        try:
            content: bytes = fs.cat_file(path)
        except FileNotFoundError:
            return []
    try:
        entries = [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise UserError(f"{file}: is no history of evaluations ({error}); move it away") from error
    return entries


def evaluated_step(entries: Iterable[Entry]) -> int:
    """The last step that was evaluated; 0 for none."""
    return max((int(entry["step"]) for entry in entries), default=0)


def add(url: str, step: int, results: Iterable[Result]) -> None:
    """Note what came of a checkpoint, in place of what an earlier try of it did.  One process at a time does this."""
    time = time_string(datetime.now(UTC))
    new = [{"step": step, "time": time, **result._asdict()} for result in results]
    kept = [entry for entry in read(url) if entry["step"] != step]
    file = join(url, FILE)
    with user_errors(file, WHAT), write_whole(file) as out:
        out.write("".join(json.dumps(entry) + "\n" for entry in [*kept, *new]).encode())


def courses(entries: Iterable[Entry]) -> dict[str, list[tuple[int, float]]]:
    """Each metric's values by step, under `task metric`; standard errors are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in sorted(entries, key=lambda entry: entry["step"]):
        for metric, value in found_in(entry["metrics"]).items():
            found.setdefault(f"{entry['task']} {metric}", []).append((entry["step"], value))
    return found
