"""Carrying out a plan's actions on the cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

from internlm_operator import metrics
from internlm_operator.api import API_VERSION, KIND
from internlm_operator.kube import FIELD_MANAGER, ApiError, Kube
from internlm_operator.limits import Buckets
from internlm_operator.objects import JOB_LABEL, Object
from internlm_operator.plan import Action, Apply, Create, Delete, Event, owner_of
from internlm_operator.times import stamp
from internlm_operator.waits import Refusal

# Requests of one plan that are under way at once, and how long further ones are begun: what a look makes and deletes
# is what the API server does in that time, however fast it is, and the next look goes on.
PARALLEL_REQUESTS, BEGIN_SECONDS = 16, 0.25
# Answers to a creation that mean "not like this" or "not now", rather than trouble on the way.
REFUSALS = (400, 403, 422)
MAX_EVENT_MESSAGE = 1024
# Events of one job: those of a normal life at once, then one in two minutes; what is beyond is in the log.
EVENTS_RATE, EVENTS_BURST = 1 / 120, 25.0

logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """One of the job's objects cannot be made as it is, or not now."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


Tell = Callable[[Literal["MODIFIED", "DELETED"], Object], None]
"""Takes what a watch would tell of a pod."""


class Executor:
    """Does what plans say, with so many requests at once."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._events: Buckets[tuple[str, str]] = Buckets(EVENTS_RATE, EVENTS_BURST)

    async def carry_out(self, job: Object, actions: Sequence[Action], tell: Tell) -> bool:
        """Do these actions at the same time, and tell what became of pods before any watch does.

        False if some were left for the next look, since there was no time to begin them all.
        Raises RefusedError, and ApiError, of the first that fails, when none is under way any more.
        """
        limit, begun = asyncio.Semaphore(PARALLEL_REQUESTS), 0
        until = time.monotonic() + BEGIN_SECONDS
        deleted = [f"{action.kind} {action.name}" for action in actions if isinstance(action, Delete)]
        if deleted:
            more = f" and {len(deleted) - 1} more" if len(deleted) > 1 else ""
            logger.info("deletes %s%s", deleted[0], more, extra=_about(job))

        async def limited(action: Action) -> bool:
            nonlocal begun
            async with limit:
                if begun >= PARALLEL_REQUESTS and time.monotonic() >= until:
                    return False
                begun += 1
                await self._do(job, action, tell)
                return True

        results = await asyncio.gather(*map(limited, actions), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return all(results)

    async def _do(self, job: Object, action: Action, tell: Tell) -> None:
        namespace, name, about = job["metadata"]["namespace"], job["metadata"]["name"], _about(job)
        match action:
            case Apply(manifest) | Create(manifest):
                try:
                    pod = await self._make(job, action)
                except (ApiError, RefusedError) as error:
                    if isinstance(action, Create) and action.optional:
                        name = manifest["metadata"]["name"]
                        logger.warning("%s cannot be made: %s", name, error, extra=about)
                        return
                    if isinstance(error, ApiError) and error.code in REFUSALS:
                        refusal = Refusal(error.code, error.message, manifest["kind"])
                        raise RefusedError(refusal) from error
                    raise
                if pod is not None:
                    tell("MODIFIED", pod)
            case Delete(kind, other, uid, grace):
                left = await self._kube.delete(kind, namespace, other, uid, grace)
                if kind == "Pod":
                    gone = {"metadata": {"name": other, "uid": uid}}
                    tell("DELETED" if left is None else "MODIFIED", left or gone)
            case Event(type, reason, message):
                level = logging.INFO if type == "Normal" else logging.WARNING
                logger.log(level, "%s", message, extra=about | {"reason": reason})
                if not self._events.take((namespace, name), time.monotonic()):
                    metrics.EVENTS_DROPPED.inc()
                    return
                try:
                    await self._kube.create(_event(job, action, self._kube.now()))
                except ApiError as error:
                    logger.warning("no event: %s", error, extra=about)

    async def _make(self, job: Object, action: Apply | Create) -> Object | None:
        """The pod that was made, or is there.

        Raises RefusedError where an object of this name is another's, which must not be changed.
        """
        kind, name = action.object["kind"], action.object["metadata"]["name"]
        namespace = job["metadata"]["namespace"]
        if isinstance(action, Create):
            made = await self._kube.create(action.object)
            known = made or await self._kube.get(kind, namespace, name)
        else:
            known = await self._kube.look(kind, namespace, name)
        if known is not None and owner_of(known) != job["metadata"]["uid"]:
            sentence = f"{kind} {name} exists and is not this job's: delete it, or give the job another name."
            raise RefusedError(Refusal(409, sentence, kind))
        if isinstance(action, Apply):
            await self._kube.apply(action.object, known)
        elif known is not None and JOB_LABEL not in (known["metadata"].get("labels") or {}):
            await self._kube.delete(kind, namespace, name, known["metadata"]["uid"])
            sentence = f"Pod {name} lost its label {JOB_LABEL}, by which it is found, and is deleted."
            raise RefusedError(Refusal(409, sentence, kind))
        return known if isinstance(action, Create) else None


def last_attempt(job: Object) -> int:
    """Number of the job's last attempt, 0 before the first."""
    attempts = (job.get("status") or {}).get("attempts") or []
    return int(attempts[-1]["number"]) if attempts else 0


def _about(job: Object) -> Object:
    """For the log."""
    return {"job": f"{job['metadata']['namespace']}/{job['metadata']['name']}", "attempt": last_attempt(job)}


def _event(job: Object, event: Event, time: datetime) -> Object:
    metadata, now = job["metadata"], stamp(time)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:MAX_EVENT_MESSAGE],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": FIELD_MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
