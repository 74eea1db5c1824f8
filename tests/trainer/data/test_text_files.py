"""Raw text: which files a pattern means, and what the samples in them are."""

from __future__ import annotations

import io
import json
import secrets
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.data.text_files import (
    NotTextError,
    SampleKind,
    expand_variables,
    find_files,
    samples_of,
)
from internlm_trainer.errors import UserError


def test_variables_stand_for_the_environment_and_for_pythons_own_sources() -> None:
    stdlib = sysconfig.get_path("stdlib")
    assert expand_variables("${A}/x/${B}", "text", {"A": "/a", "B": "b"}) == "/a/x/b"
    assert expand_variables("${PYTHON_STDLIB}/*.py", "text", {}) == f"{stdlib}/*.py"
    assert expand_variables("${PYTHON_STDLIB}", "text", {"PYTHON_STDLIB": "/other"}) == "/other"
    assert expand_variables("$A/{A}/${", "text", {"A": "/a"}) == "$A/{A}/${"


def test_a_variable_that_is_not_set_is_said() -> None:
    with pytest.raises(UserError, match=r"text\[0\]: the environment variable CORPUS is not set; set it"):
        expand_variables("${CORPUS}/*.txt", "text[0]", {})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt", "sub/deep/e.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "exclude", "names"),
    [
        (["/*.txt"], [], ["a.txt", "b.txt"]),
        (["/*/*.txt"], [], ["sub/c.txt"]),
        (["/**/*.txt"], [], ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        (["/**"], [], ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt", "sub/deep/e.md"]),
        (["/a.txt"], [], ["a.txt"]),
        (["/*.txt", "/a.*"], [], ["a.txt", "b.txt"]),
        (["/[ab].txt"], ["/b*"], ["a.txt"]),
        (["/**"], ["/sub"], ["a.txt", "b.txt"]),
        (["/**"], ["/*/deep"], ["a.txt", "b.txt", "sub/c.txt"]),
        (["/**"], ["/**/*.txt"], ["sub/deep/e.md"]),
        (["/**"], ["/none*"], ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt", "sub/deep/e.md"]),
    ],
)
@pytest.mark.parametrize("store", ["path", "file", "memory", "s3"])
def test_patterns_mean_the_same_in_every_store(
    tree: Path,
    patterns: list[str],
    exclude: list[str],
    names: list[str],
    store: str,
    request: pytest.FixtureRequest,
) -> None:
    root = str(tree) if store == "path" else f"file://{tree}"
    if store in ("memory", "s3"):
        from internlm_trainer.storage import open_fs

        root = f"memory://{secrets.token_hex(4)}"
        if store == "s3":
            root = request.getfixturevalue("minio").bucket()
        fs, path = open_fs(root)
        for file in tree.rglob("*.*"):
            fs.pipe_file(f"{path}/{file.relative_to(tree)}", file.read_bytes())
    found = find_files([root + p for p in patterns], [root + p for p in exclude])
    assert [file.name for file in found] == names
    assert all(file.size > 0 for file in found)
    if patterns != ["/*/*.txt"]:
        assert [file.read().decode() for file in found] == names


def test_patterns_that_find_nothing_are_said(tree: Path) -> None:
    with pytest.raises(UserError, match=r"data\.prepare\.text\[1\]: .*\*\.rst matches no file; correct"):
        find_files([f"{tree}/*.txt", f"{tree}/*.rst"], [])
    with pytest.raises(UserError, match=r"data\.prepare\.text\[0\]: .*/sub matches only folders; add /\*\*"):
        find_files([f"{tree}/sub"], [])
    with pytest.raises(UserError, match=r"data\.prepare\.exclude leaves out all 2 files"):
        find_files([f"{tree}/*.txt"], [f"{tree}/*"])
    with pytest.raises(UserError, match=r"data\.prepare\.exclude\[0\]: the environment variable NO_SUCH_ONE"):
        find_files([f"{tree}/*.txt"], ["${NO_SUCH_ONE}/x"])


def test_text_in_a_bucket_that_does_not_exist_is_said(minio: object) -> None:  # noqa: ARG001
    with pytest.raises(UserError, match=r"data\.prepare\.text\[0\]: .*(bucket|matches no file)"):
        find_files([f"s3://no-{secrets.token_hex(4)}/*.txt"], [])


def texts(content: bytes, kind: SampleKind, **options: object) -> list[str]:
    return list(samples_of(io.BytesIO(content), kind, "x", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "content", "samples"),
    [
        ("file", b"one\r\n\n two \n", ["one\r\n\n two \n"]),
        ("file", b"", []),
        ("line", b"one\n\n  two \n \t\nthree", ["one", "two", "three"]),
        ("line", b"one\r\ntwo\rthree\x0bfour\n", ["one", "two", "three\x0bfour"]),
        ("line", "a\u2028b\n\u00e9".encode(), ["a\u2028b", "\u00e9"]),
        ("jsonl", b'{"text": "a\\nb", "id": 1}\n\n{"text": ""}\n', ["a\nb", ""]),
        ("json", b'[{"text": "a"},\n {"text": "\xc3\xa9"}]', ["a", "\u00e9"]),
        ("json", b"[]", []),
    ],
)
def test_samples_of_each_kind(kind: SampleKind, content: bytes, samples: list[str]) -> None:
    assert texts(content, kind) == samples


@given(text=st.text(), kind=st.sampled_from(["line", "jsonl"]))
def test_lines_are_those_of_a_file_that_python_opens_as_text(text: str, kind: SampleKind) -> None:
    lines = list(io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    expected = lines if kind == "jsonl" else [line.strip() for line in lines if line.strip()]
    assert texts(text.encode(), kind, raw=True) == expected


def test_another_field_may_hold_the_text() -> None:
    assert texts(b'{"content": "a"}\n', "jsonl", text_field="content") == ["a"]


def test_raw_json_is_what_internlms_tool_tokenizes() -> None:
    records = [{"text": "\u00e9", "id": 1}, ["x"]]
    assert texts(json.dumps(records).encode(), "json", raw=True) == ['{"text": "\\u00e9", "id": 1}', '["x"]']
    assert texts('{"text":"\u00e9"}\n\n'.encode(), "jsonl", raw=True) == ['{"text":"\u00e9"}\n', "\n"]


@pytest.mark.parametrize(
    ("kind", "content", "sentence"),
    [
        ("jsonl", b'{"text": "a"}\n{"text": \n', r"x, line 2: not JSON"),
        (
            "jsonl",
            b'\n{"body": "a", "id": 1}\n',
            r"x, line 2: no text in the field 'text' \(it has 'body', 'id'\)",
        ),
        ("jsonl", b"{}\n", r"it has none"),
        ("jsonl", b'{"text": 5}\n', r"x, line 1: no text in the field 'text'"),
        ("jsonl", b"[1]\n", r"x, line 1: no text .*it is no object"),
        ("json", b'[{"text": "a"}, {"text": null}]', r"x, record 2: no text in the field 'text'"),
        ("json", b'{"text": "a"}', r"x: a JSON file must hold a list of records"),
        ("json", b'{"text": "a"}\n{"text": "a"}', r"x: not JSON .*must be named \.jsonl"),
    ],
)
def test_json_that_holds_no_text_is_said(kind: SampleKind, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        texts(content, kind)


@pytest.mark.parametrize("kind", ["file", "line", "json", "jsonl"])
def test_what_is_not_utf8_is_said_with_its_line(kind: SampleKind) -> None:
    with pytest.raises(NotTextError, match=r"x, line 3: not UTF-8 text; convert the file, or leave it out"):
        texts(b'{"text": "a"}\n\n\xff\n', kind)
