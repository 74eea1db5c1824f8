"""The operator's log: one JSON object a line, with the job that it is about."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum

# `logger.info(..., extra={...})` may name these.
FIELDS = ("job", "attempt", "reason")


class LogFormat(StrEnum):
    json = "json"
    text = "text"


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """For people: the job behind the message."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        job = getattr(record, "job", None)
        return f"{line} [{job}]" if job else line


def set_up(format: LogFormat) -> None:
    """Log to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if format is LogFormat.json else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # kopf has a line for each event that it hands on.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
