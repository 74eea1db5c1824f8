"""Saving and loading on real stores: a folder, memory, and MinIO."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch

from internlm_trainer.checkpoint import BadCheckpoint, Piece, SaveFailed, Snapshot, Want
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.errors import UserError
from trainer.checkpoint.states import (
    KINDS,
    MODEL,
    PARAMETERS,
    assert_holds,
    open_store,
    pieces,
    resume,
    save,
    write,
)


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 3), (4, 2), (3, 5), (5, 1)])
def test_a_checkpoint_is_read_back_to_the_bit_by_any_number_of_ranks(url, writers, readers):
    save(open_store(url), 100, writers)
    checkpoint = open_store(url).open(100)
    checkpoint.verify()
    assert_holds(checkpoint, 100, readers)


def test_what_is_reported_of_a_checkpoint_is_what_lies_in_the_store(url):
    store = open_store(url)
    committed = save(store, 100)
    assert committed.uri == f"{url}/step-00000100"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", committed.time)
    assert re.fullmatch(r"xxh3:[0-9a-f]{32}", committed.digest)
    assert committed.bytes == sum(size or 0 for size in store.folder.names("step-00000100").values())
    assert store.open(100).committed == committed


class Damaging(Folder):
    """A store that keeps something else than it was given."""

    @contextmanager
    def create(self, *parts: str, size: int) -> Iterator[Callable[[memoryview], None]]:
        with super().create(*parts, size=size) as write:
            yield lambda data: write(memoryview(bytes([data[0] ^ 1]) + bytes(data[1:])))


def test_a_shard_that_comes_back_damaged_makes_no_checkpoint_where_saves_are_verified(tmp_path):
    careless, careful = open_store(str(tmp_path)), open_store(str(tmp_path), verify=True)
    assert not save(careless, 100).verified
    assert save(careful, 200).verified
    careless.folder = careful.folder = Damaging(str(tmp_path))
    with pytest.raises(SaveFailed, match=r"step-00000300 could not be saved: .*damaged between bytes 0 and"):
        save(careful, 300)
    assert careful.candidates() == [200, 100]
    save(careless, 400)
    with pytest.raises(BadCheckpoint, match="damaged"):
        careless.open(400).verify()


def test_numpy_arrays_and_every_type_can_be_saved(url):
    store = open_store(url)
    arrays = {
        "a": np.arange(10),
        "b": torch.arange(10).to(torch.float16),
        "c": torch.tensor([True, False]),
        "d": torch.randn(10).to(torch.float8_e4m3fn),
    }
    entry = store.write_shard(
        1, 0, Snapshot().take(Piece("k", name, 0, len(array), array) for name, array in arrays.items())
    )
    store.commit(1, [entry], {}, {name: (len(array),) for name, array in arrays.items()})
    for name, array in arrays.items():
        out = np.zeros_like(array) if isinstance(array, np.ndarray) else torch.zeros_like(array)
        store.open(1).load([Want("k", name, 0, len(array), out)])
        assert bytes(memoryview(np.asarray(out if name == "a" else out.view(torch.uint8)))) == bytes(
            memoryview(np.asarray(array if name == "a" else array.view(torch.uint8)))
        )


def test_a_shard_larger_than_one_part_of_an_upload_is_whole(minio):
    store = open_store(minio.bucket())
    tensor = torch.randn(30_000_000)  # 120 MB, and a part has 50 MiB
    entry = store.write_shard(1, 0, Snapshot().take([Piece("master", "w", 0, len(tensor), tensor)]))
    store.commit(1, [entry], {}, {"w": (len(tensor),)})
    checkpoint, out = store.open(1), torch.zeros_like(tensor)
    checkpoint.verify()
    checkpoint.load([Want("master", "w", 0, len(tensor), out)])
    assert torch.equal(out, tensor)


def test_a_rank_reads_only_the_shards_that_hold_what_it_wants(fault_proxy, minio):
    url = minio.bucket()
    save(open_store(url), 100, world=4)
    checkpoint = open_store(url).open(100)
    fault_proxy.seen.clear()
    checkpoint.load([Want("master", "head.weight", 390, 400, torch.zeros(10))])
    assert [line.split("/")[-1] for line in fault_proxy.seen] == ["shard-00003.bin 206"]


def test_the_newest_checkpoints_are_kept_and_older_ones_and_half_ones_go(url):
    store = open_store(url, keep=2)
    save(store, 10)
    save(store, 20)
    write(store, 30, world=2)  # killed before its manifest
    assert store.candidates() == [20, 10]
    save(store, 40)
    assert store.candidates() == [40, 20]
    assert sorted(name for name in store.folder.names() if name.startswith("step-")) == [
        "step-00000020",
        "step-00000040",
    ]


def test_what_is_being_written_for_a_later_step_is_left_alone(url):
    store = open_store(url, keep=1)
    entries = write(store, 20, world=2)
    save(store, 10)
    store.commit(20, entries, {"step": 20}, PARAMETERS)
    assert_holds(store.open(20), 20)
    assert store.candidates() == [20]


def test_other_files_in_the_folder_are_never_touched(url):
    store = open_store(url, keep=1)
    store.folder.put("notes.txt", data=b"mine")
    store.folder.put("step-backup", "notes.txt", data=b"mine")
    for step in (1, 2, 3):
        save(store, step)
    assert store.folder.read("notes.txt") == store.folder.read("step-backup", "notes.txt") == b"mine"


def test_an_abandoned_save_leaves_nothing_and_a_committed_one_cannot_be_abandoned(url):
    store = open_store(url)
    save(store, 10)
    write(store, 20, world=2)
    for step in (10, 20, 30):
        store.abandon(step)
    assert store.folder.names("step-00000020") == {}
    assert_holds(store.open(10), 10)


def test_another_runs_checkpoint_of_a_step_stays_whole_until_the_new_one_takes_its_place(url):
    save(open_store(url), 100)
    again = open_store(url)
    again.writer = "another"
    entries = write(again, 100, world=3)
    assert_holds(open_store(url).open(100), 100)
    again.commit(100, entries, {"step": 100}, PARAMETERS)
    assert_holds(open_store(url).open(100), 100)
    assert sorted(again.folder.names("step-00000100")) == [
        "manifest.json",
        *(f"shard-0000{rank}-another.bin" for rank in range(3)),
    ]


def test_a_save_without_all_elements_is_a_bug_and_commits_nothing(url):
    store = open_store(url)
    with pytest.raises(AssertionError, match="ends at element"):
        store.commit(100, write(store, 100, world=2)[:1], {}, PARAMETERS)
    assert store.candidates() == []


def test_a_shard_that_rank_0_cannot_see_stops_the_commit(url):
    store = open_store(url)
    entries = write(store, 100, world=2)
    store.folder.remove("step-00000100", "shard-00001.bin")
    with pytest.raises(
        SaveFailed,
        match=r"checkpoint step-00000100 could not be saved: shard-00001.bin was written, but rank 0 finds "
        r"none of its \d+ bytes in .*; checkpoint.path must be a folder that all nodes share",
    ):
        store.commit(100, entries, {}, PARAMETERS)
    assert store.candidates() == []


def test_an_error_of_the_training_itself_while_saving_is_not_taken_for_the_stores(url):
    class Failing(Snapshot):
        def chunks(self):
            yield from super().chunks()
            raise RuntimeError("CUDA error")

    store = open_store(url)
    with pytest.raises(RuntimeError, match="CUDA error"):
        store.write_shard(100, 0, Failing().take(pieces(100, 0, 1)))
    assert store.folder.names("step-00000100") == {}


def test_state_that_was_never_saved_cannot_be_loaded(url):
    save(open_store(url), 100)
    checkpoint = open_store(url).open(100)
    with pytest.raises(
        UserError,
        match=r"checkpoint step-00000100 holds no exp_avg_sq of norm.weight, only exp_avg, master, param",
    ):
        checkpoint.load([Want("exp_avg_sq", "norm.weight", 0, 13, torch.zeros(13))])
    with pytest.raises(
        UserError, match=r"holds parameters of norm.weight as bfloat16, and this job keeps it as float32"
    ):
        checkpoint.load([Want("parameters", "norm.weight", 0, 13, torch.zeros(13))])


def test_a_folder_with_another_models_checkpoints_is_refused_before_the_first_step(url):
    save(open_store(url), 100)
    other = open_store(url, model=MODEL | {"hidden_size": 16, "layers": 3})
    sentence = (
        f"checkpoint.path: {url} holds checkpoints of another model (step-00000100): hiddenSize is 8 "
        "there and 16 here, layers is 1 there and 3 here; give this model a folder of its own, or the shape "
        "that is there"
    )
    for refused in (other.check_writable, lambda: resume(other)):
        with pytest.raises(UserError, match=re.escape(sentence)):
            refused()


def test_a_folder_with_another_jobs_checkpoints_is_refused_before_the_first_step(url):
    save(open_store(url), 100)
    with pytest.raises(
        UserError, match=r"holds checkpoints of the job 'job' \(step-00000100\), and this is 'b';"
    ):
        open_store(url, job="b").check_writable()


def test_a_store_that_can_be_written_is_left_as_it_was(url):
    store = open_store(url)
    store.check_writable()
    assert store.folder.names() == {}


@pytest.mark.usefixtures("minio")
def test_a_bucket_that_does_not_exist_is_a_sentence_before_the_first_step():
    with pytest.raises(
        UserError, match=r"checkpoint.path: the bucket of s3://no-such-bucket/x does not exist"
    ):
        open_store("s3://no-such-bucket/x").check_writable()


def test_wrong_credentials_are_a_sentence_before_the_first_step(minio, monkeypatch):
    url = minio.bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-wrong-wrong")
    with pytest.raises(UserError, match=rf"checkpoint.path: the store refuses the credentials for {url}"):
        open_store(url).check_writable()


def test_a_path_below_a_file_is_a_sentence_before_the_first_step(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint.path: .*/file/folder has a file in its path"):
        open_store(str(tmp_path / "file" / "folder")).check_writable()


def test_a_protocol_that_nobody_knows_is_a_sentence():
    with pytest.raises(UserError, match="the protocol nowhere:// is not known"):
        open_store("nowhere://bucket")


def test_a_reader_of_a_checkpoint_that_is_removed_meanwhile_is_told_so(url):
    store = open_store(url, keep=1)
    save(store, 10)
    reading = open_store(url).open(10)
    save(store, 20)
    with pytest.raises(BadCheckpoint, match=r"step-00000010 cannot be used: shard-0000\d.bin is missing"):
        reading.verify()
    with pytest.raises(BadCheckpoint, match=r"shard-0000\d.bin is missing"):
        reading.load([Want("master", "norm.weight", 0, 13, torch.zeros(13))])


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_a_reader_always_finds_a_whole_checkpoint_while_a_job_saves_and_removes(url):
    save(open_store(url, keep=1), 1)
    done, failures = Event(), []

    def train() -> None:
        try:
            writer = open_store(url, keep=1)
            for step in count(2):
                save(writer, step)
                if done.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=train)
    thread.start()
    steps: list[int] = []
    try:
        while len(set(steps)) < 8 and not failures:
            found = resume(open_store(url))
            assert found is not None
            steps.append(found.step)
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert steps == sorted(steps)


def test_every_kind_of_state_is_in_every_shard():
    assert {piece.kind for piece in pieces(1, 0, 2)} == set(KINDS)
