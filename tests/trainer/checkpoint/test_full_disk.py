"""A disk that fills up while a checkpoint is saved."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest
import torch

from internlm_trainer.checkpoint import CheckpointStore, Piece, SaveFailed, Snapshot
from trainer.checkpoint.states import open_store, resume

MEBI = 1 << 20


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 2 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MEBI, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(store: CheckpointStore, step: int, mebibytes: int) -> None:
    """Two shards that together have so many MiB."""
    half = torch.full((mebibytes * MEBI // 8,), float(step))
    size = len(half)
    entries = [
        store.write_shard(
            step, rank, Snapshot().take([Piece("master", "w", rank * size, (rank + 1) * size, half)])
        )
        for rank in (0, 1)
    ]
    store.commit(step, entries, {"step": step}, {"w": (2 * size,)})


def _write_for_ever(file: FileIO) -> None:
    while True:
        file.write(bytes(4096))


def fill(disk: Path) -> None:
    """Take the last byte."""
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        _write_for_ever(filler)


def assert_only(store: CheckpointStore, step: int) -> None:
    found = resume(store)
    assert found is not None
    assert found.step == step
    assert list(store.folder.names()) == [f"step-{step:08d}"]


@pytest.mark.parametrize("disk", ["8m"], indirect=True)
def test_a_full_disk_fails_the_save_with_a_sentence_and_loses_nothing(disk):
    store = open_store(str(disk / "folder"))
    save(store, 100, mebibytes=4)
    with pytest.raises(
        SaveFailed,
        match=r"step-00000200 could not be saved: writing shard-0000\d.bin failed: there is no space left",
    ):
        save(store, 200, mebibytes=6)
    store.abandon(200)
    assert_only(store, 100)
    save(store, 300, mebibytes=2)  # what the failed save had taken is free again
    assert store.candidates() == [300, 100]


@pytest.mark.parametrize("disk", ["8m"], indirect=True)
def test_a_disk_that_is_full_when_the_manifest_is_due_keeps_the_checkpoint_before_it(disk):
    store = open_store(str(disk / "folder"))
    save(store, 100, mebibytes=2)
    half = torch.zeros(MEBI // 4)
    entry = store.write_shard(200, 0, Snapshot().take([Piece("master", "w", 0, len(half), half)]))
    fill(disk)
    with pytest.raises(
        SaveFailed, match=r"step-00000200 could not be saved: writing manifest.json failed: there is no"
    ):
        store.commit(200, [entry], {}, {"w": (len(half),)})
    store.abandon(200)
    assert_only(store, 100)


@pytest.mark.usefixtures("small_files")
def test_a_file_that_may_not_grow_fails_the_save_with_a_sentence_and_loses_nothing(tmp_path):
    store = open_store(str(tmp_path / "folder"))
    save(store, 100, mebibytes=2)
    with pytest.raises(
        SaveFailed, match=r"could not be saved: writing shard-00000.bin failed: File too large"
    ):
        save(store, 200, mebibytes=8)
    store.abandon(200)
    assert_only(store, 100)
