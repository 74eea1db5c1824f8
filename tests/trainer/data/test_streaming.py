"""Rows from object storage: read ahead, tried again, and kept on the node's disk within bounds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from internlm_trainer.config import CacheSpec, SourceSpec
from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.block_cache import BlockCache
from internlm_trainer.data.byte_ranges import BlockMemory, RemoteFile, RemoteRanges
from internlm_trainer.data.loader import RowLoader, _Prepared
from internlm_trainer.data.mapped import MappedArrays
from internlm_trainer.storage import StorageUnreachableError, join, open_fs
from trainer.conftest import FaultProxy, Minio

SETTINGS: dict[str, Any] = {
    "row_tokens": 200,
    "seq_len": 100,
    "packing": "documents",
    "seed": 7,
    "vocab_size": 50_000,
}


def write_corpus(url: str) -> str:
    """Some thousand samples, which are a dozen blocks of 256 KiB, in two files."""
    random = np.random.RandomState(0)
    for name in ("a.bin", "b.bin"):
        with write_bin(join(url, name)) as writer:
            for length in random.randint(1, 400, 1200):
                writer.write(random.randint(3, 50_000, length).tolist())
    return url


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(str(tmp_path / "corpus"))


@pytest.fixture
def remote(minio: Minio, corpus: str) -> str:
    url = minio.bucket()
    fs, path = open_fs(url)
    for file in Path(corpus).iterdir():
        fs.put_file(str(file), f"{path}/{file.name}")
    return url


def loader_of(url: str, cache: CacheSpec | None = None) -> RowLoader:
    return RowLoader([SourceSpec(path=url)], **SETTINGS, cache=cache)


def rows_of(loader: RowLoader, steps: int = 40) -> list[list[int]]:
    rows = [row.tokens.tolist() for _ in range(steps) for row in loader.next_step(4, range(4))]
    loader.close()
    return rows


def reads(proxy: FaultProxy) -> int:
    """Parts of .bin files that were asked for."""
    return len([line for line in proxy.seen if line.startswith("GET") and ".bin " in line.replace("?", " ")])


def test_a_store_that_fails_now_and_then_gives_the_same_rows(
    fault_proxy: FaultProxy, remote: str, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm_trainer.data.byte_ranges.random.uniform", lambda *_: 0.01)
    loader, count = loader_of(remote), 0

    def fault(_method: str, _path: str) -> int | None:
        nonlocal count
        count += 1
        if count % 5 == 1:
            return 500
        if count % 5 == 2:
            raise ConnectionAbortedError("cut for a test")  # without an answer
        if count % 5 == 3:
            time.sleep(0.05)
        return 503 if count % 5 == 4 else None

    fault_proxy.fault = fault
    assert rows_of(loader) == rows_of(loader_of(corpus))
    assert count > 20


def test_a_store_that_does_not_come_back_is_said(
    fault_proxy: FaultProxy, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteRanges, "patience", 0.5)
    loader = loader_of(remote)
    fault_proxy.fault = lambda _method, _path: 500
    with pytest.raises(
        StorageUnreachableError,
        match=r"\.bin could not be read for \d+ s, \d+ times \(last: .*\); is the store up",
    ):
        rows_of(loader)


def test_steps_are_read_ahead_of_the_trainer(fault_proxy: FaultProxy, remote: str, corpus: str) -> None:
    loader = loader_of(remote)
    rows = [row.tokens.tolist() for row in loader.next_step(4, range(4))]
    wait([step.result for step in loader._prepared])
    fault_proxy.fault = lambda _method, _path: 500
    for _ in range(8):
        rows += [row.tokens.tolist() for row in loader.next_step(4, range(4))]
    loader.close()
    assert rows == rows_of(loader_of(corpus), 9)


def busy_until_cancelled(step: list[_Prepared]) -> None:
    """Keeps the thread that reads from the step, which was planned."""
    end = time.monotonic() + 60
    while not (step and step[0].result.cancelled()) and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("drop", ["skip", "ramp"])
def test_rows_that_nobody_reads_any_more_take_no_room_of_those_read_ahead(
    remote: str, corpus: str, drop: str
) -> None:
    loader, expected = loader_of(remote), loader_of(corpus)
    memory = loader._cache.memory
    memory._max_blocks = 1  # so that there is something to fetch
    for count in range(4, 9):
        rows = [row.tokens.tolist() for row in loader.next_step(count, range(count))]
        assert rows == [row.tokens.tolist() for row in expected.next_step(count, range(count))]
        wait([step.result for step in loader._prepared])
        newest: list[_Prepared] = []
        loader._reader.submit(busy_until_cancelled, newest)
        loader.next_step(count, range(count))
        expected.next_step(count, range(count))
        newest.append(loader._prepared[-1])
        wait([newest[0].plan])
        assert memory.coming
        if drop == "skip":
            loader.skip(50)
            expected.skip(50)
        else:
            loader._drop_prepared()  # as `next_step` does for another number of rows
        assert memory.coming == {}
    loader.close()


def test_samples_that_are_known_already_take_no_room_of_those_read_ahead(remote: str, corpus: str) -> None:
    """In the second epoch all of them are; blocks are not, where memory holds but one."""
    loader = loader_of(remote)
    memory = loader._cache.memory
    memory._max_blocks = 1
    steps = loader.sources[0].rows // 4 * 2
    expected = loader_of(corpus)
    for _ in range(steps):
        assert [row.tokens.tolist() for row in loader.next_step(4, range(4))] == [
            row.tokens.tolist() for row in expected.next_step(4, range(4))
        ]
    wait([step.result for step in loader._prepared])
    assert memory.coming == {}
    loader.close()


class Waiting(LocalFileSystem):
    """Serves parts of files when it is told to."""

    go = Event()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        assert self.go.wait(60)
        return bytes(super().cat_file(path, start=start, end=end))


def test_all_sources_share_one_bound_and_the_threads(tmp_path: Path, remote: str) -> None:
    memory, content = BlockMemory(block_bytes=16, ahead_bytes=160), os.urandom(1600)
    sources = []
    for number in range(3):
        file = tmp_path / f"{number}"
        file.write_bytes(content)
        sources.append((RemoteRanges(Waiting(), {str(file): RemoteFile(1600, "")}, memory), str(file)))
    for source, file in sources:
        source.prefetch([(file, 0, 1600)])
    assert len(memory.coming) == 10
    Waiting.go.set()
    for source, file in sources:
        assert source.read([(file, 0, 1600)]) == [content]
    assert memory.coming == {}
    memory.close()
    loader = RowLoader([SourceSpec(path=remote), SourceSpec(path=join(remote, "a.bin"))], **SETTINGS)
    assert len({file.ranges._memory for source in loader.sources for file in source.files}) == 1  # type: ignore[attr-defined]
    loader.close()


def test_what_was_read_once_is_read_from_the_disk(
    fault_proxy: FaultProxy, remote: str, corpus: str, tmp_path: Path
) -> None:
    cache = CacheSpec(path=str(tmp_path / "cache"), sizeGi=1)
    expected = rows_of(loader_of(corpus))
    assert rows_of(loader_of(remote, cache)) == expected
    first = reads(fault_proxy)
    assert first >= 8
    assert rows_of(loader_of(remote, cache)) == expected
    assert reads(fault_proxy) == first

    # Blocks and arrays that a crash has damaged are not believed.
    files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "lock")
    assert {path.parent.parent.name for path in files} == {"blocks", "index"}
    for number, path in enumerate(files):
        content = path.read_bytes()
        if path.suffix == ".npy" or number % 2:
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert rows_of(loader_of(remote, cache)) == expected
    assert reads(fault_proxy) > first


def test_a_file_that_was_replaced_is_not_taken_from_the_disk(
    remote: str, corpus: str, tmp_path: Path
) -> None:
    cache = CacheSpec(path=str(tmp_path / "cache"), sizeGi=1)
    rows_of(loader_of(remote, cache))
    fs, path = open_fs(remote)
    content = Path(corpus, "a.bin").read_bytes()
    changed = content.replace(b"1", b"2")  # of the same length
    Path(corpus, "a.bin").write_bytes(changed)
    fs.pipe_file(f"{path}/a.bin", changed)
    assert rows_of(loader_of(remote, cache)) == rows_of(loader_of(corpus))


def test_local_files_may_have_their_index_on_the_disk(corpus: str, tmp_path: Path) -> None:
    cache = CacheSpec(path=str(tmp_path / "cache"), sizeGi=1)
    loader = loader_of(corpus, cache)
    assert isinstance(loader.sources[0].files[0].starts, np.memmap)
    assert rows_of(loader, 100) == rows_of(loader_of(corpus), 100)
    kept = len(list((tmp_path / "cache/index").rglob("*.npy")))
    assert rows_of(loader_of(corpus, cache), 1000) == rows_of(loader_of(corpus), 1000)
    # Orders of epochs that are over go: two metas, and of each file no more than two orders.
    assert kept <= len(list((tmp_path / "cache/index").rglob("*.npy"))) <= 2 + 2 * 2


def test_processes_share_a_cache_that_stays_within_its_size(tmp_path: Path) -> None:
    size = 500_000
    user = [sys.executable, str(Path(__file__).with_name("cache_user.py")), str(tmp_path), str(size)]
    processes = [subprocess.Popen([*user, str(number)]) for number in range(3)]
    largest = 0
    while any(process.poll() is None for process in processes):
        largest = max(largest, bytes_below(tmp_path))
        time.sleep(0.05)
    assert [process.returncode for process in processes] == [0] * 3
    assert 0.5 * size < bytes_below(tmp_path) <= size
    assert largest <= size
    assert not list(tmp_path.rglob("*.tmp"))


def bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def test_the_least_recently_used_blocks_go_first(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 100_000)
    for number in range(82):
        cache.put(str(number), bytes(1000))
        long_ago = time.time() - 10_000 + number
        os.utime(cache._path(str(number)), (long_ago, long_ago))
    assert cache.get("0")
    for number in range(100, 120):
        cache.put(str(number), bytes(1000))
    assert cache.get("0")
    assert not cache.get("1")
    assert cache.get("119")


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_a_disk_that_fills_up_only_means_less_cache(
    remote: str, corpus: str, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert rows_of(loader_of(remote, CacheSpec(path=str(disk), sizeGi=1))) == rows_of(loader_of(corpus))
    assert "takes no more blocks" in caplog.text


@pytest.mark.parametrize("disk", ["8k"], indirect=True)
def test_an_index_that_the_disk_has_no_room_for_is_held_in_memory(
    corpus: str, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader, expected = loader_of(corpus, CacheSpec(path=str(disk), sizeGi=1)), loader_of(corpus)
    steps = 2 * expected.sources[0].rows // 4  # the second epoch has an index of its own
    assert rows_of(loader, steps) == rows_of(expected, steps)
    [told] = caplog.messages
    assert re.fullmatch(
        r"data.cache: .*/index has no room for the index \(.*\); going on with it in memory", told
    )
    assert not list(disk.rglob("*.tmp"))


def test_mapped_arrays_are_made_once(tmp_path: Path) -> None:
    made: list[str] = []

    def maker(name: str) -> Callable[[], Any]:
        def make() -> Any:
            made.append(name)
            return np.arange(6).reshape(2, 3)

        return make

    for _ in range(2):
        arrays = MappedArrays(str(tmp_path))
        assert arrays.get("a", maker("a")).tolist() == [[0, 1, 2], [3, 4, 5]]
    arrays.get("b", maker("b"), instead_of="a")
    arrays.get("a", maker("a"))
    assert made == ["a", "b", "a"]
