"""`InternLMJob`: the training part of `internlm_trainer.config` wrapped in its Kubernetes part.

The same models make the CRD (`internlm_operator.crd`), the checks of `internlm validate` and `internlm run`
(`internlm_operator.manifest`), and what the operator reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue

from internlm_operator.forms import ImageTag, ManagerName, MemorySize, ObjectName, ResourceName
from internlm_trainer.config import Spec, TrainSpec

GROUP = "training.internlm.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InternLMJob"
PLURAL = "internlmjobs"
SHORT_NAME = "ilj"

# A worker pod is NAME-worker-INDEX, and its name is a DNS label of at most 63 characters.
MAX_NAME_LENGTH = 63 - len("-worker-99999")
# The operator is measured with 10,000 workers (benchmarks/NOTES.md), and Kubernetes with 5,000 nodes and more.
MAX_NODES = 16384


# The value of `managedBy` that this operator answers to.
MANAGER = f"{GROUP}/internlm-operator"

_Timeout = Annotated[int, Field(ge=0, le=2**31 - 1)]


class HangTimeouts(Spec):
    """When a rank that does not go on counts as hung, and the job restarts. 0: never."""

    setup_seconds: _Timeout = 3600
    """Longest set-up: from its start until the first steps are done. Making data from raw text does not count."""
    step_seconds: _Timeout = 300
    """Longest stay in a part of a step, at least: ten times the slowest recent step counts where it is more."""
    checkpoint_seconds: _Timeout = 1800
    """Longest stand for a checkpoint or an evaluation between two steps; ten of the slowest steps at least."""


class RecoverySpec(Spec):
    """What happens when a worker fails: the whole gang restarts from the last checkpoint, within a budget.

    A restart is free after an attempt that committed a newer checkpoint, and after Kubernetes took a pod away
    (eviction, drain, preemption).  The others count.
    """

    max_attempts_without_progress: Annotated[int, Field(ge=1, le=10000)] = 3
    """Attempts without a newer checkpoint that end the job, those left out whose failure is the cluster's:
    hardware, network, infrastructure."""
    max_restarts: Annotated[int, Field(ge=0, le=10000)] = 10
    """Restarts that count within `windowSeconds` before the job fails, whatever failed; 0: the first failure ends
    the job."""
    window_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 86400
    """The sliding window in which restarts are counted."""
    backoff_seconds: Annotated[int, Field(ge=0, le=3600)] = 10
    """Wait after the second attempt in a row that failed without a step; doubled after each further one."""
    max_backoff_seconds: Annotated[int, Field(ge=0, le=86400)] = 300
    """The longest such wait."""
    exclude_node_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] = 3600
    """How long a node that is to blame gets no worker of this job and, for failed hardware, of no other job
    either. 0: no node is left out."""
    pod_disruption_budget: bool = False
    """Make a PodDisruptionBudget that refuses every voluntary eviction (such as `kubectl drain`) of a worker."""
    hang_timeouts: HangTimeouts = HangTimeouts()
    """When a rank that does not go on counts as hung."""


class SchedulingSpec(Spec):
    """How the worker pods come to their nodes."""

    priority_class_name: ObjectName | None = None
    """PriorityClass of the worker pods. It must exist before the job starts."""
    scheduler_name: ObjectName | None = None
    """Scheduler that gives the worker pods their nodes. Default: the cluster's own."""


class RdmaSpec(Spec):
    """RDMA adapters of each worker."""

    resource_name: ResourceName
    """Extended resource by which the device plugin offers them, such as rdma/hca."""
    per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """Adapters of each worker."""


class NetworkSpec(Spec):
    """The network between the workers."""

    rdma: RdmaSpec | None = None
    """RDMA adapters to ask for. The trainer then may lock memory (the capability IPC_LOCK), which the Pod Security
    level `restricted` does not allow."""
    host_network: bool = False
    """Workers use their node's network, one worker a node, where there is no other way to its adapters. No Pod
    Security level but `privileged` allows it, and no network policy holds for them."""


class PodMetadata(Spec):
    """Labels and annotations of every worker pod."""

    labels: dict[str, str] = {}
    """Labels to add."""
    annotations: dict[str, str] = {}
    """Annotations to add."""


