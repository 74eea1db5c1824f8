"""Which checkpoint a job resumes from when something has gone wrong with the newest one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from itertools import count, pairwise

import pytest
import torch

from internlm_trainer.checkpoint import (
    Alone,
    CheckpointStore,
    Piece,
    SaveFailed,
    Snapshot,
    StorageUnavailable,
    Want,
    check_store,
    newest_good,
)
from internlm_trainer.checkpoint.format import CHUNK
from internlm_trainer.errors import UserError
from trainer.checkpoint.states import PARAMETERS, assert_holds, on_ranks, open_store, resume, save, write
from trainer.conftest import HALF

NEWEST = "step-00000200"


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Callable[[CheckpointStore], None]:
    def damage(store: CheckpointStore) -> None:
        store.folder.put(NEWEST, file, data=change(store.folder.read(NEWEST, file)))

    return damage


def removed(file: str) -> Callable[[CheckpointStore], None]:
    return lambda store: store.folder.remove(NEWEST, file)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def other_manifest(store: CheckpointStore) -> None:
    store.folder.put(NEWEST, "manifest.json", data=store.folder.read("step-00000100", "manifest.json"))


SHARD, MANIFEST = "shard-00001.bin", "manifest.json"
DAMAGES = {
    "a truncated shard": (rewrite(SHARD, lambda data: data[:4096]), rf"{SHARD} has 4096 bytes, \d+ expected"),
    "an empty shard": (rewrite(SHARD, lambda _: b""), rf"{SHARD} has 0 bytes, \d+ expected"),
    "a shard that grew": (rewrite(SHARD, lambda data: data + b"0"), rf"{SHARD} has \d+ bytes, \d+ expected"),
    "a flipped bit": (
        rewrite(SHARD, flipped),
        rf"{SHARD} is damaged between bytes 0 and \d+: the digest there is not \w+",
    ),
    "a missing shard": (removed(SHARD), f"{SHARD} is missing"),
    "a truncated manifest": (
        rewrite(MANIFEST, lambda data: data[: len(data) // 2]),
        f"{MANIFEST} is cut off or damaged: it is no manifest",
    ),
    "an empty manifest": (
        rewrite(MANIFEST, lambda _: b""),
        f"{MANIFEST} is cut off or damaged: it is no manifest",
    ),
    "a changed manifest": (
        rewrite(MANIFEST, lambda data: data.replace(b"norm.weight", b"morn.weight")),
        rf"{MANIFEST} is damaged: its content has digest xxh3:\w+, xxh3:\w+ expected",
    ),
    "another step's manifest": (other_manifest, f"{MANIFEST} is that of step-00000100"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_never_used_but_the_one_before_it_and_the_log_says_why(url, damage, caplog):
    store = open_store(url)
    save(store, 100)
    save(store, 200)
    do, why = DAMAGES[damage]
    do(store)
    with caplog.at_level(logging.WARNING):
        found = resume(open_store(url))
    assert found is not None
    assert_holds(found, 100)
    (sentence,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(f"checkpoint {NEWEST} is not used: {why}; going back to step-00000100", sentence)


def test_a_save_that_never_got_its_manifest_is_no_checkpoint(url, caplog):
    store = open_store(url)
    save(store, 100)
    write(store, 200, world=2)
    found = resume(open_store(url))
    assert found is not None
    assert_holds(found, 100)
    assert caplog.records == []


def test_a_job_starts_from_the_beginning_only_where_nothing_was_ever_committed(url):
    assert resume(open_store(url)) is None
    write(open_store(url), 100, world=2)
    assert resume(open_store(url)) is None


def test_a_job_never_starts_from_the_beginning_over_checkpoints_that_it_cannot_use(url, caplog):
    store = open_store(url)
    save(store, 100)
    save(store, 200)
    for step in ("step-00000100", "step-00000200"):
        store.folder.remove(step, "shard-00000.bin")
    with pytest.raises(
        UserError,
        match=rf"checkpoint.path: none of the checkpoints in {url} can be used \(step-00000200: "
        r"shard-00000.bin is missing; step-00000100: shard-00000.bin is missing\); move the folder away ",
    ):
        resume(store)
    assert caplog.messages[-1].endswith(
        "step-00000100 is not used: shard-00000.bin is missing; no older one is left"
    )


def test_a_refused_checkpoint_takes_no_whole_ones_place_and_goes_with_the_next_save(url):
    store = open_store(url, keep=2)
    save(store, 100)
    save(store, 200)
    removed(SHARD)(store)
    resumed = open_store(url, keep=2)
    resume(resumed)
    assert resumed.candidates() == [200, 100]
    save(resumed, 150)
    assert resumed.candidates() == [150, 100]


def test_the_refused_step_can_be_reached_and_saved_again(url):
    store = open_store(url, keep=2)
    save(store, 100)
    save(store, 200)
    removed(SHARD)(store)
    resumed = open_store(url, keep=2)
    resume(resumed)
    save(resumed, 200)
    save(resumed, 300)
    assert resumed.candidates() == [300, 200, 100]
    resumed.open(200).verify()


@pytest.mark.parametrize("verify", [False, True])
def test_what_a_job_resumed_from_stays_until_a_newer_one_is_known_to_be_whole(url, verify):
    save(open_store(url), 100)
    resumed = open_store(url, keep=1, verify=verify)
    resume(resumed)
    save(resumed, 200)
    save(resumed, 300)
    if verify:
        assert resumed.candidates() == [300]
    else:
        resumed.folder.remove("step-00000300", SHARD)  # damaged as it was written, say
        assert_holds(resume(open_store(url)), 100)


# Several ranks


def test_ranks_of_another_layout_read_no_more_than_they_hold(fault_proxy, minio):
    """But for the rest of the chunk at either end of each range."""
    url, size = minio.bucket(), 10_000_000
    values = torch.arange(size, dtype=torch.float32)
    store = open_store(url)
    entries = [
        store.write_shard(1, rank, Snapshot().take([Piece("master", "w", start, stop, values[start:stop])]))
        for rank, (start, stop) in enumerate([(0, 6_000_000), (6_000_000, size)])
    ]
    store.commit(1, entries, {}, {"w": (size,)})
    fault_proxy.sent = 0
    outs = [torch.zeros(stop - start) for start, stop in pairwise(range(0, size + 1, size // 4))]
    starts = range(0, size, size // 4)

    def load(rank):
        start, stop = starts[rank.rank], starts[rank.rank] + size // 4
        newest_good(
            open_store(url), rank, lambda c: c.load([Want("master", "w", start, stop, outs[rank.rank])])
        )

    outcomes = on_ranks(4, load)
    assert outcomes.errors == {}
    assert torch.equal(torch.cat(outs), values)
    cuts_inside_a_chunk = 3
    assert fault_proxy.sent <= values.nbytes + cuts_inside_a_chunk * CHUNK + 100_000  # manifests, listings


def test_all_ranks_go_back_when_one_of_them_finds_damage(url, caplog):
    store = open_store(url)
    save(store, 100, world=3)
    save(store, 200, world=3)
    rewrite("shard-00002.bin", flipped)(store)
    outcomes = on_ranks(2, lambda rank: resume(open_store(url), rank))
    assert outcomes.errors == {}
    assert [checkpoint.step for checkpoint in outcomes.results.values()] == [100, 100]
    assert len(caplog.messages) == 1


def test_all_ranks_raise_the_same_sentence(url):
    save(open_store(url), 100)
    outcomes = on_ranks(3, lambda rank: resume(open_store(url, job="b" if rank.rank == 1 else "job"), rank))
    assert {(type(error), str(error)) for error in outcomes.errors.values()} == {
        (
            UserError,
            f"checkpoint.path: {url} holds checkpoints of the job 'job' (step-00000100), and this is 'b'; "
            "give each job a folder of its own",
        )
    }
    assert len(outcomes.errors) == 3


def test_ranks_that_do_not_see_each_others_files_are_told_before_the_first_step(tmp_path):
    outcomes = on_ranks(2, lambda rank: check_store(open_store(str(tmp_path / f"node-{rank.rank}")), rank))
    assert len(outcomes.errors) == 2
    for error in outcomes.errors.values():
        assert isinstance(error, UserError)
        assert "an object store, or a folder that all nodes share" in str(error)


def test_ranks_that_share_a_store_pass_the_check_and_leave_nothing(url):
    outcomes = on_ranks(3, lambda rank: check_store(open_store(url), rank))
    assert outcomes.errors == {}
    assert open_store(url).folder.names() == {}


# A store that answers errors


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_save_to_which_the_store_answers_500_fails_and_the_one_before_it_is_used(
    fault_proxy, minio, number
):
    url = minio.bucket()
    store = open_store(url)
    save(store, 100)
    puts = count()
    fault_proxy.fault = lambda method, _: 500 if method == "PUT" and next(puts) >= number else None
    file = ("shard-00000.bin", "shard-00001.bin", "manifest.json")[number]
    with pytest.raises(
        SaveFailed,
        match=rf"checkpoint {NEWEST} could not be saved: writing {file} failed( \d times in \d s)?: "
        "the store answered 500",
    ):
        save(store, 200)
    fault_proxy.fault = lambda _method, _path: None
    found = resume(open_store(url))
    assert found is not None
    assert_holds(found, 100)
    save(store, 200)
    assert_holds(open_store(url).open(200), 200)


def test_a_failed_removal_of_an_old_checkpoint_fails_no_save_and_is_made_up_for(fault_proxy, minio, caplog):
    url = minio.bucket()
    store = open_store(url, keep=1)
    save(store, 100)
    fault_proxy.fault = lambda method, path: 500 if method == "DELETE" and "00000100" in path else None
    save(store, 200)
    assert f"an old checkpoint in {url} could not be removed: removing manifest.json failed" in caplog.text
    fault_proxy.fault = lambda _method, _path: None
    save(store, 300)
    assert store.candidates() == [300]


@pytest.mark.parametrize("status", [500, 503])
def test_a_store_that_fails_for_a_moment_is_asked_again(fault_proxy, minio, status):
    url = minio.bucket()
    save(open_store(url), 100)
    failed: set[str] = set()

    def fault(method: str, path: str) -> int | None:
        if method != "GET" or not path.endswith(("manifest.json", "shard-00000.bin")) or path in failed:
            return None
        failed.add(path)
        return status

    fault_proxy.fault = fault
    found = resume(open_store(url, patience=60.0))
    assert found is not None
    assert_holds(found, 100)
    assert len(failed) == 2


def test_one_checkpoint_that_the_store_cannot_serve_is_passed_over_but_not_removed(
    fault_proxy, minio, caplog
):
    url = minio.bucket()
    store = open_store(url, keep=1)
    save(store, 200)
    save(open_store(url), 100)
    fault_proxy.fault = lambda _, path: 503 if f"{NEWEST}/{SHARD}" in path else None
    resumed = open_store(url, keep=1)
    found = resume(resumed)
    assert found is not None
    assert_holds(found, 100)
    assert re.search(
        rf"checkpoint {NEWEST} is not used: reading {url}/{NEWEST}/{SHARD} failed .*; going back to step-",
        caplog.text,
    )
    fault_proxy.fault = lambda _method, _path: None
    save(resumed, 150)
    assert resumed.candidates() == [200, 150, 100]


def test_a_store_that_serves_nothing_ends_no_job_and_condemns_no_checkpoint(fault_proxy, minio):
    url = minio.bucket()
    store = open_store(url)
    save(store, 100)
    fault_proxy.fault = lambda _, path: 500 if "shard-" in path else None
    with pytest.raises(
        StorageUnavailable, match=rf"no checkpoint in {url} could be read: step-00000100: reading"
    ):
        resume(store)
    fault_proxy.fault = lambda _method, _path: 500
    with pytest.raises(StorageUnavailable, match=rf"listing {url} failed .*: the store answered 500"):
        resume(store)
    fault_proxy.fault = lambda _method, _path: None
    assert_holds(resume(store), 100)


def test_a_store_that_is_down_is_no_mistake_of_the_users(minio, monkeypatch):
    url = minio.bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageUnavailable, match=r"cannot be reached at http://127.0.0.1:9; check AWS_ENDPOINT_URL"
    ):
        check_store(open_store(url), Alone())


def test_a_save_with_more_ranks_than_the_one_before_it_is_read_whole(url):
    store = open_store(url)
    save(store, 100, world=1)
    store.commit(
        200,
        write(store, 200, world=7),
        {"step": 200},
        PARAMETERS,
    )
    found = resume(open_store(url))
    assert found is not None
    assert_holds(found, 200, world=2)


def test_connections_that_break_in_the_middle_of_an_answer_cost_no_checkpoint(fault_proxy, minio):
    url, broken = minio.bucket(), set()
    save(open_store(url), 100)

    def fault(method: str, path: str) -> int | None:
        if method != "GET" or "step-" not in path or path in broken:
            return None
        broken.add(path)
        return HALF

    fault_proxy.fault = fault
    assert_holds(resume(open_store(url, patience=60.0)), 100)
    assert len(broken) >= 3


def test_a_listing_that_lags_behind_fails_no_save_and_no_resume(fault_proxy, minio):
    """As stores do that replicate; an object is known by its name before it is listed."""
    url = minio.bucket()

    def lagging(path: str, content: bytes) -> bytes:
        if "list-type" not in path:
            return content
        return re.sub(rb"<Contents><Key>[^<]*shard-00001.*?</Contents>", b"", content)

    fault_proxy.rewrite = lagging
    store = open_store(url)
    save(store, 100)
    assert "shard-00001.bin" not in store.folder.names("step-00000100")
    found = resume(open_store(url))
    assert found is not None
    assert_holds(found, 100)


def test_a_manifest_that_is_not_listed_yet_is_known_by_its_name(fault_proxy, minio):
    """Else the job would go back a step, and remove the newest as if its save had been killed."""
    url = minio.bucket()

    def lagging(path: str, content: bytes) -> bytes:
        if "list-type" not in path:
            return content
        return re.sub(rb"<Contents><Key>[^<]*step-00000200/manifest.json.*?</Contents>", b"", content)

    fault_proxy.rewrite = lagging
    store = open_store(url, keep=2)
    save(store, 100)
    save(store, 200)
    assert MANIFEST not in store.folder.names(NEWEST)
    store.abandon(200)
    assert_holds(resume(store), 200)
    save(store, 300)
    assert store.candidates() == [300, 200]
