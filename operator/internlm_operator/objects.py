"""The objects that make a job: a headless service, a ConfigMap, a NetworkPolicy and the worker pods, as plain dicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from internlm_operator import kubeflow
from internlm_operator.api import API_VERSION, GROUP, KIND, JobSpec
from internlm_operator.failures import CONTAINER
from internlm_operator.merge import strategic_merge
from internlm_operator.nodes import Signs, keep_off
from internlm_operator.spec_rules import FROZEN
from internlm_trainer.config import METRICS_PORT

Object = dict[str, Any]

# libyaml's, where PyYAML was built with it, takes a tenth of the time.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

JOB_LABEL = f"{GROUP}/job-name"
INDEX_LABEL = f"{GROUP}/replica-index"
ATTEMPT_LABEL = f"{GROUP}/attempt"
# Of a pod that evaluates the checkpoint of this step; such a pod is no worker, and has no index.
EVALUATION_LABEL = f"{GROUP}/evaluation-step"
# Its value names a checkpoint that somebody asks for now.
CHECKPOINT_ANNOTATION = f"{GROUP}/checkpoint-now"

MASTER_PORT = 29500
CONFIG_DIR = "/etc/internlm"
TOKEN_DIR = "/var/run/secrets/internlm"  # noqa: S105
USER_ID = 1000
# Time to write a checkpoint after SIGTERM.
GRACE_SECONDS = 60
# The kubelet renews the token at 80% of this.
TOKEN_SECONDS = 3600
# Without these, a pod stays bound to a lost node for Kubernetes' default of 300 s, and its gang waits.
NODE_LOST_SECONDS = 30
NODE_LOST_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


@dataclass(frozen=True)
class Settings:
    """What the operator was installed with."""

    trainer_image: str
    """Image of the workers of jobs that name none."""
    channel_url: str
    """Base of the job channel as pods reach it, such as https://internlm-operator.internlm-system.svc:8443."""
    channel_ca: str
    """PEM of the certificate authority that signed the channel's certificate."""
    network_policy: Object | None = None
    """Rules (`ingress`, `egress`) of a job's NetworkPolicy besides those among its workers; None: it gets none."""
    node_signs: Signs = field(default_factory=Signs)
    """What says that a node's hardware failed."""
    max_excluded_percent: int = 10
    """Share of the known nodes that may be left out at once; one always may."""


def worker_name(job_name: str, index: int) -> str:
    return f"{job_name}-worker-{index}"


def audience(namespace: str, name: str) -> str:
    """Audience of the tokens that may report for this job, and for no other."""
    return f"internlmjob/{namespace}/{name}"


def evaluates(pod: Object) -> bool:
    """Whether a pod evaluates checkpoints, and is no worker."""
    return EVALUATION_LABEL in (pod["metadata"].get("labels") or {})


def report_path(namespace: str, name: str) -> str:
    """Path of the job's reports on the job channel."""
    return f"/v1/namespaces/{namespace}/internlmjobs/{name}/report"


def shared_objects(job: Object, settings: Settings) -> list[Object]:
    """What a job's workers share: to be there before they are."""
    made = [service(job), config_map(job, settings)]
    if settings.network_policy is not None:
        made.append(network_policy(job, settings.network_policy))
    asked = bool((job["spec"].get("recovery") or {}).get("podDisruptionBudget"))
    if asked or (job.get("status") or {}).get("podDisruptionBudget"):
        made.append(pod_disruption_budget(job, job["spec"].get("nodes", 1) if asked else 0))
    return made


def shared_digest(job: Object, settings: Settings) -> str:
    """Equal where `shared_objects` are; what they are made of is told apart sooner than what they are."""
    kept = bool((job.get("status") or {}).get("podDisruptionBudget"))
    return digest(_metadata(job, ""), job["spec"], kept, settings.channel_ca, settings.network_policy)


def agent_path(namespace: str, name: str) -> str:
    """Path of what the agents of the job's workers tell and ask on the job channel."""
    return report_path(namespace, name).removesuffix("report") + "agent"