class TemplateSpec(Spec):
    """Merged over every worker pod, as `kubectl patch --type strategic` would; the container is `trainer`."""

    metadata: PodMetadata = PodMetadata()
    """Labels and annotations to add."""
    spec: dict[str, JsonValue] = {}
    """A partial PodSpec: volumes, tolerations, nodeSelector, and the container `trainer` with env, envFrom,
    resources, volumeMounts, imagePullPolicy..."""


class JobSpec(TrainSpec):
    """One training job."""

    nodes: Annotated[int, Field(ge=1, le=MAX_NODES)] = 1
    """Worker pods, one agent each, which starts and watches the training processes."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs, and processes, of each worker; 0: train on CPU with `processesPerNode` processes."""
    processes_per_node: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes of each worker when gpusPerNode is 0."""
    gpu_resource_name: ResourceName = "nvidia.com/gpu"
    """Extended resource by which the device plugin offers the GPUs, such as nvidia.com/mig-3g.40gb."""
    image: Annotated[str, Field(max_length=1024)] = ""
    """Trainer image. Default: the one that the operator was installed with."""
    runtime_version: ImageTag | None = None
    """Version of the trainer: the tag to take of the image that the operator was installed with, so that a job
    stays with one version while the operator is upgraded. Not together with `image`."""
    shared_memory: MemorySize | None = None
    """Size of /dev/shm, which is memory of the worker, such as 64Gi. Default: half of the node's memory, or the
    worker's limit."""
    network: NetworkSpec = NetworkSpec()
    """The network between the workers."""
    scheduling: SchedulingSpec = SchedulingSpec()
    """How the worker pods come to their nodes."""
    template: TemplateSpec = TemplateSpec()
    """Merged over every worker pod."""
    recovery: RecoverySpec = RecoverySpec()
    """What happens when a worker fails."""
    suspend: bool = False
    """Saves a checkpoint and removes the pods; back at false, the job goes on from there."""
    managed_by: ManagerName = MANAGER
    """Controller that runs the job. The operator leaves jobs of any other, such as kueue.x-k8s.io/multikueue, alone.
    It cannot be changed."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Seconds since the job was created, or last resumed, after which it saves a checkpoint and fails with the
    reason DeadlineExceeded. Waiting for nodes and restarts count. Default: none."""
    startup_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Seconds that the workers may take to run once all of them have a node: to pull the image, to mount volumes.
    Then the gang is made anew, which counts as a restart. Default: none."""
    clean_pod_policy: Literal["All", "None", "Running"] = "Running"
    """Which pods are removed when the job has finished. `Running`: those that still run, others stay for their
    logs; `All`; `None`: not even those that run, and hold their GPUs, for looking into a failure."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds after which a finished job is deleted. Default: never."""

    @property
    def processes_of_a_node(self) -> int:
        return self.gpus_per_node or self.processes_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_of_a_node


Phase = Literal[
    "Pending", "Starting", "Running", "Restarting", "Suspending", "Suspended", "Succeeded", "Failed"
]


class StatusPart(BaseModel):
    """Base of the parts of the status: camelCase, written by the operator alone."""

    model_config = Spec.model_config | {
        "extra": "ignore",
        "strict": False,
        "frozen": False,
        "validate_by_name": True,
        "validate_by_alias": True,
    }


class Condition(StatusPart):
    """A Kubernetes condition (metav1.Condition)."""

    type: str
    """What the condition is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """Why, in one CamelCase word for programs."""
    message: str = ""
    """Why, in a sentence for people."""
    last_transition_time: str
    """When `status` last changed."""
    observed_generation: int = 0
    """The generation of the spec that this was decided on."""


class Workers(StatusPart):
    """The gang's pods."""

    desired: int = 0
    """Pods that the job asks for."""
    ready: int = 0
    """Pods that run."""


