"""Tokenizing files that the user names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_trainer.data import text_chunks, tokenize
from internlm_trainer.data.bin_format import encode_sample, open_bins
from internlm_trainer.data.line_encoder import LineEncoder
from internlm_trainer.data.progress import TextProgress
from internlm_trainer.data.text_chunks import Position, read_chunks
from internlm_trainer.data.tokenize import Settings, TokenizedFile, tokenize_files
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError


def written(url: str) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in Path(url).read_bytes().splitlines()]


def test_each_input_becomes_a_file_named_after_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three\\nfour"}\n')
    (tmp_path / "c.json").write_text('[{"text": "five"}, {"text": "six"}]')
    (tmp_path / "d.py").write_text("def f():\n    return 7\n")
    out = str(tmp_path / "out")
    done = tokenize_files([str(tmp_path / n) for n in ("a.txt", "b.jsonl", "c.json", "d.py")], tokenizer, out)
    expected = {
        "a": ["one", "two"],
        "b": ["three\nfour"],
        "c": ["five", "six"],
        "d": ["def f():\n    return 7\n"],
    }
    assert [file.url for file in done] == [f"{out}/{name}.bin" for name in expected]
    for file, samples in zip(done, expected.values(), strict=True):
        ids = [[1, *tokenizer.encode(text)] for text in samples]
        assert written(file.url) == ids
        assert (file.samples, file.tokens) == (len(ids), sum(map(len, ids)))
    assert [file.tokens for file in open_bins(out, "out")] == [file.tokens for file in done]


def test_all_inputs_may_become_one_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    out = str(tmp_path / "x.bin")
    assert tokenize_files([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")], tokenizer, out) == [
        TokenizedFile(out, 2, 4)
    ]
    assert written(out) == [[1, *tokenizer.encode(name)] for name in "ba"]


def test_the_kind_of_sample_and_the_field_may_be_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    tokenize_files([str(tmp_path / "a.txt")], tokenizer, str(tmp_path / "x.bin"), Settings(sample="file"))
    assert written(str(tmp_path / "x.bin")) == [[1, *tokenizer.encode("one\ntwo\n")]]
    (tmp_path / "b.data").write_text('{"body": "one"}\n')
    tokenize_files([str(tmp_path / "b.data")], tokenizer, str(tmp_path / "y.bin"), Settings("jsonl", "body"))
    assert written(str(tmp_path / "y.bin")) == [[1, *tokenizer.encode("one")]]


def internlms_tool(path: Path, model: bytes) -> tuple[bytes, list[list[int]]]:
    """What InternLM's tokenizing tool of July 2023 writes, as its documentation says: (.bin, rows of the meta).

    A line of a txt file is stripped, blank ones are skipped; of a json file each record's JSON text is taken, of a
    jsonl file each line as it is; bos and the pieces, no eos; one `{"tokens": [...]}` a line.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".txt":
            texts = [line.strip() for line in file if line.strip()]
        elif path.suffix == ".json":
            texts = [json.dumps(record) for record in json.load(file)]
        else:
            texts = list(file)
    content, meta = b"", []
    for text in texts:
        tokens = [1, *processor.encode(text)]
        meta.append([len(content), len(tokens)])
        content += (json.dumps({"tokens": tokens}) + "\n").encode()
    return content, meta


RECORDS = [
    {"text": "def f(x):\n    return x"},
    {"text": "x\u2581y \u4e2d\u6587 \U0001f600"},
    {"other": [1, 2.5, None]},
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n\n  two \u2581 three\t\r\nfour\rfive\n \u4e2d\u6587\n last"),
        ("a.json", json.dumps(RECORDS, indent=1)),
        ("a.jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS) + "\n" + json.dumps(RECORDS[0])),
    ],
)
def test_raw_files_are_those_of_internlms_tool_to_the_byte(
    tmp_path: Path,
    tokenizer: Tokenizer,
    name: str,
    content: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize, "_POOL_BYTES", 0)  # two workers are two processes
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 20)
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    out = str(tmp_path / "x.bin")
    tokenize_files([str(path)], tokenizer, out, Settings(raw=True), workers=workers)
    expected, meta = internlms_tool(path, tokenizer.model)
    assert Path(out).read_bytes() == expected
    assert np.load(out + ".meta").tolist() == meta


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=6), eos=st.booleans())
def test_lines_are_what_json_writes(tokenizer: Tokenizer, texts: list[str], eos: bool) -> None:
    lines = LineEncoder(tokenizer, eos=eos).encode(texts)
    ids = [[1, *tokenizer.encode(text), *([2] if eos else [])] for text in texts]
    written = [encode_sample(one) for one in ids]
    assert lines.content == b"".join(written)
    assert lines.sizes.tolist() == [len(line) for line in written]
    assert lines.tokens.tolist() == [len(one) for one in ids]


def write_parquet(path: Path, texts: Sequence[str | None], **options: Any) -> str:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, **options)
    return str(path)


