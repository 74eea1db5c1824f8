"""`internlm-operator run`: the operator's process."""

from __future__ import annotations

import asyncio
import http
import json
import logging
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from internlm_operator import __version__, logs, tls
from internlm_operator.kube import ApiError
from internlm_operator.nodes import Signs, parse_signs
from internlm_operator.objects import report_path
from internlm_operator.serve import Options, serve

OWN_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CHECK_SECONDS = 10.0

logger = logging.getLogger(__name__)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Runs InternLMJobs on Kubernetes.",
)


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
            help="Port of /healthz, /readyz and /metrics (HTTP).",
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
    pod_address: Annotated[
        str,
        typer.Option(
            envvar="INTERNLM_OPERATOR_POD_IP",
            help="Address of this replica, by which the others pass on reports while it leads.",
        ),
    ] = "127.0.0.1",
    lease_seconds: Annotated[
        int,
        typer.Option(
            envvar="INTERNLM_OPERATOR_LEASE_SECONDS",
            min=2,
            help="A leader that does not renew its Lease for so long is replaced by another replica.",
        ),
    ] = 10,
    certificate_check_seconds: Annotated[
        float,
        typer.Option(
            envvar="INTERNLM_OPERATOR_CERTIFICATE_CHECK_SECONDS",
            min=1,
            help="How often to see whether the channel's certificates are to be renewed.",
        ),
    ] = 3600,
    log_format: Annotated[
        logs.LogFormat, typer.Option(envvar="INTERNLM_OPERATOR_LOG_FORMAT", help="Form of the log's lines.")
    ] = logs.LogFormat.json,
) -> None:
    """Watch InternLMJobs and run them, until SIGTERM or Ctrl-C. Jobs go on while no operator runs."""
    logs.set_up(log_format)
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
        pod_address,
        lease_seconds,
        certificate_check_seconds,
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
    wait_seconds: Annotated[float, typer.Option(min=0, help="How long to ask again until it does.")] = 30,
) -> None:
    """Ask the job channel for an answer as a worker would, but without a token: it must refuse just that."""
    if not url.startswith("https://"):
        sys.exit(f"{url} is no address of a job channel: it begins with https://")
    end = time.monotonic() + wait_seconds
    while wrong := _wrong_answer(url, ca_file):
        if time.monotonic() >= end:
            sys.exit(wrong)
        time.sleep(1)
    print(f"the job channel at {url} answers")


def _wrong_answer(url: str, ca_file: Path) -> str:
    """What is wrong with the channel; empty where nothing is."""
    address = url.rstrip("/") + report_path("none", "none")
    request = urllib.request.Request(address, method="POST", data=b"{}")  # noqa: S310
    try:
        context = ssl.create_default_context(cafile=ca_file)
        urllib.request.urlopen(request, timeout=CHECK_SECONDS, context=context)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.UNAUTHORIZED:
            return ""
        return f"{url} answers {error.code}, where a job channel says {http.HTTPStatus.UNAUTHORIZED:d}"
    except (OSError, ValueError) as error:
        return f"{url} does not answer: {error}"
    return f"{url} lets in who has no token: it is no job channel"


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


def main() -> None:
    """The console script."""
    app()
