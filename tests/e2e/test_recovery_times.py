"""The generated page: every number of the run is in it, and what is not in it is named."""

from __future__ import annotations

from e2e.recovery_times import Case, Run, page

RUN = Run("2026-01-01", "abc1234", "2 cores", "a small job")


def test_cases_of_one_fault_and_action_share_a_row() -> None:
    cases = [
        Case("SIGKILL", "worker 1", "InPlaceRestart", 10.0, 1.0),
        Case("SIGKILL", "worker 0", "InPlaceRestart", 14.0, 2.0),
        Case("SIGKILL", "worker 0", "GangRestart", 30.0, 3.0, "a note"),
        Case("API server away", "cluster", "none", 0.5),
    ]
    text = page(RUN, cases, [])
    assert "| SIGKILL | worker 1, worker 0 | 2 | InPlaceRestart | 1.5 | 2.0 | 12.0 | 14.0 |  |" in text
    assert "| SIGKILL | worker 0 | 1 | GangRestart | 3.0 | 3.0 | 30.0 | 30.0 | a note |" in text
    assert "| API server away | cluster | 1 | none |  |  | 0.5 | 0.5 |  |" in text
    assert "| InPlaceRestart | 2 | 12.0 | 14.0 |" in text
    assert "abc1234" in text
    assert "Not in this run" not in text


def test_what_was_not_seen_is_named() -> None:
    assert "## Not in this run\n\n- drain\n" in page(RUN, [], ["drain"])
