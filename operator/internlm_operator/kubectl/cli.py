"""The commands of `kubectl internlm`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from internlm_operator import __version__
from internlm_operator.failures import index_of
from internlm_operator.inplace import pods_of
from internlm_operator.kubectl import bundle, views
from internlm_operator.kubectl.access import Access, AccessError
from internlm_operator.objects import ATTEMPT_LABEL, CHECKPOINT_ANNOTATION, Object
from internlm_operator.status import parse_status

READERS = 16
FOLLOWERS = 64
POLL_SECONDS = 1.0
MAX_LOG_BYTES = 8 * 2**20
OPERATOR_NAMESPACE = "internlm-system"

app = typer.Typer(
    help="Look at InternLMJobs, and let them save, with your own rights in the cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Default: that of the context.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig. Default: the current one.")]
Kubeconfig = Annotated[str | None, typer.Option(help="Default: $KUBECONFIG, or ~/.kube/config.")]
Name = Annotated[str, typer.Argument(metavar="JOB", show_default=False)]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.command()
def top(
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Jobs of all namespaces.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once, as without a terminal.")] = False,
) -> None:
    """All jobs, live: phase, step, speed, checkpoint, goodput; those that need somebody first."""
    access = Access.connect(kubeconfig, context, namespace)
    console = Console()
    if once or not console.is_terminal:
        # In a file or a pipe a line is a line, however long.
        wide = Console(width=None if console.is_terminal else 500)
        wide.print(views.job_table(access.jobs(all_namespaces), _now(), all_namespaces))
        return
    table = views.job_table(access.jobs(all_namespaces), _now(), all_namespaces)
    with Live(table, console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(views.job_table(access.jobs(all_namespaces), _now(), all_namespaces), refresh=True)


@app.command()
def describe(
    name: Name, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None
) -> None:
    """One job: where it is and why, its last failure, a timeline of its attempts, where its time went."""
    access = Access.connect(kubeconfig, context, namespace)
    Console().print(views.description(access.job(name), access.events(name), _now()), soft_wrap=False)


@app.command()
def logs(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    all_workers: Annotated[
        bool, typer.Option("--all", help="All workers, also where one is to blame.")
    ] = False,
    worker: Annotated[int | None, typer.Option(min=0, help="This worker only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Last lines of each worker.")] = 100,
) -> None:
    """The log of the worker that failed first, or of all workers, each line with the worker's ranks."""
    access = Access.connect(kubeconfig, context, namespace)
    job, pods = access.job(name), sorted(access.pods(name), key=index_of)
    if worker is not None:
        pods = [pod for pod in pods if index_of(pod) == worker]
    elif not all_workers and (guilty := guilty_pod(job, pods)):
        failure = job["status"]["lastFailure"]
        _say(f"{failure['pod']} failed first: {failure['reason']}: {failure['message']}")
        pods = [guilty]
    if not pods:
        raise AccessError(f"{name} has no such pods: they are removed when a job is suspended or restarts")
    if follow and len(pods) > FOLLOWERS:
        raise AccessError(
            f"{name} has {len(pods)} workers, too many to follow at once: choose one by --worker"
        )
    lock = threading.Lock()

    def show(pod: Object) -> None:
        prefix = rank_prefix(job, pod)
        try:
            for line in access.log(pod, follow, tail):
                with lock:
                    print(prefix + line, flush=follow)
        except AccessError as error:
            with lock:
                _say(prefix + str(error))

    if follow:
        # Daemons: Ctrl-C does not wait for workers that say nothing.
        threads = [threading.Thread(target=show, args=(pod,), daemon=True) for pod in pods]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for pod in pods:
            show(pod)


def guilty_pod(job: Object, pods: list[Object]) -> Object | None:
    """The pod of the last failure, if it is still the one that failed: the next gang's has the same name."""
    status = parse_status(job.get("status"))
    failure = status.last_failure
    if failure is None:
        return None
    gangs = {attempt.number: pods_of(attempt) for attempt in status.attempts}
    gang = str(gangs.get(failure.attempt, failure.attempt))
    for pod in pods:
        label = (pod["metadata"].get("labels") or {}).get(ATTEMPT_LABEL)
        if pod["metadata"]["name"] == failure.pod and label == gang:
            return pod
    return None


