"""The stream of rows: one global order, whatever the ranks, exactly continued after any interruption."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_trainer.config import SourceSpec
from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.loader import RowLoader, validation_rows
from internlm_trainer.data.packing import Row
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join

SETTINGS: dict[str, Any] = {
    "row_tokens": 24,
    "seq_len": 10,
    "packing": "documents",
    "seed": 1024,
    "vocab_size": 5000,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: `en` of two files and `code` of one. No id occurs twice, so that every token is known
    again.
    """
    folder = tmp_path_factory.mktemp("corpus")
    random, token = np.random.RandomState(0), 2
    for name, samples in {"en/a.bin": 30, "en/sub/b.bin": 12, "code/c.bin": 20}.items():
        with write_bin(str(folder / name)) as writer:
            for length in random.randint(1, 40, samples):
                writer.write(list(range(token, token + length)))
                token += int(length)
    return folder


def loader_of(corpus: Path | str, names: Sequence[str] = ("en", "code"), **changes: Any) -> RowLoader:
    weights = {"en": 0.7, "code": 0.3}
    sources = [SourceSpec(path=join(str(corpus), name), weight=weights.get(name, 1.0)) for name in names]
    return RowLoader(sources, **SETTINGS | changes)


def plain(row: Row) -> tuple[Any, ...]:
    """A row that compares."""
    return (
        row.tokens.tolist(),
        row.labels.tolist(),
        row.cu_seqlens.tolist(),
        row.positions.tolist(),
        row.max_seqlen,
        row.source,
    )


def global_rows(loader: RowLoader, count: int) -> list[tuple[Any, ...]]:
    """The next `count` rows, one a step."""
    return [plain(loader.next_step(1, [0])[0]) for _ in range(count)]