def service(job: Object) -> Object:
    """Gives each worker the name NAME-worker-I.NAME, also before it is ready, since the processes look for it."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, job["metadata"]["name"]),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: job["metadata"]["name"]},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP"}],
        },
    }


def config_map(job: Object, settings: Settings) -> Object:
    """The manifest that every process reads, and the authority that it trusts on the job channel."""
    manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": job["metadata"]["name"], "namespace": job["metadata"]["namespace"]},
        "spec": job["spec"],
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, f"{job['metadata']['name']}-config"),
        "data": {
            "job.yaml": yaml.dump(manifest, Dumper=_DUMPER, sort_keys=False),
            "ca.crt": settings.channel_ca,
        },
    }


def pod_disruption_budget(job: Object, workers: int) -> Object:
    """Refuses to evict a worker while no more than `workers` are there; one that says 0 refuses nothing."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(job, job["metadata"]["name"]),
        "spec": {
            "minAvailable": workers,
            "selector": {
                "matchLabels": {JOB_LABEL: job["metadata"]["name"]},
                "matchExpressions": [{"key": INDEX_LABEL, "operator": "Exists"}],
            },
        },
    }


def network_policy(job: Object, rules: Object) -> Object:
    """Workers reach each other and what `rules` name, and nothing else does or is reached.

    torch.distributed authenticates nobody: who reaches a worker's ports can join the gang or end it.
    """
    workers = {"podSelector": {"matchLabels": {JOB_LABEL: job["metadata"]["name"]}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, job["metadata"]["name"]),
        "spec": {
            **workers,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [workers]}, *rules.get("ingress", [])],
            "egress": [{"to": [workers]}, *rules.get("egress", [])],
        },
    }


def digest(*content: Any) -> str:
    """Equal for equal content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def spec_digest(spec: JobSpec) -> str:
    """Equal for specs that make the same gang and train the same way; fields at their default do not count."""
    content = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    asked = {path: _at(content, path) for path in FROZEN}
    return digest({path: value for path, value in asked.items() if value is not None})


def _at(content: Any, path: str) -> Any:
    for name in path.split("."):
        content = (content or {}).get(name)
    return content


def worker_pod(
    job: Object, spec: JobSpec, attempt: int, index: int, settings: Settings, excluded: Sequence[str] = ()
) -> Object:
    """Worker `index` of gang number `attempt`, with the user's template merged over it, off `excluded` nodes."""
    name = job["metadata"]["name"]
    pod_spec = strategic_merge(_pod_spec(job, spec, attempt, index, settings), spec.template.spec)
    tolerated = {toleration.get("key") for toleration in pod_spec.get("tolerations", [])}
    pod_spec["tolerations"] = pod_spec.get("tolerations", []) + [
        {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOST_SECONDS}
        for taint in NODE_LOST_TAINTS
        if taint not in tolerated
    ]
    if excluded:
        pod_spec["affinity"] = keep_off(pod_spec.get("affinity"), excluded)
    # The gang is found by these; a template that says otherwise would only break its own job.
    pod_spec |= {"restartPolicy": "Never", "hostname": worker_name(name, index), "subdomain": name}
    metadata = _metadata(job, worker_name(name, index))
    metadata["labels"] = {
        **spec.template.metadata.labels,
        **metadata["labels"],
        INDEX_LABEL: str(index),
        ATTEMPT_LABEL: str(attempt),
    }
    if spec.template.metadata.annotations:
        metadata["annotations"] = dict(spec.template.metadata.annotations)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec}


