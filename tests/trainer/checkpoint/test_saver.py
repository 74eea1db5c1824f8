"""Saves beside training: what they hold, what they wait for, and how their failures are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import pytest
import torch

from internlm_trainer.checkpoint import Alone, CheckpointStore, Failed, Piece, Saved, Saver, Want
from internlm_trainer.checkpoint.snapshot import Snapshot
from internlm_trainer.errors import StepFailed, UserError
from trainer.checkpoint.states import Rank, on_ranks, open_store
from trainer.conftest import CUT, HANG

SHAPES = {"w": (3, 1000)}


@dataclass
class Training:
    """A rank whose state is one tensor that every step changes, in the same way that the loop saves it."""

    store: CheckpointStore
    world: Any
    max_age: float = 3600.0

    def __post_init__(self) -> None:
        self.ends: list[Saved | Failed] = []
        self.saver = Saver(self.store, self.world, writes=True, max_age=self.max_age)
        self.saver.tell = self.ends.append
        size = 3000 // self.world.size
        self.span = (self.world.rank * size, (self.world.rank + 1) * size)
        self.weights = torch.zeros(size)

    def pieces(self) -> Iterator[Piece]:
        yield Piece("master", "w", *self.span, self.weights)

    def train(self, step: int, *, due: bool = False) -> bool:
        """One step; whether a save began with it."""
        self.saver.heard(*self.world.total(*self.saver.report()))
        self.saver.before_update()
        self.weights.fill_(step)
        if self.saver.wanted(due):
            self.saver.begin(step, self.pieces(), {"step": step}, SHAPES)
            return True
        if due:
            self.saver.postpone(step)
        return False

    def train_until_idle(self, step: int) -> int:
        while not self.saver.wanted(True):
            step += 1
            self.train(step)
        return step


class Slow(CheckpointStore):
    """A store that writes shards when it is told to."""

    go: Event

    def write_shard(self, step: int, rank: int, image: Any) -> Any:
        assert self.go.wait(60)
        return super().write_shard(step, rank, image)


@pytest.fixture
def slow(tmp_path) -> Slow:
    store = Slow(str(tmp_path / "run"), {}, 3, "job", 1.0)
    store.go = Event()
    return store


def held(store: CheckpointStore, step: int) -> set[float]:
    out = torch.zeros(3000)
    store.open(step).load([Want("master", "w", 0, 3000, out)])
    return set(out.tolist())


def test_what_is_saved_is_the_state_of_its_step_though_training_goes_on(slow):
    training = Training(slow, Alone())
    assert training.train(10, due=True)
    for step in range(11, 20):
        training.train(step)
    assert slow.candidates() == []
    slow.go.set()
    training.train_until_idle(20)
    assert held(slow, 10) == {10.0}
    [saved] = training.ends
    assert isinstance(saved, Saved)
    assert saved.checkpoint == slow.open(10).committed
    assert 0 < saved.stall < saved.seconds


def test_an_update_waits_for_the_copies_that_are_still_to_be_made(slow, monkeypatch):
    copies, finish = Event(), Snapshot.finish

    def finish_later(snapshot: Snapshot) -> None:
        assert copies.wait(60)
        finish(snapshot)

    monkeypatch.setattr(Snapshot, "finish", finish_later)
    slow.go.set()
    training = Training(slow, Alone())
    training.train(10, due=True)
    update = Thread(target=training.train, args=(11,))
    update.start()
    update.join(0.3)
    assert set(training.weights.tolist()) == {10.0}
    copies.set()
    update.join()
    assert set(training.weights.tolist()) == {11.0}
    training.train_until_idle(11)
    assert held(slow, 10) == {10.0}
    [saved] = training.ends
    assert isinstance(saved, Saved)
    assert saved.stall > 0.3


def test_what_was_not_copied_is_not_written(slow, monkeypatch):
    def fail(_: Snapshot) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Snapshot, "finish", fail)
    slow.go.set()
    training = Training(slow, Alone())
    training.train(10, due=True)
    with pytest.raises(RuntimeError, match="the device is gone"):
        training.saver.wait()
    assert slow.candidates() == []


def test_memory_for_the_copies_is_there_before_the_first_save(slow):
    training = Training(slow, Alone())
    training.saver.prepare(training.pieces())
    slow.go.set()
    training.train(10, due=True)
    training.train_until_idle(10)
    assert held(slow, 10) == {10.0}


def test_a_save_that_is_due_too_early_is_taken_as_soon_as_the_one_before_is_done(slow, caplog):
    training = Training(slow, Alone())
    training.train(10, due=True)
    assert not training.train(20, due=True)
    assert not training.train(30, due=True)
    assert caplog.messages == ["the save of step 20 waits for that of step 10, which is not done yet"]
    slow.go.set()
    step = 30
    while not training.train(step := step + 1):
        pass
    assert training.saver.wait() is None
    assert slow.candidates() == [step, 10]
    assert held(slow, step) == {float(step)}


def test_the_last_save_is_waited_for(slow):
    training = Training(slow, Alone())
    training.train(10, due=True)
    slow.go.set()
    assert training.saver.wait() is None
    assert training.saver.saved_step == 10
    assert held(slow, 10) == {10.0}


def test_the_copy_takes_one_shard_of_memory_and_is_used_again():
    snapshot, values = Snapshot(), torch.randn(1000)
    images = []
    for _ in range(3):
        snapshot.take([Piece("master", "w", 0, 1000, values)])
        images.append(next(snapshot.chunks()).obj.ctypes.data)
        assert snapshot.bytes == values.nbytes
    assert len(set(images)) == 1


class Ranks(Rank):
    """Threads that save together."""

    def total(self, *numbers: int) -> list[int]:
        said = self.agree([" ".join(map(str, numbers))])
        return [sum(column) for column in zip(*(map(int, line.split()) for line in said), strict=True)]

    def gather_at_first(self, mine: Any) -> list[Any]:
        found = self.agree([mine])  # type: ignore[list-item]
        return found if self.rank == 0 else []


def test_ranks_save_together_and_a_shard_that_fails_on_one_fails_the_save_on_all(tmp_path):
    def train(rank: Rank) -> list[int]:
        world = Ranks(rank.rank, rank.size, rank.barrier, rank.said)
        store = open_store(str(tmp_path / "run"))
        training = Training(store, world)
        training.train(10, due=True)
        training.train_until_idle(10)
        assert training.saver.saved_step == 10
        if rank.rank == 1:
            store.folder.root = "/proc/nothing"  # this rank's disk is gone
        training.train(20, due=True)
        step = training.train_until_idle(20)
        assert training.saver.saved_step == 10
        training.train(step + 1, due=True)
        assert "step-" in (training.saver.wait() or "")
        return [type(end) for end in training.ends]

    outcomes = on_ranks(2, train)
    assert outcomes.errors == {}
    assert outcomes.results == {0: [Saved, Failed, Failed], 1: []}
    store = open_store(str(tmp_path / "run"))
    assert store.candidates() == [10]
    assert list(store.folder.names()) == ["step-00000010"]  # nothing is left of those that failed


@pytest.mark.parametrize("fault", [500, 503, CUT, HANG])
def test_a_failing_store_is_told_louder_each_time_and_fails_the_job_when_the_last_good_one_is_old(
    fault_proxy, minio, caplog, fault
):
    training = Training(open_store(f"{minio.bucket()}/run"), Alone())
    training.train(10, due=True)
    training.train_until_idle(10)
    fault_proxy.fault = lambda method, path: fault if method == "PUT" and "step-" in path else None
    for count, (level, words) in enumerate(
        [(logging.ERROR, "training goes on"), (logging.CRITICAL, "2 SAVES IN A ROW HAVE FAILED")], start=1
    ):
        training.train(10 + count, due=True)
        training.train_until_idle(10 + count)
        assert training.ends[-1].count == count
        [told] = [record for record in caplog.records if record.levelno >= logging.ERROR][count - 1 :]
        assert told.levelno == level
        assert words in told.getMessage()
    training.saver._max_age = 0.0
    training.train(20, due=True)
    step = training.train_until_idle(20)
    with pytest.raises(
        StepFailed, match=r"step-00000020 could not be saved: .*step 10, \d+ s old, and checkpoint.max"
    ):
        training.train(step + 1)
    fault_proxy.fault = lambda _method, _path: None
    assert held(training.store, 10) == {10.0}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("disk", ["8k"], indirect=True)
def test_an_attempt_that_can_save_nothing_until_its_time_is_over_ends_the_job_for_good(disk, resumed):
    """As on a disk that has room for the probe and for no shard: the next attempt would train as long for nothing."""
    store = CheckpointStore(str(disk / "run"), {}, 3, "job", 1.0)
    store.check_writable()
    training = Training(store, Alone(), max_age=0.0)
    if resumed:
        training.saver.saved_step = 10
    training.train(20, due=True)
    training.train_until_idle(20)  # the next save may be better
    training.train(30, due=True)
    step = training.train_until_idle(30)
    why = rf"nothing was saved in the \d+ s since step {10 * resumed}, where this attempt began, and checkpoint.max"
    with pytest.raises(UserError, match=rf"step-00000030 could not be saved: .* no space left .*; {why}"):
        training.train(step + 1)


def test_the_last_save_of_an_attempt_that_saved_nothing_ends_the_job_on_all_ranks_alike(tmp_path):
    def train(rank: Rank) -> None:
        world = Ranks(rank.rank, rank.size, rank.barrier, rank.said)
        store = open_store(str(tmp_path / "run"))
        store.folder.root = "/proc/nothing"
        training = Training(store, world, max_age=0.0)
        training.train(10, due=True)
        assert "could not be saved" in (training.saver.wait() or "")
        training.train(20, due=True)
        training.saver.wait()

    outcomes = on_ranks(2, train)
    assert {type(error) for error in outcomes.errors.values()} == {UserError}
    assert len({str(error) for error in outcomes.errors.values()}) == 1
