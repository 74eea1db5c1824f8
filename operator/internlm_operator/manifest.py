"""Reading manifests of `InternLMJob`: as strictly as the cluster, and in the same words."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from internlm_operator.api import API_VERSION, KIND, MAX_NAME_LENGTH, JobSpec
from internlm_operator.spec_rules import JOB_RULES, NAME_PATTERN, NAME_RULES
from internlm_trainer.config import Spec
from internlm_trainer.rules import broken_rules


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
        model = model_in(field.annotation)
    return [f.alias or "" for f in model.model_fields.values()]


def model_in(annotation: Any) -> Any:
    """The model that a field of this type holds; None if it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := model_in(a))), None)
