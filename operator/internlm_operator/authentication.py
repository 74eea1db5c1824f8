"""Who speaks on the job channel: a process shows the token that the kubelet projected into its pod.

The token's audience is the job, so it is good for nothing else; a TokenReview says that it is genuine, and the
pod that it is bound to must be one of the job's own workers.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any, Protocol

from internlm_operator.controller import Key
from internlm_operator.kube import Kube
from internlm_operator.objects import ATTEMPT_LABEL, JOB_LABEL, Object, audience
from internlm_operator.plan import owner_of

# A pod that is deleted, or a token that is revoked, is believed this much longer.
ACCEPTED_SECONDS = 60.0
REJECTED_SECONDS = 5.0
MAX_VERDICTS = 100_000
PARALLEL_REVIEWS = 16
MAX_TOKEN_LENGTH = 8192
_USER = "system:serviceaccount:"
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"


class Pods(Protocol):
    """What authentication asks of the controller."""

    def job_uid(self, key: Key) -> str | None: ...

    def find_pod(self, key: Key, name: str) -> Object | None: ...


@dataclass(frozen=True)
class Verdict:
    """What is known of a token: the worker that it speaks for, or why it may not speak."""

    refusal: str = ""
    pod: str = ""
    attempt: int = 0


class Authenticator:
    """Decides whether a token may speak for a job, and remembers it for a short time."""

    def __init__(self, kube: Kube, pods: Pods) -> None:
        self._kube = kube
        self._pods = pods
        self._verdicts: dict[bytes, tuple[float, Verdict]] = {}
        self._reviews = asyncio.Semaphore(PARALLEL_REVIEWS)

    async def judge(self, key: Key, token: str) -> Verdict:
        """Whether the token may speak for the job.

        Raises ApiError where the API server cannot be asked.
        """
        fingerprint = hashlib.sha256(json.dumps([*key, token]).encode()).digest()
        until, verdict = self._verdicts.get(fingerprint, (0.0, Verdict()))
        if time.monotonic() < until:
            return verdict
        wrong, expiry = _glance(key, token, self._now())
        if wrong:  # it costs the API server nothing
            return Verdict(wrong)
        async with self._reviews:
            verdict = await self._review(key, token)
        if len(self._verdicts) >= MAX_VERDICTS:
            self._drop_old()
        seconds = REJECTED_SECONDS if verdict.refusal else min(ACCEPTED_SECONDS, expiry - self._now())
        self._verdicts[fingerprint] = (time.monotonic() + seconds, verdict)
        return verdict

    def _now(self) -> float:
        return self._kube.now().timestamp()

    async def _review(self, key: Key, token: str) -> Verdict:
        namespace, name = key
        status = await self._kube.review_token(token, audience(namespace, name))
        if not status.get("authenticated"):
            return Verdict("the token is not valid for this job")
        # A server that does not know about audiences would authenticate any token, and names none here.
        if audience(namespace, name) not in (status.get("audiences") or []):
            return Verdict("the token is for another audience")
        user = status.get("user") or {}
        if not str(user.get("username", "")).startswith(f"{_USER}{namespace}:"):
            return Verdict("the token is of another namespace")
        extra = user.get("extra") or {}
        pod_name, pod_uid = (extra.get(_POD_NAME) or [""])[0], (extra.get(_POD_UID) or [""])[0]
        if not pod_name:
            return Verdict("the token is not bound to a pod")
        pod = self._pods.find_pod(key, pod_name) or await self._kube.get("Pod", namespace, pod_name)
        metadata = (pod or {}).get("metadata") or {}
        labels = metadata.get("labels") or {}
        ours = pod is not None and owner_of(pod) == self._pods.job_uid(key)
        if not ours or metadata.get("uid") != pod_uid or labels.get(JOB_LABEL) != name:
            return Verdict(f"pod {pod_name} is none of this job's workers")
        attempt = str(labels.get(ATTEMPT_LABEL, ""))
        return Verdict(pod=pod_name, attempt=int(attempt) if attempt.isdecimal() else 0)

    def _drop_old(self) -> None:
        now = time.monotonic()
        self._verdicts = {k: v for k, v in self._verdicts.items() if v[0] > now}
        if len(self._verdicts) >= MAX_VERDICTS:
            self._verdicts.clear()


def _glance(key: Key, token: str, now: float) -> tuple[str, float]:
    """Why a token cannot be right by what it says of itself, and when it expires; nothing is proven by this."""
    if not token or len(token) > MAX_TOKEN_LENGTH:
        return "no token", 0.0
    try:
        payload = token.split(".")[1]
        claims: Any = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        expiry = float(claims["exp"])
        audiences, origin = claims["aud"], claims["kubernetes.io"]
        namespace, bound = origin["namespace"], isinstance(origin.get("pod"), dict)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError, binascii.Error):
        return "no token of a pod", 0.0
    if audience(*key) not in (audiences if isinstance(audiences, list) else [audiences]):
        return "the token is for another audience", expiry
    if namespace != key[0]:
        return "the token is of another namespace", expiry
    if not bound:
        return "the token is not bound to a pod", expiry
    # An API server whose clock is behind would still take it; one that is expired here is expired.
    return ("the token has expired" if not expiry > now else ""), expiry
