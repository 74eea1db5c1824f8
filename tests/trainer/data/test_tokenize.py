"""Tokenizing files that the user names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm_trainer.data.bin_format import open_bins
from internlm_trainer.data.progress import TextProgress
from internlm_trainer.data.tokenize import TokenizedFile, tokenize_files
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
    tokenize_files([str(tmp_path / "a.txt")], tokenizer, str(tmp_path / "x.bin"), sample="file")
    assert written(str(tmp_path / "x.bin")) == [[1, *tokenizer.encode("one\ntwo\n")]]
    (tmp_path / "b.data").write_text('{"body": "one"}\n')
    tokenize_files(
        [str(tmp_path / "b.data")], tokenizer, str(tmp_path / "y.bin"), sample="jsonl", text_field="body"
    )
    assert written(str(tmp_path / "y.bin")) == [[1, *tokenizer.encode("one")]]


def test_raw_tokenizes_as_internlms_tool_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\u2581"}\n')
    tokenize_files([str(tmp_path / "a.jsonl")], tokenizer, str(tmp_path / "x.bin"), raw=True)
    assert written(str(tmp_path / "x.bin")) == [[1, *tokenizer.encode('{"text": "x\u2581"}\n', exact=False)]]


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
        (b"one\n\xff\n", r"a\.txt, line 2: not UTF-8 text"),
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
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["a.bin", "a.bin.meta"]
    assert written(f"{tmp_path}/out/a.bin") == [[1, *tokenizer.encode("old")]]


def test_inputs_that_do_not_go_together_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="give at least one file"):
        tokenize_files([], tokenizer, str(tmp_path))
    with pytest.raises(UserError, match=r"input: .*/none\.txt does not exist"):
        tokenize_files([str(tmp_path / "none.txt")], tokenizer, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"input: .* is a folder; give the files in it"):
        tokenize_files([str(tmp_path)], tokenizer, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"a\.txt and .*a\.jsonl would both become .*a\.bin; rename one"):
        tokenize_files([str(tmp_path / "a.txt"), "a.jsonl"], tokenizer, str(tmp_path / "out"))
