"""Tokenized files: InternLM's format to the byte, and a sentence for every way in which a file can be
wrong.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_trainer.data.bin_format import (
    BinFile,
    Ids,
    decode_sample,
    encode_sample,
    open_bins,
    parse_samples,
    write_bin,
)
from internlm_trainer.data.block_cache import BlockCache
from internlm_trainer.data.byte_ranges import BlockMemory, LocalRanges, RemoteFile, RemoteRanges
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs

IDS = st.lists(st.integers(-103167, 103167), max_size=50)
WriteSamples = Callable[[str, list[list[int]]], str]


def read_back(file: BinFile) -> list[list[int]]:
    lines = file.ranges.read([file.byte_range(sample) for sample in range(len(file.lengths))])
    return [file.parse(sample, line, 10**6).tolist() for sample, line in enumerate(lines)]


def save_meta(url: str, meta: np.ndarray) -> None:
    with Path(url + ".meta").open("wb") as file:
        np.save(file, meta)


@given(ids=IDS)
def test_a_line_is_what_json_writes(ids: list[int]) -> None:
    assert encode_sample(ids) == (json.dumps({"tokens": ids}) + "\n").encode()


@given(ids=IDS)
def test_a_line_is_read_as_json_reads_it(ids: list[int]) -> None:
    assert decode_sample(encode_sample(ids)).tolist() == ids
    assert (
        decode_sample(json.dumps({"x": 1, "tokens": ids}, separators=(",", ":")).encode() + b"\n").tolist()
        == ids
    )


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[1, 2]\n",
        b'{"tokens": 5}\n',
        b'{"tokens": [1, 2]}',  # cut off
        b'{"tokens": [1, 2\n',
        b'{"tokens": [1, , 2]}\n',
        b'{"tokens": [1,, 2]}\n',
        b'{"tokens": [1, 2,]}\n',
        b'{"tokens": [1, 2, ]}\n',
        b'{"tokens": [1,  , 2]}\n',
        b'{"tokens": [, 2]}\n',
        b'{"tokens": [ ]x]}\n',
        b'{"tokens": [1 2]}\n',
        b'{"tokens": [1.5, 2]}\n',
        b'{"tokens": [1, "2"]}\n',
        b'{"tokens": [1, true]}\n',
        b'{"tokens": [1, \xff]}\n',
    ],
)
def test_a_line_that_is_no_sample_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_sample(line)


def test_a_file_and_its_meta_are_internlms(tmp_path: Path, write_samples: WriteSamples) -> None:
    samples = [[1, 5, 7], [1], [1, -9, -10, 11]]
    path = Path(write_samples("en/x.bin", samples))
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["tokens"] for line in lines] == samples
    meta = np.load(f"{path}.meta")
    assert meta.dtype == np.int64
    starts = [sum(map(len, lines[:n])) for n in range(3)]
    assert meta.tolist() == [[start, len(sample)] for start, sample in zip(starts, samples, strict=True)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.bin", "x.bin.meta"]
    (file,) = open_bins(str(tmp_path), "data")
    assert (file.name, file.tokens, read_back(file)) == ("en/x.bin", 8, samples)


def test_metas_of_32_bits_are_read(write_samples: WriteSamples) -> None:
    url = write_samples("x.bin", [[1, 2], [1, 3]])
    save_meta(url, np.load(url + ".meta").astype(np.int32))
    assert read_back(open_bins(url, "data")[0]) == [[1, 2], [1, 3]]


def test_all_files_of_a_folder_are_found_in_the_order_of_their_names(
    tmp_path: Path, write_samples: WriteSamples
) -> None:
    for name in ("b/2.bin", "a.bin", "b/1.bin", "b/c/3.bin"):
        write_samples(name, [[1, 2]])
    (tmp_path / "README.txt").write_text("not data")
    for url in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        assert [file.name for file in open_bins(url, "data")] == ["a.bin", "b/1.bin", "b/2.bin", "b/c/3.bin"]


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return join(request.getfixturevalue("minio").bucket(), "data")
    return str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(4)}"


def test_files_are_read_alike_from_every_store(folder: str) -> None:
    samples = [[[1, *range(n, n + 40)] for n in range(start, start + 200)] for start in (3, 500)]
    for name, content in zip(("x.bin", "y/z.bin"), samples, strict=True):
        with write_bin(join(folder, name)) as writer:
            for sample in content:
                writer.write(sample)
    for url in (folder, folder + "/"):
        files = open_bins(url, "data")
        assert [file.name for file in files] == ["x.bin", "y/z.bin"]
        assert [read_back(file) for file in files] == samples
    (file,) = open_bins(join(folder, "y/z.bin"), "data")
    assert (file.name, read_back(file)) == ("z.bin", samples[1])


def test_an_error_while_writing_leaves_the_old_files(folder: str) -> None:
    url = join(folder, "x.bin")
    with write_bin(url) as writer:
        writer.write([1, 2])
    with pytest.raises(KeyError), write_bin(url) as writer:
        writer.write({}["missing"])
    assert read_back(open_bins(url, "data")[0]) == [[1, 2]]


@pytest.mark.parametrize("when", ["in the block", "before the meta"])
def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, when: str) -> None:
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    script = (
        "import os, signal, sys, internlm_trainer.data.bin_format as b\n"
        f"def die(self): {kill}\n"
        f"if {when!r} == 'before the meta': b.BinWriter.meta = die\n"
        "with b.write_bin(sys.argv[1]) as w:\n"
        f"    w.write([1, 2]); w._file.flush()\n    if {when!r} == 'in the block': {kill}"
    )
    url = str(tmp_path / "x.bin")
    assert subprocess.run([sys.executable, "-c", script, url]).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"no \.bin file|has no \.meta beside it"):
        open_bins(str(tmp_path), "data")
    with write_bin(url) as writer:
        writer.write([1, 3])
    assert read_back(open_bins(url, "data")[0]) == [[1, 3]]


def test_a_folder_that_is_missing_or_without_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\]\.path: .*/none does not exist; .*tokenize"):
        open_bins(str(tmp_path / "none"), "data.train[0].path")
    with pytest.raises(
        UserError, match=r"data\.train\[0\]\.path: .* has no \.bin file; tokenize text into it"
    ):
        open_bins(str(tmp_path), "data.train[0].path")
    (tmp_path / "x.bin.meta").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no \.bin file"):
        open_bins(str(tmp_path), "data.train[0].path")


def meta_of(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        (b"", r"x\.bin\.meta is cut off or no NumPy array"),
        (b"text", r"x\.bin\.meta is cut off or no NumPy array"),
        (np.array([[0.0, 2.0]]), "not an array of whole numbers with two columns"),
        (meta_of((0, 2, 3)), "not an array of whole numbers with two columns"),
        (np.array([0, 2]), "not an array of whole numbers with two columns"),
        (meta_of((1, 2)), "does not belong to its file"),
        (meta_of((0, -2)), "does not belong to its file"),
        (meta_of((0, 2), (0, 2)), "does not belong to its file"),
        (meta_of((0, 2), (9999, 2)), "does not belong to its file of 38 bytes"),
        (np.zeros((0, 2), np.int64), "does not belong to its file"),
    ],
)
def test_a_meta_that_is_broken_or_anothers_is_said(
    write_samples: WriteSamples, meta: bytes | np.ndarray, sentence: str
) -> None:
    url = write_samples("x.bin", [[1, 2], [1, 3]])
    if isinstance(meta, bytes):
        Path(url + ".meta").write_bytes(meta)
    else:
        save_meta(url, meta)
    with pytest.raises(UserError, match=sentence):
        open_bins(url, "data")


def test_a_meta_that_is_cut_off_anywhere_is_said(write_samples: WriteSamples) -> None:
    url = write_samples("x.bin", [[1, 2], [1, 3]])
    whole = Path(url + ".meta").read_bytes()
    for length in range(0, len(whole), 7):
        Path(url + ".meta").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut off"):
            open_bins(url, "data")


def test_a_32_bit_meta_that_overflowed_says_why(write_samples: WriteSamples) -> None:
    url = write_samples("x.bin", [[1, 2], [1, 3]])
    os.truncate(url, 2**31 + 100)  # sparse
    save_meta(url, np.array([[0, 2], [-(2**31), 2]], dtype=np.int32))
    with pytest.raises(UserError, match="32-bit numbers are too small for a file of more than 2 GiB"):
        open_bins(url, "data")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content[:-10], r"x\.bin, line 2: not a tokenized sample"),
        (
            lambda content: content[: len(content) // 2],
            r"does not belong to its file|line 2: not a tokenized",
        ),
        (lambda content: content.replace(b"1, 3", b"1, x"), r"x\.bin, line 2: not a tokenized sample"),
        (lambda content: content.replace(b"1, 3", b"1333"), r"line 2: 1 tokens, but .*x\.bin\.meta says 2"),
        (
            lambda content: content.replace(b"1, 3", b"1, 3999999"),
            r"line 2: token 3999999, but .* has 1000000 words",
        ),
        (lambda content: content.replace(b"1, 3", b"1, -3999999"), r"line 2: token 3999999, but"),
        (lambda content: content.replace(b"1, 3", b"1, " + b"9" * 30), r"line 2: token 9\d+, but"),
        (lambda content: content + content, r"x\.bin, line 2: not a tokenized sample"),
    ],
)
def test_a_file_that_its_meta_does_not_describe_is_said_with_the_line(
    write_samples: WriteSamples, change: Callable[[bytes], bytes], sentence: str
) -> None:
    url = write_samples("x.bin", [[1, 2], [1, 3]])
    Path(url).write_bytes(change(Path(url).read_bytes()))
    with pytest.raises(UserError, match=sentence):
        read_back(open_bins(url, "data")[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranges_are_read_alike_with_and_without_blocks(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    content = {str(folder / name): os.urandom(data.draw(st.integers(0, 200))) for name in "ab"}
    for path, file in content.items():
        Path(path).write_bytes(file)
    ranges = data.draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(content)), st.integers(0, 220), st.integers(0, 100)).map(
                lambda r: (r[0], r[1], r[1] + r[2])
            )
        )
    )
    expected = [content[path][start:stop] for path, start, stop in ranges]
    found = {path: RemoteFile(len(file), "1") for path, file in content.items()}
    cache = data.draw(st.sampled_from([None, BlockCache(str(folder / "cache"), 1000)]))
    memory = BlockMemory(block_bytes=16, cached_bytes=64, ahead_bytes=100)
    blocks = RemoteRanges(open_fs(str(folder))[0], found, memory, cache)
    files = LocalRanges(max_open=1)
    for count in (len(ranges), 1, 2):
        for first in range(0, len(ranges), max(count, 1)):
            part = slice(first, first + count)
            blocks.prefetch(ranges[first : first + 2 * count])
            assert blocks.read(ranges[part]) == files.read(ranges[part]) == expected[part]
        blocks.forget(ranges[::2])
    assert len(memory.blocks) <= 4
    blocks.forget(ranges)
    assert memory.coming == {}
    blocks.close()
    memory.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_lines_are_parsed_as_one_by_one(data: st.DataObject, write_samples: WriteSamples) -> None:
    """Whatever the lines say: the same ids, or the same sentence."""
    file = open_bins(write_samples("x.bin", [[1, 2, 3], [4, 5], [6]]), "data")[0]
    pieces = st.sampled_from([b"1", b"2", b"77", b"-4", b", ", b",", b" ", b"x", b"999"])
    text = st.lists(pieces, max_size=7).map(b"".join)
    lines = [
        data.draw(st.one_of(st.just(good), text.map(lambda t: b'{"tokens": [' + t + b"]}\n"), text))
        for good in (b'{"tokens": [1, 2, 3]}\n', b'{"tokens": [-4, 5]}\n', b'{"tokens": [77]}\n')
    ]

    def told(parse: Callable[[], list[Ids]]) -> object:
        try:
            return [ids.tolist() for ids in parse()]
        except UserError as error:
            return str(error)

    numbers = [(file, number) for number in range(3)]
    assert told(lambda: parse_samples(numbers, lines, 100)) == told(
        lambda: [file.parse(number, line, 100) for number, line in enumerate(lines)]
    )
