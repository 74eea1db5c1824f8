"""The token ledger, by property: whatever is drawn, skipped and interrupted, the accounts are what was given out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from internlm_trainer.config import DataSpec, SourceSpec, skipped_after
from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.ledger import entries
from internlm_trainer.data.loader import RowLoader
from internlm_trainer.errors import UserError

WriteSamples = Callable[[str, Sequence[Sequence[int]]], str]
SETTINGS: dict[str, Any] = {
    "row_tokens": 10,
    "seq_len": 10,
    "packing": "documents",
    "seed": 3,
    "vocab_size": 10_000,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources whose tokens are all different."""
    folder, token = tmp_path_factory.mktemp("corpus"), 2
    for name, samples in {"a": 40, "b": 25, "c": 7}.items():
        with write_bin(str(folder / f"{name}/x.bin")) as writer:
            for number in range(samples):
                length = 1 + number * 7 % 23
                writer.write(list(range(token, token + length)))
                token += length
    return folder


Act = tuple[str, int, int]
ACTS = st.lists(
    st.tuples(st.sampled_from(["train", "skip"]), st.integers(1, 5), st.integers(1, 3)), max_size=8
)


@settings(max_examples=12, deadline=None)
@given(acts=ACTS, weights=st.tuples(*[st.floats(0.1, 5)] * 3), min_length=st.sampled_from([0, 4]))
def test_the_ledger_is_what_was_given_out_and_skipped(
    corpus: Path, acts: list[Act], weights: tuple[float, ...], min_length: int
) -> None:
    """Each act is a life: so many steps trained or skipped, on so many ranks, and a resume from JSON before it."""
    sources = [SourceSpec(path=str(corpus / name), weight=w) for name, w in zip("abc", weights, strict=True)]

    def new() -> RowLoader:
        return RowLoader(sources, **SETTINGS, min_length=min_length)

    reference, first = new(), 0
    whole = reference.next_step(300, range(300))
    reference.close()
    state, given_out, skipped = None, [0] * 3, [0] * 3
    for kind, steps, ranks in acts:
        loaders = [new() for _ in range(ranks)]
        for rank, loader in enumerate(loaders):
            if state:
                loader.load_state_dict(state)
            if kind == "skip":
                loader.skip(steps * ranks)
                continue
            for step in range(steps):
                (row,) = loader.next_step(ranks, [rank])
                expected = whole[first + step * ranks + rank]
                assert (row.tokens.tolist(), row.source) == (expected.tokens.tolist(), expected.source)
        for row in whole[first : first + steps * ranks]:
            (skipped if kind == "skip" else given_out)[row.source] += 1
        first += steps * ranks
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    for source, entry in enumerate(entries(state) if state else []):
        assert entry.rows == given_out[source] + skipped[source]
        assert entry.skipped_rows == skipped[source]
        assert entry.tokens == 10 * entry.rows
        assert entry.epoch is not None
        assert entry.rows == entry.epoch * entry.rows_of_epoch + entry.row


@settings(deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8)), max_size=5), step=st.integers(0, 40))
def test_steps_to_skip_are_those_that_follow_directly(ranges: list[tuple[int, int]], step: int) -> None:
    named = [str(first) if not more else f"{first}-{first + more}" for first, more in ranges]
    wanted = {number for first, more in ranges for number in range(first, first + more + 1)}
    expected = 0
    while step + expected + 1 in wanted:
        expected += 1
    assert skipped_after(named, step) == expected


@pytest.mark.parametrize("steps", ["0", "1-", "-3", "a", "5-3", "1,2", "01"])
def test_steps_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ValidationError, match=r"skipSteps"):
        DataSpec.model_validate({"tokenizer": "t", "train": [{"path": "p"}], "skipSteps": [steps]})


def test_short_samples_and_files_of_them_are_left_out(tmp_path: Path, write_samples: WriteSamples) -> None:
    write_samples("d/x.bin", [[1] * 4, [2] * 20, [3] * 5, [4] * 20])
    write_samples("d/y.bin", [[5] * 4] * 10)
    source = [SourceSpec(path=str(tmp_path / "d"))]
    loader = RowLoader(source, **SETTINGS, min_length=5)
    rows = loader.next_step(loader.sources[0].rows, range(loader.sources[0].rows))
    assert {token for row in rows for token in row.tokens.tolist()} <= {2, 3, 4}
    assert (len(rows), loader.sources[0].tokens) == (4, 45)
    state = loader.state_dict()
    loader.close()
    other = RowLoader(source, **SETTINGS)
    with pytest.raises(
        UserError, match=r"data\.minLength was 5 when the checkpoint was written and is 0 now"
    ):
        other.load_state_dict(state)
    other.close()
    with pytest.raises(
        UserError, match=r"has 0 tokens in samples of at least data\.minLength 21, but a row needs"
    ):
        RowLoader(source, **SETTINGS, min_length=21)


def test_a_state_of_before_the_ledger_is_gone_on_with(corpus: Path) -> None:
    loader = RowLoader([SourceSpec(path=str(corpus / "a"))], **SETTINGS)
    loader.next_step(3, [0])
    state = loader.state_dict()
    del state["minLength"]
    for source in state["sources"]:
        del source["skippedRows"], source["rowsOfEpoch"]
    (entry,) = entries(state)
    assert (entry.rows, entry.tokens, entry.epoch) == (3, 30, None)
    loader.load_state_dict(state)
    assert loader.state_dict()["sources"][0]["skippedRows"] == 0
    loader.close()
