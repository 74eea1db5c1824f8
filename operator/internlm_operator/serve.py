"""The operator's process: what runs in it, and how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from dataclasses import dataclass
from typing import Any

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from internlm_operator import channel, handlers, metrics, tls
from internlm_operator.api import PLURAL
from internlm_operator.authentication import Authenticator
from internlm_operator.controller import Controller
from internlm_operator.kube import Kube
from internlm_operator.lease import Lease
from internlm_operator.nodes import Signs
from internlm_operator.objects import Settings

CRD_POLL_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the process was started with."""

    namespaces: list[str]
    trainer_image: str
    channel_port: int
    service_name: str
    service_namespace: str
    service_port: int
    secret_name: str
    health_port: int
    network_policy: dict[str, Any] | None
    watch_nodes: bool
    node_signs: Signs
    max_excluded_percent: int
    pod_address: str
    lease_seconds: int
    certificate_check_seconds: float


async def serve(options: Options) -> None:
    """Run the operator until a signal, or until a part of it fails.

    Raises ApiError without access to the API server, tls.SecretError for a broken Secret, OSError for a port
    that is taken.
    """
    ready = asyncio.Event()
    async with await Kube.connect() as kube:
        health = await channel.serve(_health(ready), options.health_port)
        try:
            await _wait_for_crd(kube, options.namespaces)
            certificates = await tls.Certificates.load(
                kube,
                options.service_namespace,
                options.secret_name,
                tls.service_names(options.service_name, options.service_namespace),
            )
            await _serve_jobs(kube, certificates, options, ready)
        finally:
            await health.cleanup()


async def _serve_jobs(
    kube: Kube, certificates: tls.Certificates, options: Options, ready: asyncio.Event
) -> None:
    name, namespace = options.service_name, options.service_namespace
    identity = f"{socket.gethostname()}_{uuid.uuid4()}"
    address = _authority(options.pod_address, options.channel_port)
    lease = Lease(kube, namespace, name, identity, address, options.lease_seconds)
    url = f"https://{certificates.names[0]}:{options.service_port}"
    settings = Settings(
        options.trainer_image,
        url,
        certificates.bundle,
        options.network_policy,
        options.node_signs,
        options.max_excluded_percent,
    )
    controller = Controller(kube.fenced(lease.seconds_left), settings)
    job_metrics = metrics.JobMetrics(controller.jobs, lambda: lease.leads, kube.now)
    metrics.REGISTRY.register(job_metrics)
    app = channel.Channel(Authenticator(kube, controller), controller, lease, certificates).application()
    server = await channel.serve(app, options.channel_port, certificates.server)
    logger.info(
        "serving %s of %s; job channel at %s", PLURAL, ", ".join(options.namespaces) or "all namespaces", url
    )
    stop = asyncio.Event()
    leader = asyncio.create_task(lease.compete(controller.run, stop), name="leader")
    rotation = asyncio.create_task(
        certificates.keep(controller.trust, options.certificate_check_seconds), name="certificates"
    )
    failed = asyncio.Event()
    for task in (leader, rotation):
        # A part that fails takes the process down, and Kubernetes starts it again.
        task.add_done_callback(lambda _: failed.set())
    try:
        await kopf.operator(
            registry=handlers.registry(controller, options.watch_nodes),
            settings=handlers.settings(),
            standalone=True,
            clusterwide=not options.namespaces,
            namespaces=options.namespaces,
            ready_flag=ready,
            stop_flag=failed,
        )
    finally:
        logger.info("stopping")
        asyncio.get_running_loop().set_exception_handler(_but_for_generators)
        ready.clear()
        stop.set()
        rotation.cancel()
        results = await asyncio.gather(leader, rotation, return_exceptions=True)
        await server.cleanup()
        metrics.REGISTRY.unregister(job_metrics)
        for result in results:
            if isinstance(result, Exception):
                raise result


def _but_for_generators(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Tell of what nobody awaits, but for the ends of generators.

    kopf leaves its watches to the loop, which closes each and what it is in at once: one may find the other closed.
    """
    if "asyncgen" not in context:
        loop.default_exception_handler(context)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _wait_for_crd(kube: Kube, namespaces: list[str]) -> None:
    """kopf looks for the custom resource once, at its start; it may be installed after the operator."""
    told = False
    while not await kube.can_list_jobs(namespaces[0] if namespaces else None):
        if not told:
            logger.warning("waiting for the CustomResourceDefinition %s to be installed", PLURAL)
        told = True
        await asyncio.sleep(CRD_POLL_SECONDS)


def _health(ready: asyncio.Event) -> web.Application:
    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if ready.is_set():
            return web.Response(text="ok\n")
        return web.Response(text="not ready\n", status=503)

    async def prometheus(_: web.Request) -> web.Response:
        # Of many jobs that is a second's work.
        page = await asyncio.to_thread(metrics.page)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    health = web.Application()
    health.router.add_get("/healthz", healthz)
    health.router.add_get("/readyz", readyz)
    health.router.add_get("/metrics", prometheus)
    return health
