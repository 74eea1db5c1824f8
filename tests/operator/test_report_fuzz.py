"""Whatever a pod sends: it is refused in one sentence, or it becomes a status that is small and valid."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_world import World, make_report

from internlm_operator import channel, kubeflow
from internlm_operator.api import JobStatus
from internlm_operator.channel import RefusedError
from internlm_operator.inplace import Agent
from internlm_operator.report import AgentReport, Report
from internlm_operator.status import dump_status, parse_status

MAX_STATUS_BYTES = 16 * 1024

numbers = st.one_of(
    st.integers(), st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**400]), st.floats()
)
texts = st.one_of(
    st.text(max_size=40), st.sampled_from(["x" * 3000, "\U0001f600" * 2048, "\x00", "NaN", "1e999"])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4))
)
checkpoints = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            "step": numbers,
            "uri": texts,
            "time": st.one_of(texts, st.just("2026-01-01T00:00:00Z")),
            "bytes": numbers,
            "digest": texts,
        },
    ),
)
fields = dict.fromkeys(make_report().model_dump(by_alias=True), values)
reports = st.fixed_dictionaries({}, optional=fields | {"checkpoint": checkpoints, "unknown": values})
metrics = st.fixed_dictionaries(
    {"name": st.one_of(texts, st.sampled_from(["loss", "current_step", "total_steps", "eval_loss"]))},
    optional={"value": st.one_of(values, numbers.map(str))},
)
trainer = st.fixed_dictionaries(
    {},
    optional={
        "progressPercentage": values,
        "estimatedRemainingSeconds": values,
        "metrics": st.one_of(values, st.lists(metrics, max_size=6)),
        "lastUpdatedTime": values,
    },
)
said = st.one_of(values, st.just("half a pair: \ud83d"))
words = st.fixed_dictionaries(
    {"reason": st.one_of(said, st.just("Hung"))},
    optional={"message": said, "evidence": said, "rank": values, "step": values},
)
ends = st.fixed_dictionaries(
    {"exitCode": st.one_of(values, st.integers(0, 255))},
    optional={"message": st.one_of(values, words.map(json.dumps))},
)
RUNNING = World()
RUNNING.start()


def check_status_with(report: Report) -> None:
    world = copy.deepcopy(RUNNING)
    world.tell(report)
    world.step()
    check_status_of(world)


def check_status_of(world: World) -> None:
    text = json.dumps(world.status, allow_nan=False, ensure_ascii=False)
    assert len(text.encode()) < MAX_STATUS_BYTES
    assert dump_status(parse_status(json.loads(text))) == world.status
    JobStatus.model_validate(json.loads(text))
    for number in _integers(world.status):
        assert -(2**63) <= number < 2**63, "the API server stores 64 bits"


def _integers(value: Any) -> list[int]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for item in inner for number in _integers(item)]
    return [value] if isinstance(value, int) else []


def parse(model: type[Any], body: bytes) -> Any:
    refused: RefusedError | None = None
    try:
        return channel.parse(model, body)
    except RefusedError as error:
        refused = error
    assert refused.response.status == 400
    assert 0 < len(str(refused)) < 500
    return None


@settings(max_examples=150, deadline=None)
@given(reports)
def test_any_report_is_refused_or_leaves_a_small_and_valid_status(changed: dict[str, Any]) -> None:
    for content in (changed, make_report().model_dump(mode="json", by_alias=True) | changed):
        report = parse(Report, json.dumps(content).encode())
        if report is not None:
            check_status_with(report.model_copy(update={"attempt": 1}))


@settings(max_examples=150, deadline=None)
@given(st.one_of(values, st.fixed_dictionaries({"trainerStatus": trainer})))
def test_so_is_any_status_in_kubeflows_words(content: Any) -> None:
    status = parse(kubeflow.ProgressStatus, json.dumps(content).encode())
    for last in (None, make_report(step=2**53, totalSteps=2**53, tokens=0)):
        report = kubeflow.to_report(status, 1, last) if status is not None else None
        if report is not None:
            check_status_with(report)


@settings(max_examples=80, deadline=None)
@given(st.one_of(values, ends))
def test_so_is_whatever_an_agent_says_of_its_processes_end(ended: Any) -> None:
    content = {"worker": 0, "gang": 1, "attempt": 1, "ended": ended}
    report = parse(AgentReport, json.dumps(content).encode())
    if report is not None:
        world = copy.deepcopy(RUNNING)
        world.agents[0] = Agent(report, world.now)
        world.wait(10)
        world.settle()
        check_status_of(world)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_json_are_refused(body: bytes) -> None:
    for model in (Report, AgentReport, kubeflow.ProgressStatus):
        parse(model, body)


@pytest.mark.parametrize(
    "body", [b"[" * 60_000, b'{"checkpoint":' * 4_000, b'{"step":' + b"9" * 60_000 + b"}"]
)
def test_deep_and_long_json_is_refused(body: bytes) -> None:
    for model in (Report, AgentReport, kubeflow.ProgressStatus):
        assert parse(model, body) is None