@pytest.mark.parametrize("packing", ["documents", "contiguous"])
def test_an_epoch_has_every_token_once_but_for_each_files_tail(corpus: Path, packing: str) -> None:
    loader = loader_of(corpus, ["en"], packing=packing)
    (source,) = loader.sources
    rows = loader.next_step(source.rows, range(source.rows))
    seen = [token for row in rows for token in row.tokens.tolist()]
    assert len(set(seen)) == len(seen) == sum(file.tokens // 24 * 24 for file in source.files)
    assert set(seen) <= set(range(2, 2 + source.tokens))


def test_labels_are_the_next_tokens_of_the_same_sample(corpus: Path) -> None:
    for row in loader_of(corpus).next_step(40, range(40)):
        known = row.labels != -100
        assert (row.labels[known] == row.tokens[known] + 1).all()
        assert known.mean() > 0.8


def test_each_epoch_is_shuffled_anew_and_the_order_is_the_seeds(corpus: Path) -> None:
    loader = loader_of(corpus, ["en"])
    rows = loader.sources[0].rows
    first, second = global_rows(loader, rows), global_rows(loader, rows)
    assert loader.epochs() == [2.0]
    assert first != second
    assert first == global_rows(loader_of(corpus, ["en"]), rows)
    assert first != global_rows(loader_of(corpus, ["en"], seed=1), rows)
    # Rows of the two files are mixed with each other.
    border = loader.sources[0].files[0].tokens
    files = [min(row[0]) > border for row in first]
    assert files != sorted(files)


def test_sources_are_mixed_by_their_weights(corpus: Path) -> None:
    rows = loader_of(corpus).next_step(100, range(100))
    assert [row.source for row in rows].count(0) == 70
    assert [row.source for row in rows][:5].count(1) in (1, 2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_number_of_ranks_and_any_interruptions_give_the_same_global_rows(
    corpus: Path, ranks: int, accumulation: int, steps: list[int], data: st.DataObject
) -> None:
    """Each element of `steps` is a life of the job; each life may have another number of ranks."""
    rows_per_step = ranks * accumulation
    seen: list[tuple[Any, ...]] = []
    state = None
    for life in steps:
        lanes = data.draw(st.sampled_from([n for n in range(1, rows_per_step + 1) if rows_per_step % n == 0]))
        loaders = [loader_of(corpus) for _ in range(lanes)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        for _ in range(life):
            rows: dict[int, tuple[Any, ...]] = {}
            for rank, loader in enumerate(loaders):
                take = range(rank, rows_per_step, lanes)
                rows |= zip(take, map(plain, loader.next_step(rows_per_step, take)), strict=True)
            seen += [rows[offset] for offset in range(rows_per_step)]
        # What was saved is what was taken, though each loader has prepared a step more.
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    assert seen == global_rows(loader_of(corpus), len(seen))


def test_other_arguments_than_the_prepared_ones_change_nothing_in_the_order(corpus: Path) -> None:
    loader, seen = loader_of(corpus), []
    for rows in (1, 3, 3, 2, 5, 5, 5, 1):
        seen += map(plain, loader.next_step(rows, range(rows)))
    assert seen == global_rows(loader_of(corpus), len(seen))


def test_a_step_of_which_nothing_is_taken_advances_all_the_same(corpus: Path) -> None:
    loader = loader_of(corpus)
    assert loader.next_step(7, []) == []
    assert plain(loader.next_step(1, [0])[0]) == global_rows(loader_of(corpus), 8)[7]


def test_going_back_to_an_earlier_state_repeats_its_rows(corpus: Path) -> None:
    loader = loader_of(corpus)
    loader.next_step(5, [0])
    state = loader.state_dict()
    first = global_rows(loader, 9)
    loader.load_state_dict(state)
    assert global_rows(loader, 9) == first


KILLED = """
import json, sys
from pathlib import Path
from internlm_trainer.config import SourceSpec
from internlm_trainer.data.loader import RowLoader
corpus, log = Path(sys.argv[1]), Path(sys.argv[2])
loader = RowLoader([SourceSpec(path=str(corpus / name)) for name in ("en", "code")], **{settings!r})
lines = log.read_text().splitlines(keepends=True) if log.exists() else []
lines = [line for line in lines if line.endswith("\\n")]
log.write_text("".join(lines))
if lines:
    loader.load_state_dict(json.loads(lines[-1])["state"])
with log.open("a") as file:
    for _ in range(int(sys.argv[3]) - len(lines)):
        rows = [row.tokens.tolist() for row in loader.next_step(3, range(3))]
        file.write(json.dumps({{"rows": rows, "state": loader.state_dict()}}) + "\\n")
        file.flush()
"""


def test_a_process_killed_at_any_moment_goes_on_where_its_last_state_was(
    corpus: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script = KILLED.format(settings=SETTINGS)
    command = [sys.executable, "-c", script, str(corpus), str(log)]
    for lines in (50, 150):
        process = subprocess.Popen([*command, "1000000000"])
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    steps = log.read_bytes().count(b"\n") + 50
    subprocess.run([*command, str(steps)], check=True)
    seen = [row for line in log.read_text().splitlines() for row in json.loads(line)["rows"]]
    whole = RowLoader([SourceSpec(path=str(corpus / name)) for name in ("en", "code")], **SETTINGS)
    assert seen == [row.tokens.tolist() for row in whole.next_step(3 * steps, range(3 * steps))]


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("minio").bucket())
    return f"memory://{secrets.token_hex(4)}"


def test_rows_are_the_same_from_every_store_and_a_job_may_move_to_another(corpus: Path, store: str) -> None:
    from internlm_trainer.storage import open_fs

    fs, path = open_fs(store)
    for file in corpus.rglob("*.bin*"):
        fs.pipe_file(f"{path}/{file.relative_to(corpus)}", file.read_bytes())
    local, remote = loader_of(corpus), loader_of(store)
    assert global_rows(remote, 30) == global_rows(local, 30)
    remote.load_state_dict(local.state_dict())
    assert global_rows(remote, 100) == global_rows(local, 100)


# ---- what must not be resumed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 7}, r"training\.seed was 1024 when the checkpoint was written and is 7 now"),
        ({"row_tokens": 12}, r"tokens of a row .*microBatchSize.* was 24 .* is 12 now"),
        ({"names": ["en"]}, r"number of data\.train sources was 2 .* is 1 now"),
        ({"names": ["code", "en"]}, r"data\.train\[0\]\.weight was 0\.7"),
    ],
)
def test_settings_that_would_change_the_order_are_refused(
    corpus: Path, changes: dict[str, Any], sentence: str
) -> None:
    state = loader_of(corpus).state_dict()
    with pytest.raises(UserError, match=sentence):
        loader_of(corpus, **changes).load_state_dict(state)


@pytest.mark.parametrize("change", ["another sample", "another length", "another file", "a renamed file"])
def test_changed_data_is_refused_with_its_folder(corpus: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    state = loader_of(corpus).state_dict()
    loader_of(tmp_path / "copy").load_state_dict(state)  # a copy is the same data
    file = tmp_path / "copy/code/c.bin"
    if change == "a renamed file":
        for name in ("c.bin", "c.bin.meta"):
            os.rename(file.parent / name, file.parent / name.replace("c", "d", 1))
    else:
        samples = [json.loads(line)["tokens"] for line in file.read_bytes().splitlines()]
        if change == "another sample":
            samples.append([5, 6])
        elif change == "another length":
            samples[3].append(5)
        with write_bin(str(file if change != "another file" else file.with_name("e.bin"))) as writer:
            for sample in samples:
                writer.write(sample)
    with pytest.raises(
        UserError, match=r"data\.train\[1\]\.path: the data in .*/copy/code is not what the check"
    ):
        loader_of(tmp_path / "copy").load_state_dict(state)


def test_a_state_of_another_version_is_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match="has version 99"):
        loader_of(corpus).load_state_dict(loader_of(corpus).state_dict() | {"version": 99})


# ---- what is wrong before the first step


def test_a_corpus_shorter_than_a_row_says_how_much_there_is_and_is_needed(
    write_samples: Callable[[str, list[list[int]]], str],
) -> None:
    path = write_samples("x.bin", [[1, 2, 3], [1, 2]])
    with pytest.raises(UserError, match=r"data\.train\[0\]\.path: .*x\.bin has 5 tokens, but a row needs 24"):
        RowLoader([SourceSpec(path=path)], **SETTINGS)


def test_files_that_are_all_shorter_than_a_row_are_said(
    tmp_path: Path, write_samples: Callable[[str, list[list[int]]], str]
) -> None:
    for name in "abc":
        write_samples(f"{name}.bin", [[1, *range(2, 20)]])
    with pytest.raises(
        UserError, match=r"the largest of the 3 files of .* has 19 tokens, but a row needs 24"
    ):
        RowLoader([SourceSpec(path=str(tmp_path))], **SETTINGS)


def test_the_source_that_is_wrong_is_named(corpus: Path, tmp_path: Path) -> None:
    sources = [SourceSpec(path=str(corpus / "en")), SourceSpec(path=str(tmp_path))]
    with pytest.raises(UserError, match=r"data\.train\[1\]\.path: .* has no \.bin file"):
        RowLoader(sources, **SETTINGS)


def test_ids_beyond_the_vocabulary_are_said_with_file_and_line(corpus: Path) -> None:
    loader = loader_of(corpus, vocab_size=100)
    with pytest.raises(
        UserError, match=r"\.bin, line \d+: token \d+, but the model's vocabulary .* has 100 words"
    ):
        loader.next_step(30, range(30))


def test_an_error_in_the_background_is_raised_by_the_step_that_needs_it(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    loader = loader_of(tmp_path / "copy", ["code"])
    assert loader.next_step(1, [0])
    file = tmp_path / "copy/code/c.bin"
    file.write_bytes(file.read_bytes().replace(b"tokens", b"broken"))
    with pytest.raises(UserError, match=r"c\.bin, line \d+: not a tokenized sample"):
        global_rows(loader, loader.sources[0].rows)


def test_offsets_outside_of_the_step_are_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"take \[3\] must be offsets of the 3 rows"):
        loader_of(corpus).next_step(3, [3])


# ---- validation


def validation_of(corpus: Path, count: int, **ranks: int) -> list[tuple[Any, ...]]:
    sources = [SourceSpec(path=str(corpus / name)) for name in ("en", "code")]
    return [plain(row) for row in validation_rows(sources, count=count, **SETTINGS, **ranks)]


def test_validation_rows_are_always_the_same_and_shared_among_ranks(corpus: Path) -> None:
    rows = validation_of(corpus, 10)
    assert len(rows) == 10
    assert rows == validation_of(corpus, 10)
    shares = [validation_of(corpus, 10, rank=rank, world_size=3) for rank in range(3)]
    assert [shares[n % 3][n // 3] for n in range(10)] == rows


def test_no_validation_row_comes_twice(corpus: Path) -> None:
    rows = validation_of(corpus, 10**6)
    loader = loader_of(corpus)
    assert len(rows) == sum(source.rows for source in loader.sources)
    tokens = [token for row in rows for token in row[0]]
    assert len(set(tokens)) == len(tokens)
    assert rows[:10] == validation_of(corpus, 10)


def test_a_validation_set_that_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.validation\[0\]\.path: .* has no \.bin file"):
        validation_rows([SourceSpec(path=str(tmp_path))], count=1, **SETTINGS)
