"""Rules over several fields of a job, and over its edits: for the cluster in CEL, and for `internlm validate`."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from internlm_operator.api import MAX_NAME_LENGTH, JobSpec
from internlm_trainer.rules import TRAINING_RULES, Rule

# What the pods are made of. While they run, only what the operator itself acts on may change.
FROZEN = (
    *("model", "data", "training", "parallel", "checkpoint", "nodes", "gpusPerNode", "processesPerNode"),
    *("gpuResourceName", "image", "runtimeVersion", "sharedMemory", "network", "scheduling", "template"),
    "telemetry.metricsPort",
)


def _frozen_rule(path: str, model: type[BaseModel]) -> dict[str, str]:
    *outer, name = path.split(".")
    for part in outer:
        inner = _field(model, part).annotation
        assert isinstance(inner, type)
        model = inner
    same = f"self.{path} == oldSelf.{path}"
    if _field(model, name).default is None:
        same = f"has(self.{path}) == has(oldSelf.{path}) && (!has(self.{path}) || {same})"
    return {
        "rule": f"oldSelf.suspend || ({same})",
        "message": f"spec.{path} cannot change while the job runs: set spec.suspend to true first, edit, and set it "
        "back",
        "fieldPath": f".{path}",
        "reason": "FieldValueForbidden",
    }


def _field(model: type[BaseModel], alias: str) -> FieldInfo:
    return next(field for field in model.model_fields.values() if field.alias == alias)


TRANSITION_RULES = (
    *(_frozen_rule(name, JobSpec) for name in FROZEN),
    {
        "rule": "self.managedBy == oldSelf.managedBy",
        "message": "spec.managedBy cannot change: two controllers would run the same job; delete it, and create it "
        "again for the other one",
        "fieldPath": ".managedBy",
        "reason": "FieldValueForbidden",
    },
)

JOB_RULES: tuple[Rule, ...] = (
    *TRAINING_RULES,
    Rule(
        "runtimeVersion",
        "give image, or runtimeVersion for a version of the operator's own trainer image, not both",
        "!has(self.runtimeVersion) || self.image == ''",
        lambda s, _: s.runtime_version is None or not s.image,
    ),
)

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
