"""Tokenizing that is interrupted: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from internlm_trainer.data import text_chunks
from internlm_trainer.data.line_encoder import LineEncoder
from internlm_trainer.data.partial_bin import PartialBin, finished
from internlm_trainer.data.tokenize import tokenize_files
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs
from trainer.loop.jobs import descendants

COMMAND = """
import sys
from internlm_trainer.data import text_chunks, tokenize
from internlm_trainer.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    text_chunks.CHUNK_BYTES = 10_000
    tokenize._POOL_BYTES = 0
    tokenize.tokenize_files(
        sys.argv[4:], load_tokenizer(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]), journal_seconds=0.0
    )
"""


def bins(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name.endswith((".bin", ".bin.meta"))
    }


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Some files, of which tokenizing in small chunks takes a second or so."""
    lines = [f"line {number}: {'word ' * (number % 40)}" for number in range(4000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:2000]))
    (tmp_path / "c.json").write_text(json.dumps([{"text": line} for line in lines[:1000]]))
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.json")]


@pytest.mark.parametrize(("out", "workers"), [("out", 1), ("all.bin", 2)])
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, out: str, workers: int
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / "command.py").write_text(COMMAND)
    tokenize_files(texts, tokenizer, str(tmp_path / "whole" / out))
    target = tmp_path / "killed" / out
    command = [sys.executable, "command.py", "tokenizer.model", str(target), str(workers), *texts]
    done, kills = 0, 0
    while True:
        process = subprocess.Popen(command, cwd=tmp_path)
        progress = done
        while process.poll() is None and progress < done + 300_000:
            time.sleep(0.002)
            progress = size(tmp_path / "killed")
        if process.poll() is not None:
            assert process.returncode == 0
            break
        workers_of = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        done = progress
        wait_for_end(workers_of)
    assert kills >= 2
    assert bins(tmp_path / "killed") == bins(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.part*"))


def size(folder: Path) -> int:
    """What is journalled or finished, in bytes of .bin files."""
    total = 0
    for path in folder.rglob("*.json"):
        with suppress(ValueError, FileNotFoundError):
            record = json.loads(path.read_text())
            total += record["bytes"] if "bytes" in record else record["done"][0]
    return total


def wait_for_end(pids: list[int]) -> None:
    """The processes that tokenize must notice that nobody is left to give them work."""
    end = time.monotonic() + 60
    for pid in pids:
        while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < end, f"{pid} goes on without its parent"
            time.sleep(0.01)


@pytest.mark.parametrize("tail", ["more than the journal says", "less", "another input"])
def test_what_a_dead_process_left_is_cut_back_or_thrown_away(
    tmp_path: Path, tokenizer: Tokenizer, tail: str
) -> None:
    encoder, url = LineEncoder(tokenizer), str(tmp_path / "x.bin")
    first, second = encoder.encode(["one", "two"]), encoder.encode(["three"])
    partial = PartialBin(url, {"input": "a"}, 0.0)
    partial.add(first, 7)
    partial.close()
    part = tmp_path / "x.bin.part"
    part.write_bytes(part.read_bytes() + b"half a li" if tail.startswith("more") else part.read_bytes()[:-1])
    again = PartialBin(url, {"input": "b" if tail == "another input" else "a"}, 0.0)
    if not tail.startswith("more"):
        assert (again.position, again.samples) == (None, 0)
        again.add(first, 7)
    assert (again.position, again.samples) == (7, 2)
    again.add(second, 8)
    again.finish()
    assert Path(url).read_bytes() == first.content + second.content
    sizes = [len(line) for line in Path(url).read_bytes().splitlines(keepends=True)]
    assert np.load(url + ".meta")[:, 0].tolist() == [0, sizes[0], sizes[0] + sizes[1]]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    first = PartialBin(str(tmp_path / "x.bin"), {})
    with pytest.raises(UserError, match=r"--out: another process is writing .*/x\.bin; wait for it"):
        PartialBin(str(tmp_path / "x.bin"), {})
    first.close()
    PartialBin(str(tmp_path / "x.bin"), {}).discard()


def test_offsets_beyond_two_gibibytes_are_right(tmp_path: Path, tokenizer: Tokenizer) -> None:
    url = str(tmp_path / "x.bin")
    lines = LineEncoder(tokenizer).encode(["one"])
    partial = PartialBin(url, {})
    partial._bin.truncate(2**31 + 7)  # sparse: as if so much had been written
    partial._bytes = 2**31 + 7
    partial.add(lines, 1)
    partial.finish()
    meta = np.load(url + ".meta")
    assert meta.dtype == np.int64
    assert meta.tolist() == [[2**31 + 7, int(lines.tokens[0])]]


@pytest.mark.parametrize("disk", ["400k"], indirect=True)
def test_a_full_disk_is_said_and_the_command_goes_on_when_there_is_room(
    tmp_path: Path, disk: Path, texts: list[str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 20_000)
    tokenize_files(texts[:1], tokenizer, str(tmp_path / "whole"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"--out: there is no space left to write .*a\.bin"):
            tokenize_files(texts[:1], tokenizer, str(disk), journal_seconds=0.0)
    assert 100_000 < json.loads((disk / "a.bin.part.json").read_text())["done"][0] <= 400_000
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    tokenize_files(texts[:1], tokenizer, str(disk))
    assert bins(disk) == bins(tmp_path / "whole")


def test_a_file_for_a_store_is_collected_in_the_users_cache_folder(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, minio: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = minio.bucket()  # type: ignore[attr-defined]
    fs, path = open_fs(bucket)
    for text in texts:
        fs.put_file(text, f"{path}/text/{os.path.basename(text)}")
    tokenize_files(texts, tokenizer, str(tmp_path / "whole"))
    done = tokenize_files([join(bucket, "text/*")], tokenizer, join(bucket, "out"))
    whole = bins(tmp_path / "whole")
    assert {name: fs.cat_file(f"{path}/out/{name}") for name in whole} == whole
    assert not list((tmp_path / "cache/internlm/tokenize").iterdir())
    again = tokenize_files([join(bucket, "text/*")], tokenizer, join(bucket, "out"))
    assert [(file.url, file.samples) for file in again] == [(file.url, file.samples) for file in done]
    assert not any(file.made for file in again)
    shutil.rmtree(tmp_path / "cache")
    assert finished(done[0].url, {}) is None
