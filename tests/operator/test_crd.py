"""The CRD is made from the models, whole and structural."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field

from internlm_operator import api, crd, manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", crd.files())
def test_the_committed_file_is_what_the_models_make(name: str) -> None:
    assert (ROOT / name).read_text() == crd.files()[name], "run `make crd` and commit what it writes"


def test_the_command_writes_the_files_into_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="root of the checkout"):
        crd.main(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    crd.main(tmp_path)
    for name, text in crd.files().items():
        assert (tmp_path / name).read_text() == text
    assert yaml.safe_load((tmp_path / "manifests/crd.yaml").read_text()) == crd.custom_resource_definition()


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], path + "[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], path + "{}")


SCHEMA = dict(nodes(crd.job_schema()))


def test_every_field_of_the_schema_says_what_it_is() -> None:
    described = {path for path in SCHEMA if path.startswith((".spec", ".status")) and path[-1] not in "]}"}
    assert [path for path in sorted(described) if not SCHEMA[path].get("description")] == []


def test_the_schema_has_no_words_that_the_api_server_refuses() -> None:
    words = {word for schema in SCHEMA.values() for word in schema}
    assert words & {"$ref", "$defs", "title", "const", "examples", "oneOf"} == set()
    for path, schema in SCHEMA.items():
        any_json = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get(
            "x-kubernetes-int-or-string"
        )
        assert any_json or "type" in schema, path
        assert schema.get("exclusiveMinimum", True) is True, path


def test_every_field_of_the_models_is_in_the_schema() -> None:
    def aliases(model: type[BaseModel], path: str) -> Iterator[str]:
        for field in model.model_fields.values():
            yield f"{path}.{field.alias}"
            inner = manifest.model_in(field.annotation)
            if inner is not None:
                is_list = SCHEMA[f"{path}.{field.alias}"].get("type") == "array"
                yield from aliases(inner, f"{path}.{field.alias}{'[]' if is_list else ''}")

    expected = set(aliases(api.JobSpec, ".spec")) | set(aliases(api.JobStatus, ".status"))
    assert expected <= SCHEMA.keys()


def test_what_all_of_whose_fields_have_defaults_may_be_left_out() -> None:
    for path, schema in SCHEMA.items():
        if path.startswith(".spec") and schema.get("default") is not None and "properties" in schema:
            assert schema["default"] == {}, path
            assert not schema.get("required"), path
    assert SCHEMA[".spec.training.optimizer"]["default"] == {}
    assert SCHEMA[".spec.parallel.zero"]["properties"]["optimizer"]["default"] == -1


def test_the_status_has_no_defaults() -> None:
    assert [p for p, schema in SCHEMA.items() if p.startswith(".status") and "default" in schema] == []


def test_every_rule_and_every_column_points_at_a_field_that_exists() -> None:
    for rule in SCHEMA[".spec"]["x-kubernetes-validations"]:
        assert ".spec" + rule["fieldPath"] in SCHEMA
    for _, _, path, _ in crd.COLUMNS:
        assert path in SCHEMA or path == ".metadata.creationTimestamp"


def test_a_default_that_the_nested_fields_do_not_have_is_refused() -> None:
    class Inner(BaseModel):
        size: int = 1

    class Outer(BaseModel):
        inner: Inner = Field(default=Inner(size=2))

    with pytest.raises(AssertionError):
        crd.structural(Outer)
