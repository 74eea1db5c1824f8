"""`InternLMJob`: the training part of `internlm_trainer.config` wrapped in its Kubernetes part.

The same models make the CRD (`internlm_operator.crd`), the checks of `internlm validate` and `internlm run`, and
what the operator reads.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, JsonValue, ValidationError

from internlm_trainer.config import Spec, TrainSpec
from internlm_trainer.rules import TRAINING_RULES, Rule, broken_rules

GROUP = "training.internlm.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InternLMJob"
PLURAL = "internlmjobs"
SHORT_NAME = "ilj"

# A worker pod is NAME-worker-INDEX, and its name is a DNS label of at most 63 characters.
MAX_NAME_LENGTH = 63 - len("-worker-99999")


class RecoverySpec(Spec):
    """What happens when a worker fails: the whole gang restarts from the last checkpoint, within a limit."""

    max_restarts: Annotated[int, Field(ge=0, le=10000)] = 10
    """Restarts within `windowSeconds` before the job fails."""
    window_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 86400
    """The sliding window in which restarts are counted."""


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

    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    """Worker pods, one torchrun agent each."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs, and processes, of each worker; 0: train on CPU with `processesPerNode` processes."""
    processes_per_node: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes of each worker when gpusPerNode is 0."""
    image: Annotated[str, Field(max_length=1024)] = ""
    """Trainer image. Default: the one that the operator was installed with."""
    recovery: RecoverySpec = RecoverySpec()
    """What happens when a worker fails."""
    suspend: bool = False
    """Saves a checkpoint and removes the pods; back at false, the job goes on from there."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds after which a finished job is deleted. Default: never."""
    template: TemplateSpec = TemplateSpec()
    """Merged over every worker pod."""

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
    eta_seconds: int | None = None
    """Seconds that the rest will take at this speed."""
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


class Attempt(StatusPart):
    """One gang of pods, from its creation to its end."""

    number: int
    """1 for the first gang."""
    start_time: str
    """When its pods were asked for."""
    spec_digest: str = ""
    """Digest of the part of the spec that its pods were made of."""
    formed: bool = False
    """All of its pods existed at once; one that is missing afterwards was lost."""
    end_time: str = ""
    """When it ended; empty while it is current."""
    start_step: int | None = None
    """The step that it resumed from."""
    end_step: int | None = None
    """The last step that it reported."""
    reason: str = ""
    """Why it ended."""


class LastFailure(StatusPart):
    """The failure that ended the previous attempt, as far as the pods tell it."""

    attempt: int
    """The attempt that it ended."""
    reason: str
    """What failed, in one word."""
    message: str
    """What failed, in a sentence; the trainer's own where it left one."""
    pod: str = ""
    """The pod that failed first."""
    node: str = ""
    """The node that it ran on."""
    exit_code: int | None = None
    """Exit code of its container."""
    signal: int | None = None
    """Signal that ended its container."""
    time: str = ""
    """When it failed."""


class RecentRestarts(StatusPart):
    """Gang restarts that happened close together; `recovery.windowSeconds` counts them from `time` on."""

    time: str
    """When the first of them happened."""
    count: int
    """How many there were."""


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
    """Running, Restarting, Suspended, Succeeded and Failed, with reasons. A True Succeeded or Failed is final."""
    workers: Workers = Workers()
    """The gang's pods."""
    progress: Progress | None = None
    """How far training is."""
    progress_text: str = ""
    """Step of total, for the printed column."""
    checkpoint: Checkpoint | None = None
    """The newest committed checkpoint."""
    restarts: int = 0
    """Gang restarts so far."""
    recent_restarts: list[RecentRestarts] = []
    """Those of the restarts that count towards `recovery.maxRestarts`, oldest first."""
    attempts: list[Attempt] = []
    """The last gangs, oldest first."""
    last_failure: LastFailure | None = None
    """The failure that ended the previous attempt."""
    start_time: str = ""
    """When the operator took the job."""
    completion_time: str = ""
    """When the job succeeded or failed."""


# While pods run, only what the operator itself acts on may change; a suspended job may be edited freely.
FROZEN = ("model", "data", "training", "parallel", "checkpoint", "nodes", "gpusPerNode", "processesPerNode")
TRANSITION_RULES = tuple(
    {
        "rule": f"oldSelf.suspend || self.{name} == oldSelf.{name}",
        "message": f"spec.{name} cannot change while the job runs: set spec.suspend to true first, edit, and set it "
        "back",
        "fieldPath": f".{name}",
        "reason": "FieldValueForbidden",
    }
    for name in FROZEN
)

JOB_RULES: tuple[Rule, ...] = TRAINING_RULES

NAME_PATTERN = "[a-z]([-a-z0-9]*[a-z0-9])?"
NAME_RULES = (
    {
        "rule": f"self.metadata.name.matches('^{NAME_PATTERN}$')",
        "message": "metadata.name: must be lower-case letters, digits and dashes, and start with a letter: "
        "it becomes part of the pods' names",
    },
    {
        "rule": f"self.metadata.name.size() <= {MAX_NAME_LENGTH}",
        "message": f"metadata.name: must have at most {MAX_NAME_LENGTH} characters: "
        "it becomes part of the pods' names",
    },
)