class Progress(StatusPart):
    """How far training is, as rank 0 last reported it."""

    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Optimizer steps of the whole job."""
    tokens: int = 0
    """Tokens trained on."""
    skipped_steps: int = 0
    """Steps whose update was left out, as their loss or gradient norm was a spike or no number."""
    failed_saves: int = 0
    """Saves that failed since the newest good checkpoint; the log says why."""
    loss: float | None = None
    """Training loss of the last reported step, in nats a token."""
    validation_loss: float | None = None
    """Loss of the last evaluation on `data.validation`."""
    tokens_per_second: float | None = None
    """Speed of the whole gang."""
    tokens_per_gpu_per_second: float | None = None
    """Speed of one process (TGS)."""
    tflops_per_gpu: float | None = None
    """Model TFLOPS of one process: attention counted full, recomputation not at all."""
    straggler_rank: int | None = None
    """The rank that stays slower than the others, and for which all wait; none where they are even."""
    straggler_score: float | None = None
    """How many times as long as the median rank it computes, at least 1.2."""
    eta_seconds: int | None = None
    """Seconds that the rest will take at this speed."""
    eta: str = ""
    """The same for people, such as 3d20h."""
    last_report_time: str = ""
    """When the report came."""


class Checkpoint(StatusPart):
    """The newest committed checkpoint."""

    step: int
    """Optimizer steps that it holds."""
    uri: str
    """Where it is."""
    time: str
    """When it was committed."""
    bytes: int = 0
    """Its size."""
    digest: str = ""
    """Digest of its manifest, which holds the digests of its shards."""
    verified: bool = False
    """Its bytes came back from the store as they were written: with `checkpoint.verify` when it was saved, else once
    the job has resumed from it."""


FailureClass = Literal[
    "UserError",
    "DataError",
    "OutOfMemory",
    "Hardware",
    "Network",
    "Preemption",
    "Infrastructure",
    "Unknown",
]
FailureAction = Literal["InPlaceRestart", "GangRestart", "GangRestartAvoidingNode", "Reschedule", "Fail"]


class Attempt(StatusPart):
    """One gang of pods, from its creation to its end."""

    number: int
    """1 for the first gang."""
    start_time: str
    """When its pods were asked for."""
    spec_digest: str = ""
    """Digest of the part of the spec that its pods were made of."""
    gang: int | None = None
    """Number of the attempt whose pods it uses; none for pods of its own."""
    ready: bool = False
    """All agents of these pods have started its processes."""
    formed: bool = False
    """All of its pods existed at once; one that is missing afterwards was lost."""
    end_time: str = ""
    """When it ended; empty while it is current."""
    start_step: int | None = None
    """The step that it resumed from."""
    end_step: int | None = None
    """The last step that it reported."""
    checkpoint_step: int | None = None
    """The newest checkpoint that it committed."""
    load_seconds: int = 0
    """Seconds from the rendezvous to the first step, as the trainer measured them."""
    checkpoint_stall_seconds: int = 0
    """Seconds that training stood still for checkpoints, as the trainer measured them."""
    excluded_nodes: list[str] = []
    """Nodes that its pods may not use."""
    reason: str = ""
    """Why it ended."""
    class_: Annotated[FailureClass | None, Field(alias="class")] = None
    """What kind of failure ended it."""
    node: str = ""
    """The node of the pod that failed first."""


class LastFailure(StatusPart):
    """The failure that ended the previous attempt, as far as pods and nodes tell it."""

    attempt: int
    """The attempt that it ended."""
    class_: Annotated[FailureClass | None, Field(alias="class")] = None
    """What kind of failure it is, which decides what is done about it."""
    reason: str
    """What failed, in one word."""
    message: str
    """What failed, in a sentence; the trainer's own where it left one."""
    rank: int | None = None
    """The rank that failed first, where the trainer or torchrun names it."""
    pod: str = ""
    """The pod that failed first."""
    node: str = ""
    """The node that it ran on."""
    exit_code: int | None = None
    """Exit code of its container."""
    signal: int | None = None
    """Signal that ended its container."""
    evidence: str = ""
    """What the class rests on."""
    action: FailureAction | None = None
    """What was done about it."""
    lost_steps: int | None = None
    """Steps that were done and have to be done again."""
    time: str = ""
    """When it failed."""


class ExcludedNode(StatusPart):
    """A node that gets no worker for a while, since it was to blame for a failure."""

    node: str
    """Its name."""
    class_: Annotated[FailureClass, Field(alias="class")]
    """What kind of failure it was; Hardware keeps the workers of other jobs away, too."""
    evidence: str = ""
    """What the class rests on."""
    since: str
    """When it failed."""
    until: str
    """When it may be used again."""


