"""Tokenizers: text in, the same text out, in InternLM's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_trainer.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_tokenizer
from internlm_trainer.errors import UserError

# Text with more of what tokenizers lose: spaces, newlines, SentencePiece's marks, pieces of the vocabulary.
HARD = st.text(st.sampled_from(" \n\t\r\0ab19\u2581\u00e9e\u0301\u4e2d\U0001f600<s></s><unk><eoh><0x41>"))


@pytest.fixture(scope="module")
def model_file(tokenizer_model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_model)
    return path


@settings(max_examples=500)
@given(text=st.text() | HARD)
def test_any_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(st.text() | HARD))
def test_many_texts_at_once_are_encoded_like_each(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_many(texts, threads=2) == [tokenizer.encode(text) for text in texts]


def test_source_code_comes_back_unchanged(tokenizer: Tokenizer, python_sources: list[str]) -> None:
    for source in python_sources:
        assert tokenizer.decode(tokenizer.encode(source)) == source


def test_the_layout_is_internlms(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 600
    assert (tokenizer.id_of("<unk>"), tokenizer.bos, tokenizer.eos) == (None, 1, 2)
    assert [tokenizer.id_of(f"<0x{byte:02X}>") for byte in range(256)] == list(range(3, 259))
    assert (tokenizer.id_of("<eoh>"), tokenizer.id_of("<eoa>")) == (598, 599)
    assert tokenizer.id_of("no such piece") is None


def test_the_chat_marks_are_single_pieces_and_the_sentence_marks_are_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<eoh>") == [598]
    assert tokenizer.encode("x<eoa>")[-1] == 599
    assert not {0, 1, 2} & set(tokenizer.encode("<s>text</s><unk>"))


def test_digits_are_single_and_indentation_is_not(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1999")) == 4
    assert len(tokenizer.encode("        ")) == 1


def test_without_exact_the_ids_are_sentencepieces_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\u2581b", exact=False) == tokenizer.encode("a b")
    assert tokenizer.encode_many(["a\u2581b"], exact=False) == [tokenizer.encode("a b")]
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a\u2581b"


def test_the_same_text_trains_the_same_tokenizer(python_sources: list[str], tokenizer_model: bytes) -> None:
    assert train_tokenizer(iter(python_sources), 600) == tokenizer_model


def test_text_without_newlines_and_with_nul_trains_a_tokenizer() -> None:
    model = train_tokenizer(["ab cd \0ef " * 5000], 275)
    assert Tokenizer(model).vocab_size == 275


@pytest.mark.parametrize(
    ("texts", "size", "sentence"),
    [
        (
            ["hello world\n"],
            4096,
            r"model\.vocabSize: the text is enough for a tokenizer of \d+ words, not of 4096",
        ),
        (
            ["".join(map(chr, range(0x4E00, 0x5A00)))],
            600,
            r"characters alone need 3\d\d\d words, more than 600",
        ),
        (["hello"], 260, r"a tokenizer has at least 261 words, not 260"),
        ([], 600, "there is no text to train a tokenizer on"),
        (["\0", ""], 600, "there is no text to train a tokenizer on"),
    ],
)
def test_a_text_that_trains_no_tokenizer_is_said(texts: list[str], size: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train_tokenizer(texts, size)


def test_the_size_that_the_sentence_names_works() -> None:
    with pytest.raises(UserError, match=r"to \d+ or less") as caught:
        train_tokenizer(["hello world\n" * 3], 4096)
    most = int(str(caught.value).split("vocabSize to ")[1].split()[0])
    assert Tokenizer(train_tokenizer(["hello world\n" * 3], most)).vocab_size == most


def test_a_tokenizer_is_loaded_from_a_path_or_url(model_file: Path, tokenizer: Tokenizer) -> None:
    for url in (str(model_file), f"file://{model_file}"):
        assert load_tokenizer(url).digest == tokenizer.digest


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\0" * 100, b"#!/bin/sh\n"])
def test_a_file_that_is_no_sentencepiece_model_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tokenizer: .*x\.model is (not|empty).*SentencePiece model"):
        load_tokenizer(str(path))


def test_a_model_that_is_cut_off_is_said(tmp_path: Path, tokenizer_model: bytes) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(tokenizer_model[: len(tokenizer_model) // 2])
    with pytest.raises(UserError, match=r"x\.model (is not a SentencePiece model|has no)"):
        load_tokenizer(str(path))


def test_a_tokenizer_that_is_not_there_or_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: .*none\.model does not exist"):
        load_tokenizer(str(tmp_path / "none.model"))
    with pytest.raises(UserError, match=r"is a folder; give the path of the \.model file"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_another_size_than_the_models_vocabulary_is_said(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, 600, "t.model")
    with pytest.raises(
        UserError, match=r"data\.tokenizer: t\.model has 600 words but .*vocabSize\) has 8000; set"
    ):
        check_vocabulary(tokenizer, 8000, "t.model")