class JobError(ValueError):
    """A job's description has mistakes; `sentences` has one for each, with the field's path."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences


class Job(BaseModel):
    """A validated `InternLMJob` manifest."""

    model_config = Spec.model_config | {"extra": "ignore"}

    name: str
    namespace: str = ""
    spec: JobSpec


class _Loader(yaml.SafeLoader):
    """YAML as kubectl reads it, which is not quite as PyYAML does."""

    # A date is text.
    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key given twice is a mistake, not a correction."""
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        ]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """`4e-5` is a number, though YAML 1.1 takes it for text; `2.0` is 2, also where an integer must be."""
        number = float(self.construct_yaml_float(node))
        return int(number) if number.is_integer() and abs(number) < 2**63 else number


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def load_manifests(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file that are jobs.

    Raises JobError for a file that cannot be read, is no YAML or holds no InternLMJob.
    """
    try:
        documents = [d for d in yaml.load_all(path.read_text(), _Loader) if d is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise JobError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from error
    except yaml.YAMLError as error:
        raise JobError([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from error
    jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
    if not jobs:
        raise JobError([f"{path}: holds no {KIND}; it needs apiVersion: {API_VERSION} and kind: {KIND}"])
    return jobs


def parse_job(manifest: dict[str, Any]) -> Job:
    """Validate one manifest, exactly as the cluster would.

    Raises JobError with a sentence for each mistake.
    """
    if manifest.get("apiVersion") != API_VERSION:
        raise JobError([f"apiVersion: is {manifest.get('apiVersion')!r}; must be {API_VERSION}"])
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise JobError([NAME_RULES[0]["message"]])
    if len(name) > MAX_NAME_LENGTH:
        raise JobError([NAME_RULES[1]["message"]])
    for key in manifest.keys() - {"apiVersion", "kind", "metadata", "spec", "status"}:
        raise JobError([f"{key}: unknown field"])
    spec = parse_spec(manifest.get("spec"))
    return Job(name=name, namespace=str(metadata.get("namespace") or ""), spec=spec)  # type: ignore[union-attr]


def parse_spec(spec: object, world_size: int | None = None) -> JobSpec:
    """Validate a job's `spec`; `world_size` overrides the number of processes that it asks for.

    Raises JobError with a sentence for each mistake.
    """
    if spec is None:
        raise JobError(["spec: Required value"])
    if not isinstance(spec, dict):
        raise JobError([f"spec: Invalid value: {_shorten(spec)}: must be of type object"])
    try:
        job = JobSpec.model_validate(spec)
    except ValidationError as error:
        raise JobError(_sentences(error)) from error
    broken = broken_rules(job, world_size or job.world_size, JOB_RULES)
    if broken:
        raise JobError([f"spec.{rule.path}: {rule.message}" for rule in broken])
    return job


# Pydantic's error types and the API server's words for them.
_WORDS = {
    "string_type": "must be of type string",
    "int_type": "must be of type integer",
    "int_from_float": "must be of type integer",
    "float_type": "must be of type number",
    "bool_type": "must be of type boolean",
    "list_type": "must be of type array",
    "dict_type": "must be of type object",
    "model_type": "must be of type object",
    "string_too_short": "should be at least {min_length} chars long",
    "too_short": "should have at least {min_length} items",
}
_LIMITS = {
    "string_too_long": "Too long: may not be more than {max_length} bytes",
    "too_long": "Too many: {actual_length}: must have at most {max_length} items",
}


def _sentences(error: ValidationError) -> list[str]:
    """Pydantic's errors in the words that the API server uses for the same mistakes."""
    sentences = []
    for e in error.errors():
        path = "spec" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in e["loc"])
        context = e.get("ctx", {})
        match e["type"]:
            case "extra_forbidden":
                close = difflib.get_close_matches(str(e["loc"][-1]), _known_fields(e["loc"][:-1]), n=1)
                text = "unknown field" + (f"; did you mean {close[0]}?" if close else "")
            case "missing":
                text = "Required value"
            case "literal_error":
                options = ", ".join(re.findall("'([^']*)'", context["expected"])).replace(", ", '", "')
                text = f'Unsupported value: {_shorten(e["input"])}: supported values: "{options}"'
            case "value_error":
                text = str(context["error"])
            case limit if limit in _LIMITS:
                text = _LIMITS[limit].format(**context)
            case kind:
                words = _WORDS.get(kind, e["msg"].removeprefix("Input ")).format(**context)
                text = f"Invalid value: {_shorten(e['input'])}: {words}"
        sentences.append(f"{path}: {text}")
    return sentences


def _shorten(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_fields(path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the model at `path` below the spec."""
    model: Any = JobSpec
    for part in path:
        if isinstance(part, int):
            continue
        field = next(f for f in model.model_fields.values() if f.alias == part)
        model = _model_in(field.annotation)
    return [f.alias or "" for f in model.model_fields.values()]


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)
