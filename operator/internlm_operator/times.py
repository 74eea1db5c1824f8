"""Times as Kubernetes writes them: RFC 3339 in UTC, whole seconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

# Between two clocks, so much is no difference: the time of an answer is told in whole seconds.
TOLERATED = timedelta(seconds=1)


class ServerClock:
    """The time by the API server's clock, which is in all that Kubernetes tells: when a pod was deleted, when a
    container ended, when a job was made.  Where this machine's own clock agrees to a second or so, it is that.

    Cristian, Probabilistic clock synchronization, 1989.
    """

    def __init__(self) -> None:
        self.ahead = timedelta()
        """How much the server's clock is ahead of this machine's."""

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def heard(self, date: str, sent: datetime, received: datetime) -> None:
        """Learn from the `Date` of an answer to a request that was sent, and the answer received, at these times."""
        try:
            told = parsedate_to_datetime(date)
        except ValueError:
            return
        if told.tzinfo is None:
            return
        least, most = told - received, told + timedelta(seconds=1) - sent
        if not least - TOLERATED <= self.ahead <= most + TOLERATED:
            self.ahead = (least + most) / 2


def stamp(time: datetime) -> str:
    """`2026-01-01T00:00:00Z`."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: object) -> datetime | None:
    """The time that `text` says; None where it says none."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def seconds_since(text: object, now: datetime) -> float | None:
    """Seconds from the time that `text` says to `now`; None where it says none."""
    time = parse_time(text)
    return None if time is None else (now - time).total_seconds()


def duration(seconds: float | None) -> str:
    """Two units, as kubectl prints ages: `3d20h`, `5h7m`, `4m30s`, `12s`; `0s` below zero, empty for None."""
    if seconds is None:
        return ""
    rest = max(0, int(seconds))
    days, rest = divmod(rest, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return "".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count) or "0s"
