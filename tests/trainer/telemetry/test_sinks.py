"""Sinks: who is asked for, what Prometheus calls a value, and that none of them can hold up training."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from internlm_operator.manifest import parse_spec
from internlm_trainer.config import TrainSpec
from internlm_trainer.telemetry import sinks
from internlm_trainer.telemetry.sinks import Opener, Sinks, Values, asked_sinks, metric_of


def job(**telemetry: Any) -> TrainSpec:
    return parse_spec(
        {
            "model": {"preset": "internlm-7b"},
            "data": {"tokenizer": "t", "train": [{"path": "d"}]},
            "training": {"steps": 1},
            "checkpoint": {"path": "c"},
            "telemetry": telemetry,
        }
    )


@pytest.mark.parametrize(
    ("telemetry", "environment", "names"),
    [
        ({}, {}, []),
        ({}, {"INTERNLM_METRICS_PORT": "9464"}, ["metrics on port 9464"]),
        ({"metricsPort": 0}, {"INTERNLM_METRICS_PORT": "9464"}, []),
        ({"metricsPort": 8000}, {}, ["metrics on port 8000"]),
        (
            {"tensorboard": {"path": "s3://b/t"}, "wandb": {"project": "p"}},
            {},
            ["TensorBoard in s3://b/t", "Weights & Biases"],
        ),
    ],
)
def test_the_sinks_that_a_job_asks_for(
    telemetry: dict[str, Any], environment: dict[str, str], names: list[str]
) -> None:
    assert [opener.name for opener in asked_sinks("job", job(**telemetry), environment)] == names


@pytest.mark.parametrize(
    ("name", "metric", "source"),
    [
        ("loss", "internlm_loss", ""),
        ("step", "internlm_step", ""),
        ("loss/a/b", "internlm_source_loss", "a/b"),
        ("validation_loss/en", "internlm_source_validation_loss", "en"),
        ("fwd_bwd_time", "internlm_fwd_bwd_seconds", ""),
        ("memory_reserved", "internlm_memory_reserved_bytes", ""),
    ],
)
def test_what_prometheus_calls_a_value(name: str, metric: str, source: str) -> None:
    assert metric_of(name) == (metric, source)


class Recorder:
    """Takes values but for the steps that it fails at."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.fails, self.steps, self.closed = fails, list[int](), False

    def write(self, step: int, _: Values) -> None:
        if step in self.fails:
            raise OSError(f"no room at {step}")
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


def test_a_sink_that_fails_is_told_once_an_outage_and_the_others_miss_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing, good = Recorder(fails=(2, 3, 5)), Recorder()
    handed = Sinks([Opener("failing", lambda _: failing), Opener("good", lambda _: good)], 0)
    for step in range(1, 7):
        handed.write(step, {"loss": 1.0})
    handed.close()
    assert (failing.steps, good.steps) == ([1, 4, 6], [1, 2, 3, 4, 5, 6])
    assert failing.closed
    assert good.closed
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "failing does not take values: no room at 2; training goes on",
        "failing does not take values: no room at 5; training goes on",
    ]


def test_a_sink_that_hangs_holds_up_neither_the_steps_nor_for_ever_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    caplog.set_level(logging.WARNING)
    release = threading.Event()

    class Hanging(Recorder):
        def write(self, *_: object) -> None:
            release.wait(60)

    handed = Sinks([Opener("hanging", lambda _: Hanging())], 0)
    began = time.monotonic()
    for step in range(3 * sinks.WAITING_VALUES):
        handed.write(step, {})
    handed.close()
    assert time.monotonic() - began < 30
    assert "hanging did not take the last values" in caplog.text
    release.set()
