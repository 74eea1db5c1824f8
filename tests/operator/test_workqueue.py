"""The work queue: every key gets its work, never twice at once, and failing ones do not hold up others."""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from internlm_operator.workqueue import RetryError, WorkQueue

Work = Callable[[str], Awaitable[float | None]]
Script = Callable[[WorkQueue[str]], Coroutine[Any, Any, None]]


def run(work: Work, script: Script, workers: int = 2) -> None:
    """Run the queue while `script` goes on."""

    async def main() -> None:
        queue = WorkQueue(work)
        task = asyncio.create_task(queue.run(workers, asyncio.Event()))
        await asyncio.wait_for(script(queue), timeout=30)
        assert not task.done()
        task.cancel()

    asyncio.run(main())


def test_a_key_that_waits_already_is_worked_on_once() -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)

    async def script(queue: WorkQueue[str]) -> None:
        for key in "aabab":
            queue.add(key)
        while len(done) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)

    run(work, script)
    assert sorted(done) == ["a", "b"]


def test_a_key_that_is_added_during_its_work_comes_again_and_never_twice_at_once() -> None:
    busy: collections.Counter[str] = collections.Counter()
    started, release = asyncio.Event(), asyncio.Event()
    most, count = 0, 0

    async def work(key: str) -> None:
        nonlocal most, count
        busy[key] += 1
        most, count = max(most, busy[key]), count + 1
        started.set()
        await release.wait()
        busy[key] -= 1

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("a")
        await started.wait()
        for _ in range(5):
            queue.add("a")
        await asyncio.sleep(0.01)
        release.set()
        while count < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)

    run(work, script, workers=4)
    assert (most, count) == (1, 2)


def test_work_that_fails_is_done_again_after_growing_delays_while_other_keys_go_on() -> None:
    times: list[float] = []
    others = 0

    async def work(key: str) -> None:
        nonlocal others
        if key == "good":
            others += 1
            return
        times.append(asyncio.get_running_loop().time())
        if len(times) < 4:
            raise RetryError("not now")

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("bad")
        while len(times) < 4:
            queue.add("good")
            queue.add("bad")  # events do not shorten the delay
            await asyncio.sleep(0.01)

    run(work, script, workers=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] >= 0.19
    assert gaps[1] >= 0.39
    assert gaps[2] >= 0.79
    assert others > 10


def test_work_comes_back_after_the_seconds_that_it_asked_for() -> None:
    times: list[float] = []

    async def work(_: str) -> float | None:
        times.append(asyncio.get_running_loop().time())
        return 0.05 if len(times) < 3 else None

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("a")
        while len(times) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)

    run(work, script)
    assert len(times) == 3
    assert times[2] - times[0] >= 0.09


def test_work_that_waits_for_nothing_keeps_nothing_else_from_its_turn() -> None:
    done = 0

    async def work(_: str) -> float:
        nonlocal done
        done += 1
        return 0.0

    async def script(queue: WorkQueue[str]) -> None:
        for key in "abc":
            queue.add(key)
        while done < 100:
            await asyncio.sleep(0)

    run(work, script)


def test_what_is_under_way_is_ended_at_a_stop_and_nothing_else_is_begun() -> None:
    done: list[str] = []

    async def main() -> None:
        started, release, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def work(key: str) -> None:
            started.set()
            await release.wait()
            done.append(key)

        queue = WorkQueue(work)
        task = asyncio.create_task(queue.run(1, stop))
        queue.add("a")
        queue.add("b")
        await started.wait()
        stop.set()
        await asyncio.sleep(0.01)
        assert not task.done()
        release.set()
        await asyncio.wait_for(task, timeout=10)

    asyncio.run(main())
    assert done == ["a"]


def test_what_is_added_while_a_key_rests_after_costly_work_is_answered_together() -> None:
    times: list[tuple[float, float]] = []

    async def work(_: str) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await asyncio.sleep(0.02)
        times.append((begun, loop.time()))

    async def script(queue: WorkQueue[str]) -> None:
        while len(times) < 4:
            queue.add("a")
            await asyncio.sleep(0.001)

    run(work, script)
    for (begun, ended), (following, _) in itertools.pairwise(times):
        assert following - ended >= 1.9 * (ended - begun)
