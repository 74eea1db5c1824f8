"""Who leads: never two at once, whatever becomes of their requests and however their clocks differ.

Time is virtual, and the API server is a Lease in memory with resourceVersions; the real one is in
test_replicas.py.
"""

from __future__ import annotations

import asyncio
import copy
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_operator.kube import ApiError
from internlm_operator.lease import Lease

DURATION = 10
Write = tuple[str, float]
"""Who wrote, and when it began to lead."""


class Selector(selectors.DefaultSelector):
    """Does not wait, but says how long it would have."""

    waited = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.waited += timeout or 0.0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop in which a minute takes no time."""

    def __init__(self) -> None:
        self.selector = Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.waited


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())


class Server:
    """One Lease."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0

    def put(self, manifest: dict[str, Any], version: str | None) -> dict[str, Any] | None:
        there = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if version != there:
            return None
        self.version += 1
        self.lease = copy.deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)


class Connection:
    """A replica's way to the server: every request and every answer is late, and some never arrive."""

    def __init__(self, server: Server, delay: Callable[[], float]) -> None:
        self.server, self.delay = server, delay

    async def _send(self, act: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def arrive() -> None:
            result = act()  # it counts even if the replica gave up waiting
            loop.call_later(self.delay(), lambda: answer.done() or answer.set_result(result))

        loop.call_later(self.delay(), arrive)
        return await answer

    async def get(self, *_: str) -> dict[str, Any] | None:
        return copy.deepcopy(await self._send(lambda: copy.deepcopy(self.server.lease)))

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any] | None:
        found: dict[str, Any] | None = await self._send(lambda: self.server.put(manifest, None))
        return found

    async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        version = manifest["metadata"]["resourceVersion"]
        found: dict[str, Any] | None = await self._send(lambda: self.server.put(manifest, version))
        if found is None:
            raise ApiError(409, "changed")
        return found


class Replica:
    """Writes all the time while it leads, as `Kube.fenced` lets it."""

    def __init__(self, name: str, server: Server, writes: list[Write], seed: int, trouble: float) -> None:
        self.random, self.trouble = random.Random(seed), trouble
        self.name, self.writes = name, writes
        drift, offset = self.random.uniform(0.98, 1.02), self.random.uniform(0, 1e6)
        loop = asyncio.get_running_loop()
        connection = Connection(server, self.delay)
        self.lease = Lease(
            connection, "a", "b", name, f"{name}:1", DURATION, lambda: loop.time() * drift + offset
        )
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(self.lease.compete(self.work, self.stop))

    def delay(self) -> float:
        return self.random.uniform(0, 30) if self.random.random() < self.trouble else 0.01

    async def work(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not stop.is_set():
            left = self.lease.seconds_left()
            if left > 0:  # it arrives before its time-out, and be the process dead by then
                loop.call_later(self.random.uniform(0, left), self.writes.append, (self.name, begun))
            await asyncio.sleep(0.3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_no_leader_writes_after_the_next_one_has_begun(seed: int, trouble: float) -> None:
    writes: list[Write] = []

    async def main() -> None:
        server, chance = Server(), random.Random(seed)
        replicas = [Replica(f"r{i}", server, writes, seed + i, trouble) for i in range(3)]
        for number in range(3, 8):
            await asyncio.sleep(chance.uniform(5, 60))
            victim = chance.randrange(3)
            # Killed: it hands on nothing. What it sent is still under way.
            replicas[victim].lease._until = 0.0
            replicas[victim].task.cancel()
            replicas[victim] = Replica(f"r{number}", server, writes, seed + number, trouble)
        await asyncio.sleep(60)
        for replica in replicas:
            replica.task.cancel()

    run(main)
    assert writes or trouble == 0.3
    newest = ("", 0.0)
    for name, begun in writes:
        assert name == newest[0] or begun >= newest[1], "a leader of before wrote"
        newest = max(newest, (name, begun), key=lambda write: write[1])


def test_a_dead_leader_is_followed_within_its_duration_and_a_stopped_one_at_once() -> None:
    took: dict[str, float] = {}

    async def main() -> None:
        server, writes = Server(), list[Write]()
        first = Replica("first", server, writes, 1, 0.0)
        await asyncio.sleep(3)
        second = Replica("second", server, writes, 2, 0.0)
        await asyncio.sleep(20)
        assert (first.lease.leads, second.lease.leads) == (True, False)
        assert second.lease.leader_address == "first:1"
        for how, old, new in (("killed", first, second), ("stopped", second, None)):
            since = asyncio.get_running_loop().time()
            if how == "killed":
                old.task.cancel()
            else:
                new = Replica("third", server, writes, 3, 0.0)
                await asyncio.sleep(5)
                since = asyncio.get_running_loop().time()
                old.stop.set()
            assert new is not None
            while not new.lease.leads:
                await asyncio.sleep(0.05)
            took[how] = asyncio.get_running_loop().time() - since
        new.stop.set()
        await new.task

    run(main)
    assert took["killed"] <= DURATION * 1.02 + 1.5
    assert took["stopped"] <= 1.5


def test_work_that_fails_is_raised_and_work_is_ended_when_the_lease_is_lost() -> None:
    ended: list[str] = []

    async def main() -> None:
        server = Server()
        connection = Connection(server, lambda: 0.01)
        lease = Lease(connection, "a", "b", "me", "me:1", DURATION, asyncio.get_running_loop().time)

        async def broken(_: asyncio.Event) -> None:
            raise ValueError("broken")

        failing = asyncio.gather(lease.compete(broken, asyncio.Event()), return_exceptions=True)
        assert isinstance((await failing)[0], ValueError)
        assert not lease.leads

        async def work(_: asyncio.Event) -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append("work")

        task = asyncio.create_task(lease.compete(work, asyncio.Event()))
        await asyncio.sleep(5)
        assert lease.leads
        assert server.lease is not None
        server.put(server.lease | {"spec": {"holderIdentity": "thief"}}, str(server.version))
        await asyncio.sleep(5)
        assert ended == ["work"]
        assert not lease.leads
        task.cancel()

    run(main)