def _metadata(job: Object, name: str) -> Object:
    job_name = job["metadata"]["name"]
    return {
        "name": name,
        "namespace": job["metadata"]["namespace"],
        "labels": {
            JOB_LABEL: job_name,
            "app.kubernetes.io/name": "internlm-trainer",
            "app.kubernetes.io/instance": job_name,
            "app.kubernetes.io/managed-by": "internlm-operator",
        },
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job_name,
                "uid": job["metadata"]["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def _pod_spec(job: Object, spec: JobSpec, attempt: int, index: int, settings: Settings) -> Object:
    memory = {"medium": "Memory"} | ({"sizeLimit": spec.shared_memory} if spec.shared_memory else {})
    pod_spec: Object = {
        "containers": [_container(job, spec, attempt, index, settings)],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "internlm-config", "configMap": {"name": f"{job['metadata']['name']}-config"}},
            {"name": "internlm-token", "projected": {"sources": [{"serviceAccountToken": _token(job)}]}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": memory},
        ],
    }
    if spec.scheduling.priority_class_name:
        pod_spec["priorityClassName"] = spec.scheduling.priority_class_name
    if spec.scheduling.scheduler_name:
        pod_spec["schedulerName"] = spec.scheduling.scheduler_name
    if spec.network.host_network:
        # The workers still find each other by the cluster's names.
        pod_spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod_spec


def _grace(spec: JobSpec) -> int:
    """Seconds that a worker has to save a checkpoint, which the template may set."""
    asked = spec.template.spec.get("terminationGracePeriodSeconds")
    return asked if isinstance(asked, int) else GRACE_SECONDS


def _token(job: Object) -> Object:
    metadata = job["metadata"]
    return {
        "audience": audience(metadata["namespace"], metadata["name"]),
        "expirationSeconds": TOKEN_SECONDS,
        "path": "token",
    }


def _container(job: Object, spec: JobSpec, attempt: int, index: int, settings: Settings) -> Object:
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    environment = {
        "INTERNLM_JOB_FILE": f"{CONFIG_DIR}/job.yaml",
        "INTERNLM_JOB_UID": job["metadata"]["uid"],
        "INTERNLM_ATTEMPT": str(attempt),
        "INTERNLM_REPORT_URL": settings.channel_url + report_path(namespace, name),
        "INTERNLM_REPORT_TOKEN_FILE": f"{TOKEN_DIR}/token",
        "INTERNLM_REPORT_CA_FILE": f"{CONFIG_DIR}/ca.crt",
        **kubeflow.environment(
            settings.channel_url, namespace, name, f"{CONFIG_DIR}/ca.crt", f"{TOKEN_DIR}/token"
        ),
        "INTERNLM_TERMINATION_LOG": "/dev/termination-log",
        # Processes that save a checkpoint get all of the grace but this.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(_grace(spec) - 5, 1)),
        # The root file system is read-only: caches and compiled kernels go to the scratch volume.
        "HOME": "/tmp",  # noqa: S108
        "PYTHONUNBUFFERED": "1",
    }
    ports = [{"name": "rendezvous", "containerPort": MASTER_PORT}]
    asked = spec.telemetry.metrics_port
    metrics_port = METRICS_PORT if asked is None else asked
    if index == 0 and metrics_port:  # rank 0 is in worker 0, and a monitor looks for the port by its name
        environment["INTERNLM_METRICS_PORT"] = str(metrics_port)
        ports.append({"name": "metrics", "containerPort": metrics_port})
    container: Object = {
        "name": CONTAINER,
        "image": trainer_image(spec, settings.trainer_image),
        "command": agent(name, spec, index),
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "ports": ports,
        # The trainer writes its own message; what dies before it can is explained by the end of its log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "internlm-config", "mountPath": CONFIG_DIR, "readOnly": True},
            {"name": "internlm-token", "mountPath": TOKEN_DIR, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
        ],
    }
    limits = {spec.gpu_resource_name: spec.gpus_per_node} if spec.gpus_per_node else {}
    if spec.network.rdma is not None:
        limits[spec.network.rdma.resource_name] = spec.network.rdma.per_node
        # An adapter reads and writes memory that must stay where it is.
        container["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    if limits:
        container["resources"] = {"limits": {name: str(count) for name, count in limits.items()}}
    return container


def trainer_image(spec: JobSpec, installed: str) -> str:
    """The job's image; by `runtimeVersion`, another tag in the repository of the `installed` one."""
    if spec.runtime_version is None:
        return spec.image or installed
    folder, slash, name = installed.partition("@")[0].rpartition("/")
    return f"{folder}{slash}{name.partition(':')[0]}:{spec.runtime_version}"


def agent(name: str, spec: JobSpec, index: int) -> list[str]:
    """The main process of one worker, with torchrun's options. Nodes and ranks are known beforehand, so all
    processes meet at worker 0."""
    return [
        *("python3", "-m", "internlm_trainer.agent"),
        *("--nnodes", str(spec.nodes)),
        *("--node-rank", str(index)),
        *("--nproc-per-node", str(spec.processes_of_a_node)),
        *("--master-addr", f"{worker_name(name, 0)}.{name}"),
        *("--master-port", str(MASTER_PORT)),
    ]
