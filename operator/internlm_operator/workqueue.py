"""A queue of keys for a bounded number of workers; no key is worked on twice at once.

A key rests after its work for as long as that took, and longer: what is told of it meanwhile is answered together.
Work that costs much, since the key has many parts that change, is so done seldom, and other work at once.

The semantics are those of the work queue of Kubernetes' own controllers
(https://pkg.go.dev/k8s.io/client-go/util/workqueue): a key that is added while it waits is there once, one
that is added while it is worked on comes again afterwards, and one whose work failed comes back after a
growing delay.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from internlm_operator.metrics import QUEUE_DELAY, QUEUE_DEPTH

MIN_DELAY = 0.2
MAX_DELAY = 60.0
# A key rests so many times as long as its last work took, at most so many seconds.
REST, MAX_REST = 2.0, 1.0

logger = logging.getLogger(__name__)


Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """Keys wait here until `work` is done on them.

    `work(key)` returns the seconds after which to look at the key again, or None: only when it is added.  0 is
    for work that is not done yet, and goes on without a rest.
    """

    def __init__(self, work: Callable[[Key], Awaitable[float | None]]) -> None:
        self._work = work
        self._ready: deque[Key] = deque()
        self._waiting: dict[Key, float] = {}
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, tuple[int, float]] = {}
        self._wake = asyncio.Event()

    def add(self, key: Key, after: float = 0.0) -> None:
        """Work on `key`, after some seconds if given; while its work fails, not before its delay is over."""
        loop = asyncio.get_running_loop()
        due = loop.time() + after
        if key in self._failures:
            due = max(due, self._failures[key][1])
        if due > loop.time():
            timer = self._timers.get(key)
            if timer is None or timer.when() > due:
                if timer is not None:
                    timer.cancel()
                self._timers[key] = loop.call_at(due, self._due, key)
        elif key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = loop.time()
            self._ready.append(key)
            self._wake.set()

    def _due(self, key: Key) -> None:
        del self._timers[key]
        # Timers may fire a tick early; this one must not be put off again for that.
        if key in self._failures:
            count, _ = self._failures[key]
            self._failures[key] = (count, 0.0)
        self.add(key)

    async def run(self, workers: int, stop: asyncio.Event) -> None:
        """Work until `stop`, and end what is being worked on then; if cancelled, that is cancelled too."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._worker(stop)) for _ in range(workers)]
            waker = group.create_task(self._wake_at(stop))
            await asyncio.wait(tasks)
            waker.cancel()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    async def _worker(self, stop: asyncio.Event) -> None:
        while True:
            while not self._ready and not stop.is_set():
                self._wake.clear()
                await self._wake.wait()
            if stop.is_set():
                return
            QUEUE_DEPTH.observe(len(self._ready) - 1)
            key = self._ready.popleft()
            QUEUE_DELAY.observe(asyncio.get_running_loop().time() - self._waiting.pop(key))
            self._busy.add(key)
            rest = 0.0
            try:
                rest = await self._work_on(key)
            finally:
                if rest:
                    asyncio.get_running_loop().call_later(rest, self._rested, key)
                else:
                    self._rested(key)
            # Work that waits for nothing, on thousands of keys, must not keep all else from its turn.
            await asyncio.sleep(0)

    def _rested(self, key: Key) -> None:
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    async def _work_on(self, key: Key) -> float:
        """Seconds that the key rests then."""
        # A wake-up that was asked for before is answered now; the work says when it wants the next.
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        begun = asyncio.get_running_loop().time()
        try:
            after = await self._work(key)
        except Exception as error:
            count = self._failures.get(key, (0, 0.0))[0] + 1
            delay = min(MIN_DELAY * 2 ** min(count - 1, 16), MAX_DELAY)
            self._failures[key] = (count, asyncio.get_running_loop().time() + delay)
            expected = isinstance(error, RetryError)
            logger.warning("%s: %s; trying again in %.1f s", key, error, delay, exc_info=not expected)
            self.add(key)
            return 0.0
        self._failures.pop(key, None)
        if after is not None:
            self.add(key, after)
        took = asyncio.get_running_loop().time() - begun
        return 0.0 if after == 0 else min(REST * took, MAX_REST)


class RetryError(Exception):
    """The work could not be done now, for a known reason."""
