"""The CustomResourceDefinition of `InternLMJob`, made from the models of `internlm_operator.api`.

`python -m internlm_operator.crd` writes it for kubectl and for the helm chart; both files are committed, and
a test fails when they differ from the models.  Pydantic speaks JSON Schema 2020-12 with references; the API
server wants a structural OpenAPI v3.0 schema without any, so this module is mostly that translation:
https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from internlm_operator import api, spec_rules

Schema = dict[str, Any]

CRD_NAME = f"{api.PLURAL}.{api.GROUP}"
HEADER = "# Made by `make crd` from internlm_operator.api: change the models, not this file.\n"
CHART_TEMPLATE = (
    HEADER
    + """{{{{- if .Values.crds.enabled }}}}
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: {name}
  labels:
    {{{{- include "internlm-operator.labels" . | nindent 4 }}}}
  {{{{- if .Values.crds.keep }}}}
  annotations:
    helm.sh/resource-policy: keep
  {{{{- end }}}}
{spec}{{{{- end }}}}
"""
)

# (name, type, JSON path, wide): how far, how fast, how safe, how long; and for `--output=wide`, where and why.
COLUMNS = (
    ("Phase", "string", ".status.phase", False),
    ("Step", "string", ".status.progressText", False),
    ("Loss", "number", ".status.progress.loss", False),
    ("Tok/s", "integer", ".status.progress.tokensPerSecond", False),
    ("Checkpoint", "date", ".status.checkpoint.time", False),
    ("Restarts", "integer", ".status.restarts", False),
    ("ETA", "string", ".status.progress.eta", False),
    ("Nodes", "integer", ".spec.nodes", True),
    ("Ready", "integer", ".status.workers.ready", True),
    ("Layout", "string", ".status.layout", True),
    ("Last failure", "string", ".status.lastFailure.class", True),
    ("Age", "date", ".metadata.creationTimestamp", False),
)

# `kubectl scale --replicas` sets the nodes of a suspended job; of a running one the schema's rules refuse it.
SCALE = {
    "specReplicasPath": ".spec.nodes",
    "statusReplicasPath": ".status.workers.ready",
    "labelSelectorPath": ".status.selector",
}

# Words of JSON Schema that OpenAPI v3.0 has too, with the same meaning.
_SAME = (
    "type", "format", "description", "enum", "default", "required", "pattern", "minimum", "maximum",
    "minLength", "maxLength", "minItems", "maxItems",
    "x-kubernetes-int-or-string", "x-kubernetes-validations",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
)  # fmt: skip


def structural(model: type[BaseModel], *, defaults: bool = True) -> Schema:
    """The structural schema of `model`: nothing by reference, optional instead of nullable, camelCase.

    Args:
        defaults: whether the API server shall fill in what is left out; the status has no defaults, since
            what the operator has not said is not known.
    """
    schema = model.model_json_schema(by_alias=True)
    return _translate(schema, schema.get("$defs", {}), defaults)


def _translate(node: Schema, definitions: dict[str, Schema], defaults: bool) -> Schema:
    node = _optional(node)
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        # The field's own words stand for the first paragraph of its model's docstring; the rest is detail.
        summary, _, detail = target.get("description", "").partition("\n\n")
        node = target | node | {"description": f"{node.get('description', summary)} {detail}".strip()}
    if not node.keys() - {"$ref", "description", "title", "default"}:  # any JSON
        return {"x-kubernetes-preserve-unknown-fields": True}
    result = {word: node[word] for word in _SAME if word in node}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if "const" in node:
        result["enum"] = [node["const"]]
    for bound in ("minimum", "maximum"):  # OpenAPI v3.0 says "exclusive" by a flag beside the bound
        exclusive = "exclusive" + bound.capitalize()
        if exclusive in node:
            result |= {bound: node[exclusive], exclusive: True}
    if result.get("x-kubernetes-int-or-string"):
        result["anyOf"] = node["anyOf"]
    if "properties" in node:
        result["properties"] = {
            name: _translate(field, definitions, defaults) for name, field in node["properties"].items()
        }
    if "items" in node:
        result["items"] = _translate(node["items"], definitions, defaults)
    if isinstance(node.get("additionalProperties"), dict):
        values = _translate(node["additionalProperties"], definitions, defaults)
        if values.pop("x-kubernetes-preserve-unknown-fields", False):
            result["x-kubernetes-preserve-unknown-fields"] = True
        else:
            result["additionalProperties"] = values
    return _with_default(result, defaults)


def _optional(node: Schema) -> Schema:
    """`X | None` is an `X` that may be left out; null itself is refused, as for Kubernetes' own fields."""
    options = node.get("anyOf", [])
    if {"type": "null"} not in options:
        return node
    rest = [option for option in options if option != {"type": "null"}]
    assert len(rest) == 1, f"a field is either one type or absent, not {options}"
    field: Schema = {word: value for word, value in node.items() if word not in ("anyOf", "default")}
    return {**field, **rest[0]}


def _with_default(schema: Schema, defaults: bool) -> Schema:
    if not defaults:
        schema.pop("default", None)
    elif "properties" in schema and "default" in schema:
        # An empty object: the API server fills in its fields' own defaults, which are the same.
        own = {name: field["default"] for name, field in schema["properties"].items() if "default" in field}
        assert all(
            own.get(name) in (value, {}) for name, value in schema["default"].items() if value is not None
        )
        schema["default"] = {}
    return schema


def _validations() -> list[Schema]:
    """The rules over several fields, as CEL: broken, each names its field and says what would be right."""
    rules = [
        {
            "rule": rule.cel,
            "message": rule.message,
            "fieldPath": f".{rule.path}",
            "reason": "FieldValueInvalid",
        }
        for rule in spec_rules.JOB_RULES
    ]
    return rules + [dict(rule) for rule in spec_rules.TRANSITION_RULES]


def job_schema() -> Schema:
    """The schema of a whole `InternLMJob`."""
    spec = structural(api.JobSpec)
    spec["x-kubernetes-validations"] = _validations()
    return {
        "type": "object",
        "description": "One training job of an InternLM-family model.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": structural(api.JobStatus, defaults=False),
        },
        "x-kubernetes-validations": [dict(rule) for rule in spec_rules.NAME_RULES],
    }


def custom_resource_definition() -> Schema:
    """The whole CustomResourceDefinition as plain data."""
    columns: list[Schema] = [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": 1} if wide else {})
        for name, kind, path, wide in COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": CRD_NAME},
        "spec": {
            "group": api.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": api.KIND,
                "listKind": f"{api.KIND}List",
                "plural": api.PLURAL,
                "singular": api.KIND.lower(),
                "shortNames": [api.SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": api.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}, "scale": dict(SCALE)},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": job_schema()},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Repeats what is the same twice instead of pointing at it with an anchor."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _yaml(data: Schema) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def files() -> dict[str, str]:
    """The text of every generated file, by its path in the checkout."""
    crd = custom_resource_definition()
    spec = _yaml({"spec": crd["spec"]})
    assert "{{" not in spec, "helm would take it for a template"
    return {
        "manifests/crd.yaml": HEADER + _yaml(crd),
        "charts/internlm-operator/templates/crd.yaml": CHART_TEMPLATE.format(name=CRD_NAME, spec=spec),
    }


def main(root: Path = Path()) -> None:
    """Write the files below `root`, the checkout."""
    if not (root / "pyproject.toml").exists():
        sys.exit("internlm_operator.crd: run it in the root of the checkout")
    for name, text in files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        print(name)


if __name__ == "__main__":
    main()
