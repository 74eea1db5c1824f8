"""`internlm-operator run`: the operator's process."""

from __future__ import annotations

import asyncio
import http
import json
import logging
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import kopf
import typer
from aiohttp import web

from internlm_operator import __version__, channel, handlers, tls
from internlm_operator.api import PLURAL
from internlm_operator.controller import Controller
from internlm_operator.kube import ApiError, Kube
from internlm_operator.nodes import Signs, parse_signs
from internlm_operator.objects import Settings, report_path

OWN_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CRD_POLL_SECONDS = 5.0
CHECK_SECONDS = 10.0

logger = logging.getLogger(__name__)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Runs InternLMJobs on Kubernetes.",
)


class LogFormat(StrEnum):
    json = "json"
    text = "text"


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


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    trainer_image: Annotated[
        str,
        typer.Option(
            envvar="INTERNLM_OPERATOR_TRAINER_IMAGE", help="Image of the workers of jobs that name none."
        ),
    ],
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            envvar="INTERNLM_OPERATOR_NAMESPACES",
            help="Namespace whose jobs to run; may be given several times. Default, and `all`: every one.",
        ),
    ] = None,
    service_name: Annotated[
        str,
        typer.Option(
            envvar="INTERNLM_OPERATOR_SERVICE_NAME",
            help="Service by which workers reach the channel.",
        ),
    ] = "internlm-operator",
    service_namespace: Annotated[
        str,
        typer.Option(
            envvar="INTERNLM_OPERATOR_SERVICE_NAMESPACE",
            help="Its namespace, where the channel's certificate is kept too. Default: the operator's own.",
        ),
    ] = "",
    service_port: Annotated[
        int,
        typer.Option(envvar="INTERNLM_OPERATOR_SERVICE_PORT", min=1, max=65535, help="The Service's port."),
    ] = 8443,
    channel_port: Annotated[
        int,
        typer.Option(
            envvar="INTERNLM_OPERATOR_CHANNEL_PORT",
            min=1,
            max=65535,
            help="Port to serve the channel on.",
        ),
    ] = 8443,
    secret_name: Annotated[
        str,
        typer.Option(
            envvar="INTERNLM_OPERATOR_SECRET_NAME",
            help="Secret of the channel's certificate authority. Default: SERVICE_NAME-channel.",
        ),
    ] = "",
    liveness: Annotated[
        int,
        typer.Option(
            envvar="INTERNLM_OPERATOR_LIVENESS",
            min=1,
            max=65535,
            help="Port of /healthz and /readyz (HTTP).",
        ),
    ] = 8080,
    network_policy: Annotated[
        str,
        typer.Option(
            envvar="INTERNLM_OPERATOR_NETWORK_POLICY",
            help="JSON with the ingress and egress rules of each job's NetworkPolicy, besides those among its "
            "workers. Default: no NetworkPolicy is made.",
        ),
    ] = "",
    watch_nodes: Annotated[
        bool,
        typer.Option(
            envvar="INTERNLM_OPERATOR_WATCH_NODES",
            help="Read the nodes' health, which needs the right to list and watch nodes.",
        ),
    ] = True,
    node_condition: Annotated[
        list[str] | None,
        typer.Option(help="TYPE=STATUS of a node's condition that means failed hardware; several times."),
    ] = None,
    node_taint: Annotated[
        list[str] | None,
        typer.Option(help="Key of a node's taint that means failed hardware; several times."),
    ] = None,
    node_label: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of a node's label that means failed hardware; several times."),
    ] = None,
    max_excluded_percent: Annotated[
        int,
        typer.Option(
            envvar="INTERNLM_OPERATOR_MAX_EXCLUDED_PERCENT",
            min=0,
            max=100,
            help="Share of the nodes that jobs may leave out at once; one always, unless this is 0.",
        ),
    ] = 10,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="INTERNLM_OPERATOR_LOG_FORMAT", help="Form of the log's lines.")
    ] = LogFormat.json,
) -> None:
    """Watch InternLMJobs and run them, until SIGTERM or Ctrl-C. Jobs go on while no operator runs."""
    _set_up_logging(log_format)
    namespaces = [name for name in namespace or [] if name]
    options = Options(
        [] if "all" in namespaces else namespaces,
        trainer_image,
        channel_port,
        service_name,
        service_namespace or _own_namespace(),
        service_port,
        secret_name or f"{service_name}-channel",
        liveness,
        _network_rules(network_policy),
        watch_nodes,
        _node_signs(node_condition or [], node_taint or [], node_label or []),
        max_excluded_percent,
    )
    try:
        asyncio.run(serve(options))
    except (ApiError, tls.SecretError, OSError) as error:
        logger.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def check(
    url: Annotated[
        str, typer.Argument(help="The job channel, such as https://internlm-operator.NAMESPACE.svc:8443.")
    ],
    ca_file: Annotated[Path, typer.Option(help="PEM of the authority that signed its certificate.")],
) -> None:
    """Ask the job channel for an answer as a worker would, but without a token: it must refuse just that."""
    address = url.rstrip("/") + report_path("none", "none")
    request = urllib.request.Request(address, method="POST", data=b"{}")  # noqa: S310
    try:
        context = ssl.create_default_context(cafile=ca_file)
        urllib.request.urlopen(request, timeout=CHECK_SECONDS, context=context)  # noqa: S310
        sys.exit(f"{url} lets in who has no token: it is no job channel")
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.UNAUTHORIZED:
            sys.exit(f"{url} answers {error.code}, where a job channel says {http.HTTPStatus.UNAUTHORIZED:d}")
    except (OSError, ValueError) as error:
        sys.exit(f"{url} does not answer: {error}")
    print(f"the job channel at {url} answers")


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
            authority = await tls.load_authority(kube, options.service_namespace, options.secret_name)
            await _serve_jobs(kube, authority, options, ready)
        finally:
            await health.cleanup()


