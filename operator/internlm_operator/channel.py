"""The job channel: where training processes report to the operator, over HTTPS, with no right in the cluster.

A process shows the token that the kubelet projected into its pod.  The token's audience is the job, so it is
good for nothing else; a TokenReview says that it is genuine and which pod it is bound to, and that pod must
carry the job's label.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import ssl
import time
from typing import Protocol

from aiohttp import web
from pydantic import ValidationError

from internlm_operator.controller import Key
from internlm_operator.kube import ApiError, Kube
from internlm_operator.objects import JOB_LABEL, Object, audience, report_path
from internlm_operator.report import MAX_REPORT_BYTES, Report

# A pod that is deleted, or a token that is revoked, is believed this much longer.
ACCEPTED_SECONDS = 60.0
REJECTED_SECONDS = 5.0
MAX_VERDICTS = 100_000
PARALLEL_REVIEWS = 16
MAX_TOKEN_LENGTH = 8192
_USER = "system:serviceaccount:"
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"

logger = logging.getLogger(__name__)


class Jobs(Protocol):
    """What the channel asks of the controller."""

    def current_attempt(self, key: Key) -> int | None: ...

    def find_pod(self, key: Key, name: str) -> Object | None: ...

    def on_report(self, key: Key, report: Report) -> None: ...


class Authenticator:
    """Decides whether a token may report for a job, and remembers it for a short time."""

    def __init__(self, kube: Kube, jobs: Jobs) -> None:
        self._kube = kube
        self._jobs = jobs
        self._verdicts: dict[bytes, tuple[float, str]] = {}
        self._reviews = asyncio.Semaphore(PARALLEL_REVIEWS)

    async def refusal(self, key: Key, token: str) -> str:
        """Why the token may not report for the job; empty if it may.

        Raises ApiError where the API server cannot be asked.
        """
        if not token or len(token) > MAX_TOKEN_LENGTH:
            return "no token"
        fingerprint = hashlib.sha256(json.dumps([*key, token]).encode()).digest()
        until, verdict = self._verdicts.get(fingerprint, (0.0, ""))
        if time.monotonic() < until:
            return verdict
        async with self._reviews:
            verdict = await self._review(key, token)
        if len(self._verdicts) >= MAX_VERDICTS:
            self._drop_old()
        seconds = REJECTED_SECONDS if verdict else ACCEPTED_SECONDS
        self._verdicts[fingerprint] = (time.monotonic() + seconds, verdict)
        return verdict

    async def _review(self, key: Key, token: str) -> str:
        namespace, name = key
        status = await self._kube.review_token(token, audience(namespace, name))
        if not status.get("authenticated"):
            return "the token is not valid for this job"
        # A server that does not know about audiences would authenticate any token, and names none here.
        if audience(namespace, name) not in (status.get("audiences") or []):
            return "the token is for another audience"
        user = status.get("user") or {}
        if not str(user.get("username", "")).startswith(f"{_USER}{namespace}:"):
            return "the token is of another namespace"
        extra = user.get("extra") or {}
        pod_name, pod_uid = (extra.get(_POD_NAME) or [""])[0], (extra.get(_POD_UID) or [""])[0]
        if not pod_name:
            return "the token is not bound to a pod"
        pod = self._jobs.find_pod(key, pod_name) or await self._kube.get("Pod", namespace, pod_name)
        metadata = (pod or {}).get("metadata") or {}
        if metadata.get("uid") != pod_uid or (metadata.get("labels") or {}).get(JOB_LABEL) != name:
            return f"pod {pod_name} is none of this job's workers"
        return ""

    def _drop_old(self) -> None:
        now = time.monotonic()
        self._verdicts = {k: v for k, v in self._verdicts.items() if v[0] > now}
        if len(self._verdicts) >= MAX_VERDICTS:
            self._verdicts.clear()


def application(authenticator: Authenticator, jobs: Jobs) -> web.Application:
    """The channel's routes."""

    async def report(request: web.Request) -> web.Response:
        key = (request.match_info["namespace"], request.match_info["name"])
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return _answer(401, "send the projected token as Authorization: Bearer")
        try:
            refusal = await authenticator.refusal(key, token.strip())
        except ApiError as error:
            logger.warning("%s/%s: a token cannot be checked: %s", *key, error)
            return _answer(503, "the API server cannot be asked about the token")
        if refusal:
            logger.warning("%s/%s: a report was refused: %s", *key, refusal)
            return _answer(403, refusal)
        try:
            content = Report.model_validate_json(await request.read())
        except web.HTTPRequestEntityTooLarge:
            return _answer(413, f"a report has at most {MAX_REPORT_BYTES} bytes")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            return _answer(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        attempt = jobs.current_attempt(key)
        if attempt is None:
            return _answer(503, "the job is not known yet")
        if content.attempt != attempt:
            return _answer(409, f"attempt {content.attempt} is over; the current one is {attempt}")
        jobs.on_report(key, content)
        return web.json_response({})

    app = web.Application(client_max_size=MAX_REPORT_BYTES)
    app.router.add_post(report_path("{namespace}", "{name}"), report)
    return app


async def serve(app: web.Application, port: int, context: ssl.SSLContext | None = None) -> web.AppRunner:
    """Serve `app` on all addresses; clean the returned runner up to stop.

    Raises OSError where the port is taken.
    """
    runner = web.AppRunner(app, access_log=None, handle_signals=False, keepalive_timeout=75)
    await runner.setup()
    await web.TCPSite(runner, port=port, ssl_context=context).start()
    return runner


def _answer(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)
