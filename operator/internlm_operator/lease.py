"""One of several replicas leads: the one that holds a Lease, as long as it renews it in time.

A candidate takes the lease over once it has seen it unchanged for its duration by its own clock, so the
replicas' clocks need not agree.  The leader believes in its lease for a shorter time, counted from before each
renewal was sent, and `seconds_left` says how long it may still write: `Kube.fenced` asks that before every
request that changes something, and gives the request no longer.  A leader that was paused, or cut off from the
API server, therefore writes nothing after another may lead.  Should a process be stopped between that question
and the socket, its one request still does no harm: the status and what workers share are written for a known
resourceVersion, an object is deleted by its uid, and pods carry the number of their attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from internlm_operator.kube import ApiError
from internlm_operator.objects import Object

# Parts of the lease's duration. A dead leader is followed after its duration and a poll, a stopping one after a poll.
FENCE, RENEW, POLL, REQUEST = 0.7, 0.2, 0.1, 0.3
ADDRESS_ANNOTATION = "training.internlm.io/channel-address"

logger = logging.getLogger(__name__)


class Leases(Protocol):
    """What of `Kube` a lease needs."""

    async def get(self, kind: str, namespace: str, name: str) -> Object | None: ...

    async def create(self, manifest: Object) -> Object | None: ...

    async def replace(self, manifest: Object) -> Object: ...


Work = Callable[[asyncio.Event], Awaitable[None]]


class Lease:
    """This replica's part in the choice of a leader.

    `identity` is this process's alone; `address` is where it serves the job channel, for the other replicas;
    `duration` is how many seconds a leader that renews no more keeps the others waiting.
    """

    def __init__(
        self,
        kube: Leases,
        namespace: str,
        name: str,
        identity: str,
        address: str,
        duration: int,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._kube = kube
        self._clock = clock or boot_clock
        self._namespace, self._name = namespace, name
        self._identity, self._address = identity, address
        self._duration = duration
        self._until = 0.0
        self._seen: tuple[str, float] = ("", 0.0)
        self.leader_address = ""
        """Where the leader serves the job channel, as last seen; empty while there is none."""

    def seconds_left(self) -> float:
        """How long this replica may still write; 0 unless it leads."""
        return max(0.0, self._until - self._clock())

    @property
    def leads(self) -> bool:
        return self.seconds_left() > 0

    async def compete(self, work: Work, stop: asyncio.Event) -> None:
        """Do `work` whenever this replica leads, until `stop`.

        The work is cancelled when the lease is lost.  When all is to stop, the event that the work was given is
        set: the lease is handed on at once if the work ends in time.  What the work raises is raised.
        """
        while not stop.is_set():
            if await self._try():
                logger.info("leads as %s", self._identity)
                await self._lead(work, stop)
            else:
                await _wait(POLL * self._duration, stop)

    async def _lead(self, work: Work, stop: asyncio.Event) -> None:
        finish = asyncio.Event()
        task = asyncio.ensure_future(work(finish))
        stopped = asyncio.create_task(stop.wait())
        try:
            while self.leads and not task.done():
                await asyncio.wait(
                    (task, stopped), timeout=RENEW * self._duration, return_when=asyncio.FIRST_COMPLETED
                )
                if stopped.done():
                    finish.set()
                    await asyncio.wait((task,), timeout=self.seconds_left())
                    break
                # One that comes too late, after a pause, renews nothing: another may lead by now.
                if self.leads and not task.done():
                    await self._try()
            if not stopped.done() and not task.done():
                logger.error("%s lost the lease; it writes nothing more until it leads again", self._identity)
        finally:
            orderly = stop.is_set() and task.done() and self.leads
            self._until, self.leader_address = 0.0, ""
            task.cancel()
            stopped.cancel()
            [result, _] = await asyncio.gather(task, stopped, return_exceptions=True)
        if isinstance(result, Exception):
            raise result
        if orderly:
            await self._release()

    async def _try(self) -> bool:
        """Take or renew the lease; False while another has it, or where the API server does not answer."""
        try:
            async with asyncio.timeout(REQUEST * self._duration):
                return await self._update()
        except (ApiError, TimeoutError) as error:
            logger.warning("Lease %s/%s: %s", self._namespace, self._name, str(error) or "no answer in time")
            return False

    async def _update(self) -> bool:
        found = await self._kube.get("Lease", self._namespace, self._name)
        spec = (found or {}).get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if found is not None and holder not in ("", self._identity) and not self._has_expired(found):
            self._until = 0.0
            self.leader_address = (found["metadata"].get("annotations") or {}).get(ADDRESS_ANNOTATION, "")
            return False
        before = self._clock()
        wanted = self._manifest(found, holder, spec)
        try:
            done = await (self._kube.create(wanted) if found is None else self._kube.replace(wanted))
        except ApiError as error:
            if error.code != 409:
                raise
            done = None
        if done is None:
            return False
        self._until = before + FENCE * self._duration
        self.leader_address = self._address
        return True

    def _has_expired(self, found: Object) -> bool:
        version = found["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, self._clock())
        return self._clock() - self._seen[1] >= (found["spec"].get("leaseDurationSeconds") or self._duration)

    def _manifest(self, found: Object | None, holder: str, spec: dict[str, Any]) -> Object:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        ours = holder == self._identity
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": self._name,
                "namespace": self._namespace,
                "annotations": {ADDRESS_ANNOTATION: self._address},
            }
            | ({"resourceVersion": found["metadata"]["resourceVersion"]} if found else {}),
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": self._duration,
                "acquireTime": spec.get("acquireTime") if ours else now,
                "renewTime": now,
                "leaseTransitions": (spec.get("leaseTransitions") or 0) + (not ours),
            },
        }

    async def _release(self) -> None:
        """Hand the lease on, so that no replica has to wait for its end."""
        try:
            async with asyncio.timeout(REQUEST * self._duration):
                found = await self._kube.get("Lease", self._namespace, self._name)
                if found is not None and found["spec"].get("holderIdentity") == self._identity:
                    found["spec"]["holderIdentity"] = ""
                    await self._kube.replace(found)
        except (ApiError, TimeoutError) as error:
            logger.warning("the lease is not handed on: %s", str(error) or "no answer in time")


def boot_clock() -> float:
    """Seconds that go on while the machine sleeps, unlike those of `time.monotonic`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


async def _wait(seconds: float, stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