def rank_prefix(job: Object, pod: Object) -> str:
    """The ranks of a worker: `[8-15] `."""
    spec = job["spec"]
    processes = spec.get("gpusPerNode") or spec.get("processesPerNode") or 1
    first = index_of(pod) * processes
    return f"[{first}] " if processes == 1 else f"[{first}-{first + processes - 1}] "


@app.command()
def checkpoint(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    wait: Annotated[bool, typer.Option(help="Wait until the checkpoint is there.")] = True,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for it.")] = 600.0,
) -> None:
    """Save a checkpoint now, beside training, and say where it is."""
    access = Access.connect(kubeconfig, context, namespace)
    status = access.job(name).get("status") or {}
    if status.get("phase") != "Running":
        raise AccessError(
            f"{name} is {status.get('phase') or 'new'}: only a job that runs can save a checkpoint"
        )
    request = f"{_now():%Y%m%dT%H%M%S.%fZ}"
    access.annotate(name, CHECKPOINT_ANNOTATION, request)
    if not wait:
        print(f"{name} saves a checkpoint after the step that it is in")
        return
    deadline = time.monotonic() + timeout
    while status.get("checkpointRequest") != request:
        if time.monotonic() > deadline:
            raise AccessError(f"{name} has saved no checkpoint within {timeout:.0f} s; it is still asked for")
        if status.get("completionTime"):
            raise AccessError(f"{name} has ended before it saved a checkpoint")
        time.sleep(POLL_SECONDS)
        status = access.job(name).get("status") or {}
    saved = status["checkpoint"]
    print(f"{name}: checkpoint of step {saved['step']} at {saved['uri']}")


@app.command()
def debug(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    operator_namespace: Annotated[str, typer.Option(help="Where the operator runs.")] = OPERATOR_NAMESPACE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: JOB-debug-TIME.tar.gz.")
    ] = None,
) -> None:
    """Collect job, pods, events and logs into a tar.gz, without secrets, for somebody who helps."""
    access, now = Access.connect(kubeconfig, context, namespace), _now()
    job = access.job(name)
    missing: list[str] = []
    pods = _try(lambda: access.pods(name), missing, f"pods of {name}")
    events = _try(lambda: access.events(name, pods), missing, f"events of {name}")
    operators = _try(
        lambda: access.operator_pods(operator_namespace), missing, f"operator pods in {operator_namespace}"
    )
    texts = {f"logs/{pod['metadata']['name']}.log": pod for pod in pods}
    texts |= {f"operator/{pod['metadata']['name']}.log": pod for pod in operators}

    def read(pod: Object) -> str:
        lines = _try(
            lambda: list(access.log(pod, limit=MAX_LOG_BYTES)), missing, f"log of {pod['metadata']['name']}"
        )
        return "".join(f"{line}\n" for line in lines)

    with ThreadPoolExecutor(READERS) as pool:
        contents = dict(zip(texts, pool.map(read, texts.values()), strict=True))
    contents["versions.txt"] = f"kubectl-internlm {__version__}\ncollected {now:%Y-%m-%dT%H:%M:%SZ}\n"
    contents["missing.txt"] = "".join(f"{line}\n" for line in missing)
    objects = {"job.yaml": [job], "pods.yaml": pods, "events.yaml": events, "operator/pods.yaml": operators}
    folder = f"{name}-debug-{now:%Y%m%dT%H%M%SZ}"
    path = output or Path(f"{folder}.tar.gz")
    path.write_bytes(bundle.archive(folder, bundle.files(objects, contents), now.timestamp()))
    for line in missing:
        _say(f"left out: {line}")
    print(f"{path}: {name}, {len(pods)} pods, {len(events)} events, {len(operators)} pods of the operator")
    print(
        "Values of environment variables and what looks like a credential are taken out; look before you send it."
    )


def _try(read: Callable[[], list[Any]], missing: list[str], what: str) -> list[Any]:
    """What can be read; a bundle with less is better than none."""
    try:
        return read()
    except AccessError as error:
        missing.append(f"{what}: {error}")
        return []


def _now() -> datetime:
    return datetime.now(UTC)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def main(arguments: Iterable[str] | None = None) -> None:
    """The console script."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kubectl internlm")
    except AccessError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # `| head` has read enough. What is left in the buffer has nowhere to go.
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