async def _serve_jobs(kube: Kube, authority: tls.KeyPair, options: Options, ready: asyncio.Event) -> None:
    names = tls.service_names(options.service_name, options.service_namespace)
    context = tls.server_context(tls.new_server(authority, names, datetime.now(UTC)))
    url = f"https://{names[0]}:{options.service_port}"
    authority_pem = authority.certificate_pem.decode()
    settings = Settings(
        options.trainer_image,
        url,
        authority_pem,
        options.network_policy,
        options.node_signs,
        options.max_excluded_percent,
    )
    controller = Controller(kube, settings)
    reports = channel.application(channel.Authenticator(kube, controller), controller)
    server = await channel.serve(reports, options.channel_port, context)
    logger.info(
        "serving %s of %s; job channel at %s", PLURAL, ", ".join(options.namespaces) or "all namespaces", url
    )
    stop = asyncio.Event()
    background = [
        asyncio.create_task(controller.run(), name="workers"),
        asyncio.create_task(tls.renew_certificate(context, authority, names), name="certificate"),
    ]
    for task in background:
        # A part that fails takes the process down, and Kubernetes starts it again.
        task.add_done_callback(lambda _: stop.set())
    try:
        await kopf.operator(
            registry=handlers.registry(controller, options.watch_nodes),
            settings=handlers.settings(),
            standalone=True,
            clusterwide=not options.namespaces,
            namespaces=options.namespaces,
            ready_flag=ready,
            stop_flag=stop,
        )
    finally:
        logger.info("stopping")
        for task in background:
            task.cancel()
        await server.cleanup()
        for result in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


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
        return web.Response(text="starting\n", status=503)

    health = web.Application()
    health.router.add_get("/healthz", healthz)
    health.router.add_get("/readyz", readyz)
    return health


def _network_rules(text: str) -> dict[str, Any] | None:
    try:
        rules = json.loads(text) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"is no JSON: {error}", param_hint="--network-policy") from error
    if rules is not None and not (isinstance(rules, dict) and rules.keys() <= {"ingress", "egress"}):
        raise typer.BadParameter(
            "must be an object with ingress and egress, as in a NetworkPolicy's spec",
            param_hint="--network-policy",
        )
    return rules


def _node_signs(conditions: list[str], taints: list[str], labels: list[str]) -> Signs:
    try:
        return parse_signs(conditions, taints, labels)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--node-condition, --node-label") from error


def _own_namespace() -> str:
    try:
        return OWN_NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


class _JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _set_up_logging(format: LogFormat) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if format is LogFormat.json else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # kopf has a line for each event that it hands on.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)


def main() -> None:
    """The console script."""
    app()
