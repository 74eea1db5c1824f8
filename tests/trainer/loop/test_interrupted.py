"""Training that is killed, stopped or continued elsewhere: what matters is what it ends with."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from internlm_trainer.checkpoint.format import CHUNK, MANIFEST, chunk_digest, decode, encode
from trainer.loop.conftest import Channel, Finished
from trainer.loop.jobs import EVERY, STEPS, Running, TinyJob, losses, steps, weights

Make = Callable[..., TinyJob]


def stopped_at(run: Running) -> int:
    """The step that a run resumed from."""
    found = re.search(r"resuming from step (\d+)", run.log)
    assert found, run.log
    return int(found[1])


def test_a_job_whose_process_is_killed_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(
    tiny: Make, uninterrupted: Finished
) -> None:
    """In the middle of a save beside training, of which nothing shows: the other run waited for each of its saves."""
    job = tiny(checkpoint={"everySteps": 10, "async": True, "keepEverySteps": 10})
    run = job.torchrun()
    run.wait_for("step 50/")
    victim = run.workers()[1]
    os.kill(victim, signal.SIGKILL)
    assert run.end() != 0
    newest = steps(job.checkpoints)[-1]
    assert newest < STEPS
    again = job.torchrun()
    assert again.end() == 0, again.log
    assert stopped_at(again) == newest
    assert again.message["reason"] == "Completed"
    assert weights(job.checkpoints) == weights(uninterrupted.job.checkpoints)


def test_a_killed_process_is_not_hidden_by_what_its_sibling_says(tiny: Make, tmp_path: Path) -> None:
    training = tiny(training={"steps": 100000}).torchrun()
    training.wait_for("step 5/")
    source = Path(os.__file__).parent
    raw = tiny(folder=tmp_path / "raw")
    raw.data = {
        "prepare": {"text": [f"{source}/*.py"], "sample": "line"},
        "tokenizer": str(raw.folder / "tokenizer.model"),
        "train": [{"path": str(raw.folder / "train")}],
        "validation": [],
    }
    preparing = raw.torchrun()
    preparing.wait_for(" files")  # rank 0 is busy with text while rank 1 waits
    for run in (training, preparing):
        victim = next(pid for pid in run.workers() if _rank(pid) == 1)
        os.kill(victim, signal.SIGKILL)
        assert run.end() != 0
        # Without a message the operator reads the log's end, where torchrun names who died and how.
        assert not run.message_file.exists(), run.message
        assert "Signal 9 (SIGKILL)" in run.log


def _rank(pid: int) -> int:
    variables = dict(
        one.split(b"=", 1) for one in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if one
    )
    return int(variables[b"RANK"])


def test_ctrl_c_saves_at_once_and_the_same_command_goes_on_from_that_very_step(
    tiny: Make, uninterrupted: Finished
) -> None:
    job = tiny(checkpoint={"everySteps": 100000, "async": True})
    run = job.internlm_run()
    run.wait_for("step 50/")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.log
    last = max(losses(run.log))
    assert 50 <= last < STEPS
    assert steps(job.checkpoints) == [last]
    assert "stopping after this step" in run.log
    assert f"stopped after step {last}, which is saved" in run.log
    assert f"`internlm run {job.folder / 'job.yaml'}` goes on from the last checkpoint" in run.log
    assert "Traceback" not in run.log
    again = job.internlm_run()
    assert again.end() == 0, again.log
    assert stopped_at(again) == last
    assert min(losses(again.log)) == last + 1
    assert f"done; checkpoints are in {job.checkpoints}" in again.log
    assert weights(job.checkpoints) == weights(uninterrupted.job.checkpoints)


def test_a_second_ctrl_c_ends_a_run_that_does_not_stop_and_leaves_no_process(tiny: Make) -> None:
    run = tiny(training={"steps": 100000}).internlm_run()
    run.wait_for("step 5/")
    workers = run.workers()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGSTOP)  # now no step can end
    run.process.send_signal(signal.SIGINT)
    run.wait_for("stopping after this step")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    # Nobody may be left to reap them here but as zombies; none of them runs.
    assert not [pid for pid in workers if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_evicted_pod_says_at_which_step_it_saved_and_other_layouts_go_on_alike(
    tiny: Make, uninterrupted: Finished, channel: Channel, tmp_path: Path
) -> None:
    job = tiny(checkpoint={"everySteps": 100000, "async": True})
    run = job.torchrun()
    run.wait_for("step 50/")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    last = max(losses(run.log))
    assert last < STEPS
    assert steps(job.checkpoints) == [last]
    assert run.message == {
        "reason": "Stopped",
        "message": f"stopped after step {last}, which is saved",
        "step": last,
    }
    expected = losses(uninterrupted.run.log)
    for processes, zero in ((1, (1, 1, 1)), (2, (2, 2, 2))):
        folder = tmp_path / f"on-{processes}"
        shutil.copytree(job.checkpoints, folder / "checkpoints")
        other = tiny(folder=folder, processes=processes, zero=zero)
        channel.reports.clear()
        again = other.torchrun(**channel.environment)
        assert again.end() == 0, again.log
        found = losses(again.log)
        assert sorted(found) == list(range(last + 1, STEPS + 1))
        # The log rounds to four places; the last report does not.
        assert [found[step] for step in found] == pytest.approx(
            [expected[step] for step in found], abs=1.1e-4
        )
        first, report = channel.reports[0], channel.reports[-1]
        assert (first["checkpoint"]["step"], first["checkpoint"]["verified"]) == (last, True)
        assert report["startStep"] == last
        for value in ("loss", "validationLoss"):
            assert report[value] == pytest.approx(uninterrupted.last_report[value], abs=1e-5)


def flip_a_bit(checkpoint: Path) -> str:
    [shard] = checkpoint.glob("shard-00001-*.bin")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return f"{shard.name} is damaged"


def save_no_number(checkpoint: Path) -> str:
    """As if a weight had been NaN when the checkpoint was saved: all digests are right."""
    manifest, _ = decode((checkpoint / MANIFEST).read_bytes(), checkpoint.name)
    shard = manifest.shards[1]
    piece = next(piece for piece in shard.pieces if piece.kind == "master")
    data = bytearray((checkpoint / shard.file).read_bytes())
    data[piece.offset : piece.offset + 4] = struct.pack("<f", math.nan)
    (checkpoint / shard.file).write_bytes(data)
    chunks = tuple(chunk_digest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
    shards = (manifest.shards[0], replace(shard, chunks=chunks), *manifest.shards[2:])
    (checkpoint / MANIFEST).write_bytes(encode(replace(manifest, shards=shards))[0])
    return f"{piece.parameter} holds numbers that are infinite or none"


@pytest.mark.parametrize("spoil", [flip_a_bit, save_no_number])
def test_a_bad_checkpoint_is_refused_with_the_reason_and_training_resumes_from_the_one_before(
    tiny: Make, uninterrupted: Finished, spoil: Callable[[Path], str]
) -> None:
    job = tiny()
    shutil.copytree(uninterrupted.job.checkpoints, job.checkpoints)
    assert steps(job.checkpoints) == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
    why = spoil(job.checkpoints / f"step-{STEPS:08d}")
    run = job.torchrun()
    assert run.end() == 0, run.log
    assert f"checkpoint step-{STEPS:08d} is not used: {why}" in run.log
    assert stopped_at(run) == STEPS - EVERY
    assert weights(job.checkpoints) == weights(uninterrupted.job.checkpoints)


def test_a_job_that_is_done_has_nothing_left_to_train(tiny: Make, uninterrupted: Finished) -> None:
    job = tiny()
    shutil.copytree(uninterrupted.job.checkpoints, job.checkpoints)
    run = job.torchrun()
    assert run.end() == 0, run.log
    assert losses(run.log) == {}
    assert run.message["reason"] == "Completed"
