"""How the operator grows: one job of many pods, and many jobs of one pod, on an API server with played nodes.

    python benchmarks/operator_scale.py [--pods 100,1000,4000] [--jobs 100,1000,4000]
        [--results FOLDER/results.jsonl] [--plot FOLDER/scale.png]

starts etcd, API server, scheduler and controllers on loopback, kwok as the kubelets of a hundred nodes, and an operator
with its own metrics as they are.  For each size it prints how long it took until all ran, and after one pod failed
until all were replaced, the operator's reconcile and queue times, its calls, its memory and its CPU time, which alone
does not depend on what else the machine does.  `--results` keeps the rows, and `--plot` draws all that are kept there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "operator")]

from kubernetes import config  # noqa: E402
from operator_process import NAMESPACE, Here, Process  # noqa: E402

from cluster import binaries  # noqa: E402
from cluster.cluster import Cluster  # noqa: E402
from cluster.controlplane import wait_until  # noqa: E402

NODES = 100
LONG = 3600.0
RECONCILE = "internlm_operator_reconcile_duration_seconds"
DELAY = "internlm_operator_queue_delay_seconds"


@dataclass
class Row:
    """What one size gave."""

    what: str
    size: int
    start: float
    replace: float | None
    reconcile: tuple[float, float]
    delay: tuple[float, float]
    calls: float
    """API calls a pod that was made; a gang is made twice and deleted once, so that 1.5 is the least."""
    kilobytes: float
    """Memory a pod or a job, above that of an operator without any."""
    cpu: float
    """CPU milliseconds of the operator a pod that was made."""

    def __str__(self) -> str:
        replaced = "" if self.replace is None else f"{self.replace:.1f}"
        numbers = [f"{1000 * value:.0f}" for value in (*self.reconcile, *self.delay)]
        cells = [self.what, str(self.size), f"{self.start:.1f}", replaced, *numbers]
        cells += [f"{self.calls:.1f}", f"{self.kilobytes:.1f}", f"{self.cpu:.1f}"]
        return "| " + " | ".join(cells) + " |"


HEADER = """\
| what | size | s until all run | s from a failure until all replaced | reconcile p50 ms | p99 | queue delay p50 ms \
| p99 | API calls a pod | KB each | CPU ms a pod |
|---|---|---|---|---|---|---|---|---|---|---|"""


def quantile(before: dict[str, float], after: dict[str, float], name: str, share: float) -> float:
    """Seconds that this share of what was observed between the two took at most, as Prometheus estimates it."""
    pattern = re.compile(rf'{name}_bucket{{le="([^"]+)"(?:,result="\w+")?}}')
    counts: dict[float, float] = {}
    for sample, value in after.items():
        found = pattern.fullmatch(sample)
        if found:
            bound = float(found[1].replace("+Inf", "inf"))
            counts[bound] = counts.get(bound, 0.0) + value - before.get(sample, 0.0)
    total, low, below = max(counts.values(), default=0.0), 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= share * total:
            return (
                low
                if bound == float("inf")
                else low + (bound - low) * (share * total - below) / (count - below)
            )
        low, below = bound, count
    return 0.0


def memory(process: Process) -> float:
    """Resident memory, KB."""
    assert process.process is not None
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return float(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


def cpu_seconds(process: Process) -> float:
    assert process.process is not None
    fields = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def calls(samples: dict[str, float]) -> float:
    mine = (
        n for n in samples if n.startswith("internlm_operator_api_requests_total") and '"leases"' not in n
    )
    return sum(samples[name] for name in mine)


class Bench:
    """The cluster of the benchmark."""

    def __init__(self, cluster: Cluster, folder: Path, keep: Callable[[Row], None]) -> None:
        self.cluster, self.folder, self.keep = cluster, folder, keep
        self.connection = config.new_client_from_config(str(cluster.kubeconfig))

    def measure(self, what: str, size: int, work: Callable[[Here], tuple[float, float | None]]) -> None:
        """Do the work with an operator of its own, so that its memory is that of this work."""
        operator = Process(self.folder, self.cluster.kubeconfig, lease_seconds=10)
        operator.start()
        try:
            wait_until(lambda: operator.leads, "the operator to lead", 60)
            time.sleep(2)
            before, idle, spent = operator.metrics(), memory(operator), cpu_seconds(operator)
            start, replace = work(Here(self.connection, operator))
            spent, used = cpu_seconds(operator) - spent, memory(operator)
            after = operator.metrics()
            times = [
                (quantile(before, after, name, 0.5), quantile(before, after, name, 0.99))
                for name in (RECONCILE, DELAY)
            ]
            pods = size if replace is None else 2 * size
            made = (calls(after) - calls(before)) / pods
            self.keep(
                Row(what, size, start, replace, *times, made, (used - idle) / size, 1000 * spent / pods)
            )
        finally:
            self.cluster.kubectl("delete", "ilj", "--all", f"--namespace={NAMESPACE}", "--wait=false")
            gone = ("get", "pods", f"--namespace={NAMESPACE}", "--output=name", "--chunk-size=0")
            wait_until(lambda: not self.cluster.kubectl(*gone).strip(), "the pods to go", LONG, interval=2)
            assert operator.stop() == 0

    def gang(self, here: Here, size: int) -> tuple[float, float]:
        """One job: its start, and what happens when one of its pods fails."""
        began = time.monotonic()
        here.create("gang", nodes=size, template={})
        wait_until(lambda: here.status("gang").get("phase") == "Running", "the gang to run", LONG)
        start = time.monotonic() - began
        failed = time.monotonic()
        here.core.patch_namespaced_pod(
            f"gang-worker-{size // 2}", NAMESPACE, {"metadata": {"annotations": {"test/fail": "1"}}}
        )

        def replaced() -> bool:
            status = here.status("gang")
            return bool(status["restarts"] == 1 and status["phase"] == "Running")

        wait_until(replaced, "the gang to be replaced", LONG)
        return start, time.monotonic() - failed

    def crowd(self, here: Here, size: int) -> tuple[float, None]:
        """Many jobs at once."""
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda index: here.create(f"job-{index}", nodes=1, template={}), range(size)))
        command = ("get", "ilj", f"--namespace={NAMESPACE}", "--no-headers")

        def all_run() -> bool:
            return self.cluster.kubectl(*command).count(" Running ") == size

        wait_until(all_run, "all jobs to run", LONG, interval=1 + size / 1000)
        return time.monotonic() - began, None


def start_kwok(cluster: Cluster) -> None:
    program = binaries.ensure(["kwok"], binaries.progress())["kwok"]
    stages = binaries.MODULES / "kwok" / "stages.yaml"
    flags = ["--manage-all-nodes", "--node-lease-duration-seconds=8", f"--config={stages}"]
    # A hundred kubelets do more than four things at once.
    options = {"podPlayStageParallelism": 64, "nodePlayStageParallelism": 4, "nodeLeaseParallelism": 4}
    config = {"apiVersion": "config.kwok.x-k8s.io/v1alpha1", "kind": "KwokConfiguration", "options": options}
    (cluster.state.root / "kwok.json").write_text(json.dumps(config))
    flags += [f"--config={cluster.state.root / 'kwok.json'}"]
    cluster.state.start("kwok", [program, f"--kubeconfig={cluster.kubeconfig}", *flags])
    node = {"apiVersion": "v1", "kind": "Node"}
    cluster.apply(*(node | {"metadata": {"name": f"node-{index}"}} for index in range(NODES)))
    cluster.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")


def plot(rows: list[Row], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4))
    panels = figure.subplots(1, 3)
    for what in sorted({row.what for row in rows}):
        mine = sorted((row for row in rows if row.what == what), key=lambda row: row.size)
        sizes = [row.size for row in mine]
        panels[0].loglog(sizes, [row.start for row in mine], "o-", label=f"{what}: until all run")
        replaced = [(row.size, row.replace) for row in mine if row.replace is not None]
        if replaced:
            panels[0].loglog(*zip(*replaced, strict=True), "s--", label=f"{what}: until replaced")
        panels[1].semilogx(sizes, [row.kilobytes for row in mine], "o-", label=what)
        panels[2].semilogx(sizes, [row.cpu for row in mine], "o-", label=what)
    for axes, label in zip(panels, ("seconds", "memory, KB each", "CPU, ms a pod made"), strict=True):
        axes.set(xlabel="pods or jobs", ylabel=label, ylim=(None if axes is panels[0] else 0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = {"type": lambda text: [int(size) for size in text.split(",") if size]}
    parser.add_argument("--pods", default=[100, 1000, 4000], **sizes)
    parser.add_argument("--jobs", default=[100, 1000, 4000], **sizes)
    parser.add_argument("--results", type=Path, help="file that rows are added to")
    parser.add_argument("--plot", type=Path, help="picture of all rows in --results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so take the cluster down
    cluster = Cluster.up(nodes=0, name="scale", log=binaries.progress())

    def keep(row: Row) -> None:
        print(row, flush=True)
        if options.results:
            with options.results.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    try:
        start_kwok(cluster)
        cluster.kubectl("create", "namespace", NAMESPACE)
        cluster.kubectl("apply", f"--filename={ROOT / 'manifests' / 'crd.yaml'}")
        cluster.kubectl("wait", "--for=condition=Established", "crd/internlmjobs.training.internlm.io")
        print(HEADER, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(cluster, Path(folder), keep)
            for what, many, work in (
                ("a gang", options.pods, bench.gang),
                ("jobs", options.jobs, bench.crowd),
            ):
                for size in many:
                    bench.measure(what, size, lambda here, size=size, work=work: work(here, size))
    finally:
        cluster.down()
    if options.results and options.plot:
        plot([Row(**json.loads(line)) for line in options.results.read_text().splitlines()], options.plot)


if __name__ == "__main__":
    main()
