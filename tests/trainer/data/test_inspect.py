"""`internlm data inspect`: what a folder holds, and everything that is wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from internlm_trainer.cli import app
from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.inspect import group_of, inspect
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError

WriteSamples = Callable[[str, Sequence[Sequence[int]]], str]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("en/a.bin", "en"),
        ("train/cn/web/a.bin", "cn"),
        ("books/x/a.bin", "books"),
        ("en/code/a.bin", "en"),  # two kinds are none: the first folder
        ("a.bin", "."),
        ("encyclopedia/a.bin", "encyclopedia"),
    ],
)
def test_files_are_grouped_by_kind_or_folder(name: str, group: str) -> None:
    assert group_of(name) == group


def test_samples_and_tokens_are_counted_by_group_and_length(
    tmp_path: Path, write_samples: WriteSamples
) -> None:
    write_samples("en/a.bin", [[1], [1, 2], [1, 2, 3]])
    write_samples("en/b.bin", [[1] * 8])
    write_samples("code/c.bin", [[1] * 100])
    found = inspect(str(tmp_path), full=True, examples=5)
    assert [(g.name, g.files, g.samples, g.tokens, g.shortest, g.longest) for g in found.groups] == [
        ("code", 1, 1, 100, 100, 100),
        ("en", 2, 4, 14, 1, 8),
    ]
    assert found.histogram == [1, 2, 0, 1, 0, 0, 1]
    assert (found.samples, found.tokens, found.checked, found.broken) == (5, 114, 5, [])
    assert len(found.examples) == 5


def test_files_without_samples_are_shown_as_such(tmp_path: Path, write_samples: WriteSamples) -> None:
    write_samples("en/a.bin", [])
    found = inspect(str(tmp_path), full=True, examples=5)
    assert [(g.name, g.files, g.samples, g.shortest, g.longest) for g in found.groups] == [("en", 1, 0, 0, 0)]
    assert (found.histogram, found.checked, found.broken, found.examples) == ([], 0, [], [])
    write_samples("en/b.bin", [[1, 2], [1, 2, 3]])
    found = inspect(str(tmp_path), full=True, examples=5)
    assert [(g.files, g.samples, g.shortest, g.longest) for g in found.groups] == [(2, 2, 2, 3)]
    assert len(found.examples) == 5
    done = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "en/a.bin")])
    assert done.exit_code == 0, done.output
    assert "0 tokens in 0 samples" in done.output


def test_every_line_is_checked_only_if_that_is_asked_for(tmp_path: Path, write_samples: WriteSamples) -> None:
    url = Path(write_samples("x.bin", [[1, 5000 + n] for n in range(2000)]))
    assert inspect(str(tmp_path), full=True, vocab_size=7000).broken == []
    content = url.read_bytes()
    for number in (300, 301, 1999):
        content = content.replace(b"[1, %d]" % (5000 + number), b"[1, x%d]" % number)
    url.write_bytes(content)
    found = inspect(str(tmp_path), full=True)
    assert [sentence.split(":")[0] for sentence in found.broken] == [
        f"{url}, line {n}" for n in (301, 302, 2000)
    ]
    assert found.checked == 2000
    quick = inspect(str(tmp_path))
    assert quick.checked == 16
    assert f"{url}, line 2000" in quick.broken[-1]  # the last line is always read


def test_files_that_cannot_be_opened_do_not_hide_the_others(
    tmp_path: Path, write_samples: WriteSamples
) -> None:
    write_samples("en/a.bin", [[1, 2]])
    Path(write_samples("en/b.bin", [[1, 2]]) + ".meta").unlink()
    Path(write_samples("en/c.bin", [[1, 2]]) + ".meta").write_bytes(b"x")
    found = inspect(str(tmp_path))
    assert [(g.name, g.files) for g in found.groups] == [("en", 1)]
    assert [sentence.split(" ")[0] for sentence in found.broken] == [
        f"{tmp_path}/en/b.bin",
        f"{tmp_path}/en/c.bin.meta",
    ]
    with pytest.raises(UserError, match=r"path: .*/none does not exist"):
        inspect(str(tmp_path / "none"))


def test_the_command_draws_lengths_decodes_samples_and_ends_with_65_if_something_is_broken(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    with write_bin(str(tmp_path / "data/en/a.bin")) as writer:
        for _ in range(20):
            writer.write([1, *tokenizer.encode("def f(x): return x")])
    command = ["data", "inspect", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer.model")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "def f(x): return x" in done.output
    assert "\u2588" in done.output
    path = tmp_path / "data/en/a.bin"
    path.write_bytes(path.read_bytes().replace(b"]}", b", 600]}", 1).replace(b"{", b"", 1)[:-1])
    done = CliRunner().invoke(app, [*command, "--full"])
    assert done.exit_code == 65, done.output
    assert f"error: {path}, line 1:" in done.stderr
