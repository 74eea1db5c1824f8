"""A run from its first to its last step: what it says, reports and leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from trainer.loop.conftest import Channel, Finished
from trainer.loop.jobs import EVERY, STEPS, TinyJob, losses, steps


def test_the_loss_falls_from_that_of_a_model_that_knows_nothing(uninterrupted: Finished) -> None:
    assert uninterrupted.code == 0, uninterrupted.run.log
    found = losses(uninterrupted.run.log)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert abs(found[1] - math.log(512)) < 0.3
    assert sum(found[step] for step in range(STEPS - 9, STEPS + 1)) / 10 < found[1] - 1


def test_in_a_pod_each_line_is_a_json_event_and_each_prompt_is_completed(uninterrupted: Finished) -> None:
    events = [json.loads(line) for line in uninterrupted.run.log.splitlines() if line.startswith("{")]
    assert {event["rank"] for event in events} == {0}
    messages = [event["message"] for event in events]
    assert any(message.startswith("the model completes 'import ' with ") for message in messages)
    assert any(message.startswith("the model completes 'class ' with ") for message in messages)
    assert len([event for event in events if "validation_loss" in event]) == 2
    assert any(
        "training 53,664 parameters" in message and "on 2 processes (cpu)" in message for message in messages
    ), messages


def test_a_step_tells_the_fields_of_internlm_s_log_line(uninterrupted: Finished) -> None:
    events = [json.loads(line) for line in uninterrupted.run.log.splitlines() if line.startswith("{")]
    last = [event for event in events if "tgs" in event][-1]
    assert last["num_consumed_tokens"] == STEPS * 512
    assert (last["micro_num"], last["adam_beta2"]) == (2, 0.95)
    assert 1 <= last["largest_length"] <= 64
    assert 2 * last["smallest_batch"] <= last["num_samples_in_batch"] <= 2 * last["largest_batch"]
    assert 0 < last["tflops_causal"] < last["tflops"]
    assert last["tgs"] * 2 == pytest.approx(last["tokens_per_second"], rel=1e-4)
    assert "mfu" not in last  # what a CPU can do at its peak is not known
    parts = {"data_time", "fwd_bwd_time", "reduce_time", "optimizer_time"}
    assert parts < last.keys()
    assert sum(last[part] for part in parts) < last["step_time"]
    assert last["memory_rss"] > 10**8


def test_the_last_report_and_the_termination_message_say_that_all_steps_are_done(
    uninterrupted: Finished,
) -> None:
    assert uninterrupted.run.message == {
        "reason": "Completed",
        "message": f"all {STEPS} steps are done",
        "step": STEPS,
    }
    report = uninterrupted.last_report
    assert (report["startStep"], report["step"], report["totalSteps"]) == (0, STEPS, STEPS)
    assert report["tokens"] == STEPS * 512
    assert report["etaSeconds"] == 0
    assert report["tokensPerGpuPerSecond"] == pytest.approx(report["tokensPerSecond"] / 2, abs=0.1)
    assert report["tflopsPerGpu"] > 0
    assert report["loadSeconds"] > 0
    assert report["checkpointStallSeconds"] > 0
    assert 0 < report["validationLoss"] < math.log(512)
    assert report["checkpoint"]["step"] == STEPS
    assert report["checkpoint"]["uri"] == str(uninterrupted.job.checkpoints / f"step-{STEPS:08d}")


def test_a_job_that_recomputes_has_the_same_losses(
    uninterrupted: Finished, tiny: Callable[..., TinyJob], channel: Channel
) -> None:
    job = tiny(training={"steps": 10}, parallel={"recompute": "selective"})
    run = job.torchrun(**channel.environment)  # as in a pod, where the log tells all digits
    assert run.end() == 0, run.log
    expected = losses(uninterrupted.run.log)
    assert losses(run.log) == {step: expected[step] for step in range(1, 11)}
    assert "torch.compile: off (on CPUs)" in run.log


def test_the_newest_three_checkpoints_are_kept(uninterrupted: Finished) -> None:
    assert steps(uninterrupted.job.checkpoints) == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
