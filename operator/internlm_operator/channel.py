"""The job channel: where training processes report to the operator, over HTTPS, with no right in the cluster.

Every replica serves it, and the leader alone answers: what the reports of a job's ranks say together, and what
to tell them, is one process's knowledge.  The others pass requests on to it, by the address in the Lease.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ValidationError
from yarl import URL

from internlm_operator import kubeflow, metrics
from internlm_operator.authentication import Authenticator, Pods, Verdict
from internlm_operator.controller import Key
from internlm_operator.inplace import Directive
from internlm_operator.kube import ApiError
from internlm_operator.limits import Buckets
from internlm_operator.objects import agent_path, report_path, worker_name
from internlm_operator.report import MAX_REPORT_BYTES, AgentReport, Report

# Requests under way at once; a job of 1,000 pods that all begin to report at once waits for its turn.
MAX_REQUESTS = 1024
# Of one pod: its processes report every two seconds or so.
POD_RATE, POD_BURST = 20.0, 100.0
# A request that is not there by then is somebody's who sends a byte a minute.
REQUEST_SECONDS = 20.0
FORWARD_SECONDS = 4.0
FORWARDED = "Internlm-Forwarded"
_Content = TypeVar("_Content", bound=BaseModel)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)


class Jobs(Pods, Protocol):
    """What the channel asks of the controller."""

    def current_attempt(self, key: Key) -> int | None: ...

    def last_report(self, key: Key) -> Report | None: ...

    def on_report(self, key: Key, report: Report) -> None: ...

    def on_agent(self, key: Key, report: AgentReport) -> Directive: ...

    def attempt_of_pod(self, key: Key, gang: int) -> int: ...

    def checkpoint_request(self, key: Key) -> str: ...


class Leader(Protocol):
    """What the channel asks of the lease."""

    @property
    def leads(self) -> bool: ...

    @property
    def leader_address(self) -> str: ...


class Trust(Protocol):
    """How to know another replica."""

    @property
    def client(self) -> ssl.SSLContext: ...

    @property
    def names(self) -> list[str]: ...


class RefusedError(Exception):
    """A request that gets this answer."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.response = web.json_response({"message": message}, status=status)
        if retry_after is not None:
            self.response.headers["Retry-After"] = str(max(1, round(retry_after)))


