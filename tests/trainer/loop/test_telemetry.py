"""Where a run's numbers go, and what it leaves: one real job with everything asked for, and jobs that go wrong."""

from __future__ import annotations

import gzip
import json
import socket
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ports import free_port
from trainer.loop.jobs import Corpus, Running, TinyJob, weights

STEPS = 24


@dataclass(frozen=True)
class Watched:
    """A job that ended, and the last answer of its metrics' port."""

    job: TinyJob
    run: Running
    code: int
    metrics: str
    events: list[dict[str, Any]]


def two_sources(corpus: Corpus, name: str) -> list[dict[str, Any]]:
    return [
        {"path": str(corpus.train.parent / name), "weight": 3.0},
        {"path": f"{corpus.train.parent}/./{name}"},
    ]


@pytest.fixture(scope="module")
def watched(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Two processes with every sink, a trace and heartbeats."""
    folder = tmp_path_factory.mktemp("watched")
    port = free_port()
    heartbeats = folder / "heartbeats"
    heartbeats.mkdir()
    job = TinyJob(
        corpus,
        folder,
        data={"train": two_sources(corpus, "train"), "validation": two_sources(corpus, "validation")},
        training={"steps": STEPS},
        telemetry={
            "tensorboard": {"path": str(folder / "tensorboard")},
            "wandb": {"project": "tests"},
            "metricsPort": port,
            "profile": {"path": f"file://{folder}/traces", "firstStep": 3, "steps": 2, "ranks": 2},
        },
    )
    run = job.torchrun(
        INTERNLM_HEARTBEAT_DIR=str(heartbeats),
        WANDB_MODE="offline",
        WANDB_DIR=str(folder),
        WANDB_SILENT="true",
    )
    metrics = ""
    while run.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                metrics = answer.read().decode() or metrics
        except OSError:
            time.sleep(0.02)
    code = run.end()
    events = [json.loads(line) for line in run.log.splitlines() if line.startswith("{")]
    return Watched(job, run, code, metrics, events)


def test_prometheus_reads_the_newest_values(watched: Watched) -> None:
    assert watched.code == 0, watched.run.log
    lines = dict(line.rsplit(" ", 1) for line in watched.metrics.splitlines() if not line.startswith("#"))
    assert 0 < float(lines["internlm_step"]) <= STEPS
    assert 1 < float(lines["internlm_loss"]) < 7
    assert float(lines["internlm_memory_rss_bytes"]) > 1e8
    assert float(lines["internlm_fwd_bwd_seconds"]) > 0
    assert sum(name.startswith("internlm_source_loss{source=") for name in lines) == 2


def test_tensorboard_has_every_step_and_the_losses_of_each_source(watched: Watched) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched.job.folder / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")]) == 2
    assert [event.step for event in events.Scalars("validation_loss")] == [STEPS]
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("validation_loss/")]) == 2
    assert {"checkpoint_step", "tgs", "tflops", "grad_norm"} < set(events.Tags()["scalars"])


def test_weights_and_biases_has_a_run(watched: Watched) -> None:
    (run,) = (watched.job.folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 10_000


def test_each_asked_rank_leaves_a_trace_of_the_asked_steps(watched: Watched) -> None:
    traces = sorted((watched.job.folder / "traces").iterdir())
    assert [trace.name for trace in traces] == [f"step-00000003-rank-0000{rank}.json.gz" for rank in (0, 1)]
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert (names.count("fwd_bwd"), names.count("optimizer")) == (2, 2)


def test_every_rank_s_last_heartbeat_says_that_it_is_done(watched: Watched) -> None:
    beats = [
        json.loads((watched.job.folder / "heartbeats" / f"rank-{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert [(beat["rank"], beat["section"], beat["step"]) for beat in beats] == [
        (0, "done", STEPS),
        (1, "done", STEPS),
    ]


def test_sinks_that_do_not_open_are_told_and_training_goes_on_to_the_same_weights(
    watched: Watched, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    listener = socket.create_server(("127.0.0.1", 0))
    job = TinyJob(
        watched.job.corpus,
        tmp_path / "job",
        data=watched.job.data,
        training=watched.job.training,
        telemetry={
            "tensorboard": {"path": str(tmp_path / "file")},
            "wandb": {"project": "tests"},
            "metricsPort": listener.getsockname()[1],
            "profile": {"path": str(tmp_path / "file"), "firstStep": 1},
        },
    )
    run = job.torchrun(
        INTERNLM_HEARTBEAT_DIR=str(tmp_path / "file"),
        WANDB_MODE="online",
        WANDB_API_KEY="",
        WANDB_DIR=str(tmp_path),
    )
    with listener:
        assert run.end() == 0, run.log
    assert "metrics on port" in run.log
    assert f"TensorBoard in {tmp_path}/file cannot be opened" in run.log
    assert "Weights & Biases cannot be opened" in run.log
    assert "the trace cannot be written to" in run.log
    assert "training goes on without heartbeats" in run.log
    assert weights(job.checkpoints, STEPS) == weights(watched.job.checkpoints, STEPS)


def test_full_memory_is_told_with_what_to_change(tiny: Callable[..., TinyJob]) -> None:
    job = tiny(processes=1, zero=(1, 1, 1), model={"hiddenSize": 131072, "ffnSize": 1048576})
    run = job.alone()
    assert run.end() == 1
    assert run.message["reason"] == "OutOfMemory"
    assert run.message["message"].startswith("rank 0: memory is full: ")
    assert "training.microBatchSize" in run.message["message"]
    assert "Traceback" not in run.log