class Goodput(StatusPart):
    """Where the time since the job's creation went; the seconds add up to it, as of `asOf`."""

    as_of: str = ""
    """The time up to which seconds are counted; what came since is like `phase` says."""
    queued_seconds: int = 0
    """Waiting for the operator, a quota or a queue; no pod was there."""
    scheduling_seconds: int = 0
    """Waiting for nodes."""
    image_pull_seconds: int = 0
    """On nodes, until all containers run: images, volumes."""
    rendezvous_seconds: int = 0
    """Until all processes found each other."""
    load_seconds: int = 0
    """Building the model and reading data and checkpoint, until the first step."""
    productive_seconds: int = 0
    """Training steps that were done for the first time."""
    redone_seconds: int = 0
    """Training steps that had been done before and were lost."""
    checkpoint_stall_seconds: int = 0
    """Training stood still to save."""
    hung_seconds: int = 0
    """No progress was made, until it was noticed and ended."""
    restarting_seconds: int = 0
    """From a failure until the next gang's pods are asked for."""
    suspended_seconds: int = 0
    """Suspended, or being suspended."""
    furthest_step: int = 0
    """The furthest step that any attempt reached: those up to it are redone when they are done again."""


class RecentRestarts(StatusPart):
    """Gang restarts that happened close together; `recovery.windowSeconds` counts them from `time` on."""

    time: str
    """When the first of them happened."""
    count: int
    """How many there were."""


class EvaluationResult(StatusPart):
    """A number that an evaluation found."""

    step: int
    """The checkpoint's step."""
    task: str
    """The task, or perplexity."""
    metric: str
    """What was measured."""
    value: float
    """What it is."""
    time: str
    """When it was known."""


class Evaluation(StatusPart):
    """Evaluations of checkpoints, as `spec.evaluation` asks for them."""

    step: int | None = None
    """The checkpoint that is being evaluated; none between two."""
    uri: str = ""
    """Where it is."""
    attempt: int = 0
    """How often it was tried, this time included."""
    start_time: str = ""
    """When this try began."""
    evaluated_step: int = 0
    """The last checkpoint that was evaluated, or given up."""
    message: str = ""
    """Why the last try failed; empty if it did not."""
    results: list[EvaluationResult] = []
    """The newest results, oldest first; `evaluations.jsonl` beside the checkpoints has all."""


class JobStatus(StatusPart):
    """What is true of the job, kept by the operator."""

    phase: Phase = "Pending"
    """The state in one word, for people; programs read `conditions`."""
    observed_generation: int = 0
    """The generation of the spec that this status is about."""
    conditions: Annotated[
        list[Condition],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = []
    """Queued, Starting, Running, Restarting, Suspended, CheckpointStale, ProgressStalled, Succeeded and Failed, with
    reasons. A True Succeeded or Failed is final."""
    workers: Workers = Workers()
    """The gang's pods."""
    layout: str = ""
    """ZeRO degrees of parameters, gradients and optimizer, for the printed column."""
    selector: str = ""
    """Label selector of the worker pods, for the scale subresource."""
    progress: Progress | None = None
    """How far training is."""
    progress_text: str = ""
    """Step of total, for the printed column."""
    checkpoint: Checkpoint | None = None
    """The newest committed checkpoint."""
    checkpoint_request: str = ""
    """Value of the annotation `training.internlm.io/checkpoint-now` whose checkpoint is there."""
    restarts: int = 0
    """Gang restarts so far."""
    attempts_without_progress: int = 0
    """Failed attempts since the newest checkpoint that count towards `recovery.maxAttemptsWithoutProgress`."""
    recent_restarts: list[RecentRestarts] = []
    """Those of the restarts that count towards `recovery.maxRestarts`, oldest first."""
    attempts: list[Attempt] = []
    """The last gangs, oldest first."""
    last_failure: LastFailure | None = None
    """The failure that ended the previous attempt."""
    excluded_nodes: list[ExcludedNode] = []
    """Nodes that were to blame, until they may be used again."""
    goodput: Goodput = Goodput()
    """Where the time went."""
    evaluation: Evaluation | None = None
    """Evaluations of checkpoints."""
    pod_disruption_budget: bool = False
    """The job has a PodDisruptionBudget, made when `recovery.podDisruptionBudget` asked for it."""
    start_time: str = ""
    """When the operator took the job."""
    completion_time: str = ""
    """When the job succeeded or failed."""