class Channel:
    """The channel's handlers."""

    def __init__(self, authenticator: Authenticator, jobs: Jobs, leader: Leader, trust: Trust) -> None:
        self._authenticator, self._jobs = authenticator, jobs
        self._leader, self._trust = leader, trust
        self._pods: Buckets[tuple[Key, str]] = Buckets(POD_RATE, POD_BURST)
        self._under_way = 0
        self._session: aiohttp.ClientSession

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_REPORT_BYTES, middlewares=[self._shape, self._pass_on])
        app.cleanup_ctx.append(self._connect)
        app.router.add_post(report_path("{namespace}", "{name}"), self._report, name="report")
        app.router.add_post(agent_path("{namespace}", "{name}"), self._agent, name="agent")
        path = kubeflow.status_path("{namespace}", "{name}")
        app.router.add_post(path, self._kubeflow_status, name="kubeflow")
        return app

    async def _connect(self, _: web.Application) -> AsyncIterator[None]:
        """Keep connections to the leader open."""
        timeout = aiohttp.ClientTimeout(total=FORWARD_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as self._session:
            yield

    # Around every request

    @web.middleware
    async def _shape(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Bound the number of requests and their time, and count them."""
        self._under_way += 1
        try:
            if self._under_way > MAX_REQUESTS:
                raise RefusedError(503, "too many requests at once; try again", 1)
            async with asyncio.timeout(REQUEST_SECONDS):
                response = await handler(request)
        except RefusedError as refused:
            response = refused.response
        except TimeoutError:
            response = RefusedError(408, "the request took too long").response
        except web.HTTPRequestEntityTooLarge:
            response = RefusedError(413, f"a report has at most {MAX_REPORT_BYTES} bytes").response
        except web.HTTPException as error:
            response = RefusedError(error.status, error.reason).response
        finally:
            self._under_way -= 1
        route = request.match_info.route.name or "unknown"
        metrics.CHANNEL_REQUESTS.labels(route, response.status).inc()
        return response

    @web.middleware
    async def _pass_on(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Let the leader answer."""
        if self._leader.leads or request.match_info.route.name is None:
            return await handler(request)
        address = self._leader.leader_address
        if not address or FORWARDED in request.headers:
            raise RefusedError(503, "no replica of the operator leads now; try again", 2)
        headers = {
            name: request.headers[name]
            for name in ("Authorization", "Content-Type")
            if name in request.headers
        }
        url = URL.build(scheme="https", authority=address, path=request.rel_url.raw_path, encoded=True)
        body = await request.read()
        try:
            async with self._session.post(
                url,
                data=body,
                headers=headers | {FORWARDED: "1"},
                ssl=self._trust.client,
                server_hostname=self._trust.names[0],
                allow_redirects=False,
            ) as answer:
                return web.Response(
                    body=await answer.read(), status=answer.status, content_type=answer.content_type
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning(
                "the leader at %s does not answer: %s", address, str(error) or type(error).__name__
            )
            raise RefusedError(503, "the operator's leader does not answer; try again", 2) from error

    # The routes

    async def _report(self, request: web.Request) -> web.Response:
        key, _ = await self._authenticate(request)
        report = parse(Report, await request.read())
        self._accept(key, report)
        asked = self._jobs.checkpoint_request(key)
        return web.json_response({"checkpoint": asked} if asked else {})

    async def _agent(self, request: web.Request) -> web.Response:
        key, verdict = await self._authenticate(request)
        report = parse(AgentReport, await request.read())
        if verdict.pod != worker_name(key[1], report.worker):
            raise RefusedError(403, f"pod {verdict.pod} is not worker {report.worker}")
        return web.json_response(self._jobs.on_agent(key, report)._asdict())

    async def _kubeflow_status(self, request: web.Request) -> web.Response:
        key, verdict = await self._authenticate(request)
        body = await request.read()
        content = parse(kubeflow.ProgressStatus, body)
        last = self._jobs.last_report(key)
        attempt = self._jobs.attempt_of_pod(key, verdict.attempt)
        of_attempt = last if last is not None and last.attempt == attempt else None
        report = kubeflow.to_report(content, attempt, of_attempt)
        if report is not None:
            self._accept(key, report)
        return web.Response(body=body, content_type="application/json")

    def _accept(self, key: Key, report: Report) -> None:
        attempt = self._jobs.current_attempt(key)
        if attempt is None:
            raise RefusedError(503, "the job is not known yet", 2)
        if report.attempt != attempt:
            raise RefusedError(409, f"attempt {report.attempt} is over; the current one is {attempt}")
        self._jobs.on_report(key, report)

    async def _authenticate(self, request: web.Request) -> tuple[Key, Verdict]:
        key = (request.match_info["namespace"], request.match_info["name"])
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise RefusedError(401, "send the projected token as Authorization: Bearer")
        if self._jobs.job_uid(key) is None:
            raise RefusedError(503, "the job is not known (yet)", 2)
        try:
            verdict = await self._authenticator.judge(key, token.strip())
        except ApiError as error:
            logger.warning("a token cannot be checked: %s", error, extra={"job": "/".join(key)})
            raise RefusedError(503, "the API server cannot be asked about the token", 2) from error
        if verdict.refusal:
            logger.warning("a report was refused: %s", verdict.refusal, extra={"job": "/".join(key)})
            raise RefusedError(403, verdict.refusal)
        now = time.monotonic()
        if not self._pods.take((key, verdict.pod), now):
            wait = self._pods.wait((key, verdict.pod), now)
            raise RefusedError(429, f"at most {POD_RATE:.0f} requests a second of one pod", wait)
        return key, verdict


def parse(model: type[_Content], body: bytes) -> _Content:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RefusedError(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from error


async def serve(app: web.Application, port: int, context: ssl.SSLContext | None = None) -> web.AppRunner:
    """Serve `app` on all addresses; clean the returned runner up to stop.

    Raises OSError where the port is taken.
    """
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, keepalive_timeout=75, shutdown_timeout=5
    )
    await runner.setup()
    await web.TCPSite(runner, port=port, ssl_context=context).start()
    return runner
