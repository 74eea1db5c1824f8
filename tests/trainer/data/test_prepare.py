"""`data.prepare`: from raw text to a tokenizer and tokenized data, once, whatever happens in between."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from internlm_trainer.config import TrainSpec
from internlm_trainer.data.bin_format import open_bins
from internlm_trainer.data.prepare import PreparedReport, prepare
from internlm_trainer.data.progress import TextProgress, shown_progress
from internlm_trainer.data.tokenizer import Tokenizer, load_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs


@pytest.fixture
def text(tmp_path: Path, python_sources: list[str]) -> Path:
    """A folder of 40 text files, some in sub-folders."""
    folder = tmp_path / "text"
    for number in range(40):
        path = folder / f"{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"# file {number}\n" + python_sources[number % len(python_sources)][number * 50 :][:4000]
        )
    return folder


def spec_of(text: Path | str, out: Path | str, **changes: Any) -> TrainSpec:
    settings = {"text": [f"{text}/**/*.txt"], "validationPercent": 10}
    return TrainSpec.model_validate(
        {
            "model": {"layers": 1, "hiddenSize": 32, "heads": 2, "vocabSize": changes.pop("vocabSize", 600)},
            "data": {
                "tokenizer": join(str(out), "tokenizer.model"),
                "train": [{"path": join(str(out), changes.pop("train", "train"))}],
                "validation": [
                    {"path": join(str(out), name)} for name in changes.pop("validation", ["valid"])
                ],
                "prepare": settings | changes,
            },
            "training": {"steps": 1},
            "checkpoint": {"path": "memory://checkpoints"},
        }
    )


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = {
    "tokenizer.model",
    "train/text.bin",
    "train/text.bin.meta",
    "train/prepared.json",
    "valid/text.bin",
    "valid/text.bin.meta",
}


def texts_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The samples of a folder, as text."""
    samples = []
    for line in (folder / "text.bin").read_bytes().splitlines():
        first, *ids = json.loads(line)["tokens"]
        assert first == 1
        samples.append(tokenizer.decode(ids))
    return samples


