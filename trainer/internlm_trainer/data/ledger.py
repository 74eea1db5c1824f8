"""The token ledger: what a job has consumed of each source, exactly, read from a checkpoint's data state.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One source's account.

    rows, tokens: taken from it so far, in all epochs, those that were skipped included.  skipped_rows: drawn and
    thrown away (`data.skipSteps`).  epoch, row: where it is: whole epochs behind it, and rows of the one at hand.
    rows_of_epoch: None in states of before this was written down.
    """

    path: str
    weight: float
    fingerprint: str
    rows: int
    tokens: int
    skipped_rows: int
    rows_of_epoch: int | None
    epoch: int | None
    row: int | None


def entries(state: Mapping[str, Any]) -> list[Entry]:
    """The accounts in a loader's `state_dict`."""
    accounts = []
    for source in state["sources"]:
        rows, of_epoch = int(source["rows"]), source.get("rowsOfEpoch")
        epoch, row = divmod(rows, of_epoch) if of_epoch else (None, None)
        accounts.append(
            Entry(
                source["path"],
                float(source["weight"]),
                source["fingerprint"],
                rows,
                rows * int(state["rowTokens"]),
                int(source.get("skippedRows", 0)),
                of_epoch,
                epoch,
                row,
            )
        )
    return accounts
