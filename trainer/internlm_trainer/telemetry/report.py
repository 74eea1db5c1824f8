"""Reports to the operator's job channel, from a thread of their own: training never waits for them."""

from __future__ import annotations

import json
import logging
import os
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
TIMEOUT_SECONDS = 5.0


class Reporter:
    """Sends the newest report at most every two seconds; without a channel it does nothing."""

    def __init__(self) -> None:
        self._url = os.environ.get("INTERNLM_REPORT_URL", "")
        self._newest: dict[str, Any] | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._outage = Outage(self._url)
        self._answer: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        if self._url:
            self._thread.start()

    def send(self, report: dict[str, Any]) -> None:
        """Take over a report; one that is still waiting is replaced."""
        with self._changed:
            self._newest = report
            self._changed.notify()

    @property
    def checkpoint_request(self) -> str:
        """The name of the checkpoint that the operator asks for now; empty for none."""
        return str(self._answer.get("checkpoint") or "")

    def close(self) -> None:
        """Send what is waiting, within a few seconds."""
        if not self._url:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(TIMEOUT_SECONDS + 1)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._closing)
                report, self._newest = self._newest, None
            if report is None:
                return
            with self._outage.told():
                self._answer = post(self._url, report)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=INTERVAL_SECONDS)


class Outage:
    """What goes wrong on the job channel: told once, not every two seconds of an outage."""

    def __init__(self, url: str) -> None:
        self._url, self._told = url, False

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around one exchange by `post`."""
        try:
            yield
            self._told = False
        except (OSError, ValueError, TypeError, HTTPException) as error:
            if not self._told:
                log.warning(
                    "the operator does not take reports at %s: %s; training goes on", self._url, error
                )
            self._told = True


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    """Tell the job channel something; its answer.  Raises OSError, ValueError or HTTPException."""
    # Token and certificate are read anew each time: the kubelet renews the files.
    token = Path(os.environ["INTERNLM_REPORT_TOKEN_FILE"]).read_text().strip()
    context = ssl.create_default_context(cafile=os.environ["INTERNLM_REPORT_CA_FILE"])
    request = urllib.request.Request(  # noqa: S310
        url,
        data=json.dumps(content).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
        answer = json.loads(response.read())
    if not isinstance(answer, dict):
        raise ValueError(f"answers {str(answer)[:100]!r}, and not an object")
    return answer