def test_every_file_becomes_one_sample_of_training_or_validation(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prepare(spec_of(text, out))
    assert set(content_of(out)) == FILES
    tokenizer = load_tokenizer(str(out / "tokenizer.model"))
    train, valid = texts_of(out / "train", tokenizer), texts_of(out / "valid", tokenizer)
    assert sorted(train + valid) == sorted(path.read_text() for path in text.rglob("*.txt"))
    assert report.made
    assert (report.vocab_size, report.unreadable) == (600, [])
    assert report.validation is not None
    assert (report.train.samples, report.validation.samples) == (len(train), len(valid))
    assert report.train.tokens == sum(file.tokens for file in open_bins(str(out / "train"), "train"))
    assert 0 < len(valid) < 12


def test_every_line_may_be_a_sample(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(spec_of(text, out, sample="line"))
    tokenizer = load_tokenizer(str(out / "tokenizer.model"))
    lines = [line.strip() for path in text.rglob("*.txt") for line in path.read_text().splitlines()]
    found = texts_of(out / "train", tokenizer) + texts_of(out / "valid", tokenizer)
    assert sorted(found) == sorted(filter(None, lines))


def test_the_unigram_entropy_is_that_of_the_training_tokens(text: Path, tmp_path: Path) -> None:
    report = prepare(spec_of(text, tmp_path))
    ids = [
        token
        for line in (tmp_path / "train/text.bin").read_bytes().splitlines()
        for token in json.loads(line)["tokens"][1:]
    ]
    shares = np.bincount(ids) / len(ids)
    assert report.unigram_entropy == pytest.approx(-sum(s * np.log(s) for s in shares if s))


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(text: Path, tmp_path: Path) -> None:
    prepare(spec_of(text, tmp_path / "a"))
    moved = text.rename(tmp_path / "moved")
    prepare(spec_of(moved, tmp_path / "b"))
    first, second = content_of(tmp_path / "a"), content_of(tmp_path / "b")
    for content in (first, second):
        del content["train/prepared.json"]  # it names the patterns
    assert first == second


def test_what_is_there_is_not_made_again_even_if_the_text_is_gone(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(spec_of(text, out))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for path in text.rglob("*.txt"):
        path.unlink()
    second = prepare(spec_of(text, out))
    assert not second.made
    assert second == PreparedReport(**(vars(first) | {"made": False}))
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize("missing", sorted(FILES - {"train/prepared.json"}))
def test_a_file_that_was_removed_is_made_again(text: Path, tmp_path: Path, missing: str) -> None:
    out = tmp_path / "out"
    prepare(spec_of(text, out))
    before = content_of(out)
    (out / missing).unlink()
    assert prepare(spec_of(text, out)).made
    assert content_of(out) == before


def test_a_tokenizer_that_is_there_is_used(text: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    prepare(spec_of(text, tmp_path))
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_model


def test_without_validation_all_samples_are_for_training(text: Path, tmp_path: Path) -> None:
    report = prepare(spec_of(text, tmp_path, validation=[]))
    assert (report.train.samples, report.validation) == (40, None)


def test_a_bin_file_may_be_named_instead_of_a_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(spec_of(text, out, train="train.bin", validation=["valid.bin"]))
    assert set(content_of(out)) == {
        "tokenizer.model",
        "train.bin",
        "train.bin.meta",
        "train.bin.prepared.json",
        "valid.bin",
        "valid.bin.meta",
    }
    assert not prepare(spec_of(text, out, train="train.bin", validation=["valid.bin"])).made


def test_text_and_data_may_be_in_an_object_store(text: Path, tmp_path: Path, minio: Any) -> None:
    bucket = minio.bucket()
    fs, path = open_fs(bucket)
    for file in text.rglob("*.txt"):
        fs.pipe_file(f"{path}/text/{file.relative_to(text)}", file.read_bytes())
    prepare(spec_of(text, tmp_path / "out"))
    prepare(spec_of(f"{bucket}/text", bucket))
    local = content_of(tmp_path / "out")
    for name in FILES - {"train/prepared.json"}:
        assert fs.cat_file(f"{path}/{name}") == local[name], name
    assert not prepare(spec_of(f"{bucket}/text", bucket)).made


# ---- interruptions

KILLED = """
import os, signal, sys
from internlm_trainer.config import TrainSpec
from internlm_trainer.data import prepare as module
spec, point = TrainSpec.model_validate_json(sys.argv[1], by_name=True), int(sys.argv[2])
die, replace, count = lambda: os.kill(os.getpid(), signal.SIGKILL), os.replace, 0
def counted(source, target):
    global count
    count += 1
    if count == point:
        die()
    replace(source, target)
os.replace = counted
def progress(now):
    if point == 0 and now.stage == "tokenize":
        die()
module.prepare(spec, progress)
"""


@pytest.mark.parametrize("point", range(7))
def test_a_run_killed_at_any_point_is_completed_by_the_next_one_to_the_byte(
    text: Path, tmp_path: Path, point: int
) -> None:
    """Point 0 is in the middle of tokenizing, the others just before each of the six files gets its name."""
    prepare(spec_of(text, tmp_path / "whole"))
    spec = spec_of(text, tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, spec.model_dump_json(), str(point)])
    assert killed.returncode == -signal.SIGKILL
    assert set(content_of(tmp_path / "out")) != FILES
    assert prepare(spec).made
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validationPercent": 20}, "validationPercent was 10 and is 20 now"),
        ({"sample": "line"}, "sample was file and is line now"),
        ({"exclude": ["/x"]}, r"exclude was \[\] and is \['/x'\] now"),
        ({"vocabSize": 700}, "vocabSize was 600 and is 700 now"),
        ({"validation": []}, "validationPercent was 10 and is 0 now"),
    ],
)
def test_other_settings_than_the_datas_are_refused_with_what_to_remove(
    text: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    prepare(spec_of(text, tmp_path))
    with pytest.raises(
        UserError, match=rf"made with other settings \({words}\); set it back, or remove .*/train"
    ):
        prepare(spec_of(text, tmp_path, **changes))


def test_another_tokenizer_than_the_datas_is_refused(
    text: Path, tmp_path: Path, tokenizer_model: bytes
) -> None:
    prepare(spec_of(text, tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    with pytest.raises(
        UserError, match=r"data\.tokenizer: .* is not the tokenizer that .*text\.bin was made with"
    ):
        prepare(spec_of(text, tmp_path))


def test_a_tokenizer_of_another_size_is_refused(text: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    with pytest.raises(UserError, match=r"has 600 words but the model's vocabulary .* has 700"):
        prepare(spec_of(text, tmp_path, vocabSize=700))


@pytest.mark.parametrize("folder", ["train", "valid"])
def test_a_folder_with_other_data_is_left_alone(text: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder / "en").mkdir(parents=True)
    (tmp_path / folder / "en/mine.bin").write_bytes(b"mine")
    with pytest.raises(
        UserError, match=rf"/{folder} already holds tokenized data \(.*mine\.bin\); remove data\.prep"
    ):
        prepare(spec_of(text, tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"{\xff"])
def test_a_marker_that_is_not_ours_is_said(text: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/prepared.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"prepared\.json is not what data\.prepare writes; remove its folder"
    ):
        prepare(spec_of(text, tmp_path))


def test_training_and_validation_need_two_places(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.validation\[0\]\.path: must not be data\.train\[0\]\.path"):
        prepare(spec_of(text, tmp_path, validation=["train"]))


def test_files_that_are_not_utf8_are_left_out_and_said_once(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (text / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        report = prepare(spec_of(text, tmp_path / "out"))
    assert report.unreadable == ["latin.txt"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{text}/latin.txt is not UTF-8 text and is left out"
    ]
    assert report.train.samples + report.validation.samples == 40  # type: ignore[union-attr]


def test_text_that_gives_no_data_is_said_and_leaves_none(
    text: Path, tmp_path: Path, tokenizer_model: bytes
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    empty, single = tmp_path / "empty", tmp_path / "single"
    for folder, content in ((empty, ""), (single, "text")):
        folder.mkdir()
        (folder / "x.txt").write_text(content)
    with pytest.raises(UserError, match=r"data\.prepare\.text: its files hold no text"):
        prepare(spec_of(empty, tmp_path))
    with pytest.raises(
        UserError, match=r"none of the 1 samples went to (validation|training); give more text"
    ):
        prepare(spec_of(single, tmp_path))
    assert not list(tmp_path.glob("train/*"))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"enough for a tokenizer of \d+ words, not of 9000"):
        prepare(spec_of(text, tmp_path, vocabSize=9000))


# ---- progress


def test_progress_is_told_for_both_stages_up_to_the_end(text: Path, tmp_path: Path) -> None:
    told: list[TextProgress] = []
    report = prepare(spec_of(text, tmp_path), told.append)
    assert [now.stage for now in told] == sorted((now.stage for now in told), reverse=True)
    assert {now.stage for now in told} == {"tokenizer", "tokenize"}
    assert (told[-1].files, told[-1].bytes) == (told[-1].total_files, told[-1].total_bytes)
    assert told[-1].tokens == report.train.tokens + report.validation.tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_log_line_elsewhere(
    terminal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    with caplog.at_level(logging.INFO), shown_progress(console) as report:
        report(TextProgress("tokenize", 1, 2, 500, 1000, 120))
        report(TextProgress("tokenize", 2, 2, 1000, 1000, 240))
    lines = [record.getMessage() for record in caplog.records]
    if terminal:
        assert "2/2 files, 240 tokens" in screen.getvalue()
        assert lines == []
    else:
        assert screen.getvalue() == ""
        assert len(lines) == 1
        assert lines[0].startswith("tokenize: 2/2 files, 240 tokens")