def test_parquet_files_are_read_by_row_groups(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"row {number}\n" + "x" * (number % 7) for number in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=300)
    (done,) = tokenize_files([path], tokenizer, str(tmp_path / "out"), Settings(eos=True))
    assert done.url == f"{tmp_path}/out/a.bin"
    assert written(done.url) == [[1, *tokenizer.encode(text), 2] for text in texts]
    for first in (0, 1, 299, 300, 301, 999):
        chunks = read_chunks(path, "parquet", Position(0, first), "text", False)
        assert [text for chunk in chunks for text in chunk.texts("text", False)] == texts[first:]


def test_a_pattern_keeps_the_folders_below_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("en/a.txt", "cn/a.txt", "cn/b/c.txt"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(name)
    done = tokenize_files([f"{tmp_path}/text/**/*.txt"], tokenizer, str(tmp_path / "out"))
    assert [file.url.removeprefix(f"{tmp_path}/out/") for file in done] == [
        "cn/a.bin",
        "cn/b/c.bin",
        "en/a.bin",
    ]
    assert written(done[2].url) == [[1, *tokenizer.encode("en/a.txt")]]


def test_a_file_that_is_there_already_is_made_again_only_if_something_changed(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\n")
    out = str(tmp_path / "out")
    first = tokenize_files([str(text)], tokenizer, out)
    assert tokenize_files([str(text)], tokenizer, out) == [replace(first[0], made=False)]
    assert tokenize_files([str(text)], tokenizer, out, Settings(eos=True))[0].made
    assert written(first[0].url) == [[1, *tokenizer.encode("one"), 2]]
    text.write_text("one\ntwo\n")
    assert tokenize_files([str(text)], tokenizer, out, Settings(eos=True))[0].samples == 2
    Path(first[0].url + ".meta").unlink()
    assert tokenize_files([str(text)], tokenizer, out, Settings(eos=True))[0].made


def test_files_without_text_are_left_out_of_many(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text(" \n")
    done = tokenize_files(
        [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tokenizer, str(tmp_path / "out")
    )
    assert [file.url for file in done] == [f"{tmp_path}/out/a.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.bin",
        "a.bin.made.json",
        "a.bin.meta",
    ]


def test_progress_is_told_up_to_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("some text of a line\n" * 120_000)
    (tmp_path / "b.txt").write_text("one")
    told: list[TextProgress] = []
    done = tokenize_files(
        [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
        tokenizer,
        str(tmp_path / "o"),
        progress=told.append,
    )
    assert len({now.bytes for now in told}) >= 3
    assert [now.bytes for now in told] == sorted(now.bytes for now in told)
    assert (told[-1].files, told[-1].bytes) == (told[-1].total_files, told[-1].total_bytes) == (2, 2_400_003)
    assert told[-1].tokens == sum(file.tokens for file in done)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"a\.txt: no text in it"),
        (b" \n\n", r"a\.txt: no text in it"),
        (b"one\n" * 300 + b"\xff\n", r"a\.txt, line 301: not UTF-8 text"),
    ],
)
def test_an_input_without_text_is_said_and_leaves_the_old_output(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes, sentence: str
) -> None:
    (tmp_path / "a.txt").write_text("old")
    arguments = [str(tmp_path / "a.txt")], tokenizer, str(tmp_path / "out")
    tokenize_files(*arguments)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        tokenize_files(*arguments)
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        "a.bin",
        "a.bin.made.json",
        "a.bin.meta",
    ]
    assert written(f"{tmp_path}/out/a.bin") == [[1, *tokenizer.encode("old")]]


def test_inputs_that_do_not_go_together_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="give at least one file"):
        tokenize_files([], tokenizer, str(tmp_path))
    with pytest.raises(UserError, match=r"input: .*/none\.txt does not exist"):
        tokenize_files([str(tmp_path / "none.txt")], tokenizer, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"input: .* is a folder; give the files in it"):
        tokenize_files([str(tmp_path)], tokenizer, str(tmp_path / "out"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"a\.txt and .*a\.jsonl would both become .*a\.bin; rename one"):
        tokenize_files([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")], tokenizer, str(tmp_path / "out"))


def test_parquet_files_that_cannot_be_read_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = str(tmp_path / "out")

    def refused(sentence: str, path: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            tokenize_files([path], tokenizer, out, Settings(**settings))

    path = write_parquet(tmp_path / "a.parquet", ["one", None])
    refused(r"a\.parquet, row 2: the text is missing", path)
    refused(r"no column 'body' \(it has 'id', 'text'\); name the column", path, text_field="body")
    refused(r"the column 'id' holds int64, not strings", path, text_field="id")
    refused(r"InternLM's tool reads no Parquet; leave out --raw", path, raw=True)
    whole = Path(write_parquet(tmp_path / "b.parquet", [str(n) * 50 for n in range(5000)])).read_bytes()
    for content in (b"", whole[:1000], whole[1000:], whole[:1000] + bytes(len(whole) - 2000) + whole[-1000:]):
        (tmp_path / "c.parquet").write_bytes(content)
        refused(
            r"c\.parquet: no whole Parquet file \(.*\); write or copy it again", str(tmp_path / "c.parquet")
        )
    assert not list((tmp_path / "out").glob("*.bin"))
