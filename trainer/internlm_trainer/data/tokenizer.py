"""SentencePiece tokenizers: loading InternLM's or another one, and training a small one.

A trained tokenizer has InternLM's layout: unk 0, `<s>` 1, `</s>` 2, the 256 bytes at 3..258, then the merges,
and `<eoh>` and `<eoa>` last.  Text goes in and comes out unchanged: no normalisation, no added or removed
spaces, and bytes for whatever the vocabulary lacks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
import xxhash
from numpy.typing import NDArray

from internlm_trainer.errors import UserError
from internlm_trainer.storage import open_fs, user_errors

BOS, EOS, FIRST_BYTE = 1, 2, 3
END_PIECES = ("<eoh>", "<eoa>")
SMALLEST_VOCABULARY = FIRST_BYTE + 256 + len(END_PIECES)

# InternLM2's model file names the words of its chat so; its tokenizers show them under these names.
CHAT_PIECES = {
    "[UNUSED_TOKEN_146]": "<|im_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_141]": "<|plugin|>",
}
_PIECES = {shown: piece for piece, shown in CHAT_PIECES.items()}

# SentencePiece writes this character for a space, so that one in the text would come back as a space.
_SPACE_MARK = "\u2581"

# The trainer handles text by the piece, and long pieces cost it more than they give.
_TRAINING_PIECE_CHARACTERS = 1000


class Tokenizer:
    """A SentencePiece model.

    `encode` and `decode` are exact inverses for models that keep whitespace and have byte pieces, as
    InternLM's and those of `train_tokenizer` do.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """`model` is the content of a `.model` file, `name` is how errors call it."""
        # An empty file parses, as a model without pieces.
        if not model:
            raise UserError(f"{name} is empty, where a SentencePiece model was expected")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name} is not a SentencePiece model; give the path of a .model file") from error
        self.name = name
        self.model = model
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise UserError(f"{name} has no <s> or no </s>; train it with both, as InternLM's has them")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark_ids = mark if all(self._model.is_byte(token) for token in mark) else None

    @property
    def digest(self) -> str:
        """Names the content of the model file."""
        return "xxh3:" + xxhash.xxh3_128_hexdigest(self.model)

    def encode(self, text: str, *, exact: bool = True) -> list[int]:
        """Ids of `text`, without bos or eos.

        SentencePiece itself turns the rare character U+2581 into a space; `exact` writes its three bytes
        instead. Without it, ids are SentencePiece's own to the last one, as InternLM's tokenizing tool wrote
        them.
        """
        if not exact or self._space_mark_ids is None or _SPACE_MARK not in text:
            ids: list[int] = self._model.encode(text)
            return ids
        first, *rest = text.split(_SPACE_MARK)
        ids = self._model.encode(first)
        for part in rest:
            ids += [*self._space_mark_ids, *self._model.encode(part)]
        return ids

    def encode_many(self, texts: Sequence[str], threads: int = 1, *, exact: bool = True) -> list[list[int]]:
        """`encode` of each text, on `threads` threads."""
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=threads)
        for index, text in enumerate(texts):
            if exact and _SPACE_MARK in text:
                encoded[index] = self.encode(text)
        return encoded

    def encode_arrays(
        self, texts: Sequence[str], threads: int = 1, *, exact: bool = True
    ) -> list[NDArray[np.int32]]:
        """`encode_many` as arrays, without a Python object for each id."""
        encoded: list[NDArray[np.int32]] = self._model.encode(
            list(texts), num_threads=threads, return_type="numpy"
        )
        for index, text in enumerate(texts):
            if exact and _SPACE_MARK in text:
                encoded[index] = np.array(self.encode(text), dtype=np.int32)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bos and eos give nothing, broken bytes the replacement character."""
        text: str = self._model.decode([int(token) for token in ids])
        return text

    def id_of(self, piece: str) -> int | None:
        """The id of `piece`, such as `<eoa>`, or None if the vocabulary lacks it."""
        for name in (piece, _PIECES.get(piece, piece)):
            token: int = self._model.piece_to_id(name)
            if token != self._model.unk_id():
                return token
        return None


def load_tokenizer(url: str, field: str = "data.tokenizer") -> Tokenizer:
    """The SentencePiece model at a path or URL.  Raises UserError if it is missing or no such model."""
    with user_errors(url, field):
        fs, path = open_fs(url)
        if fs.isdir(path):
            raise UserError(f"{field}: {url} is a folder; give the path of the .model file in it")
        model: bytes = fs.cat_file(path)
    return Tokenizer(model, f"{field}: {url}")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, url: str, field: str = "data.tokenizer") -> None:
    """Raises UserError unless the tokenizer has exactly the model's `vocab_size` words."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{field}: {url} has {tokenizer.vocab_size} words but the model's vocabulary "
            f"(spec.model.vocabSize) has {vocab_size}; set vocabSize to {tokenizer.vocab_size}, or give the "
            "tokenizer that the model was made for"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, field: str = "model.vocabSize") -> bytes:
    """A `.model` file: byte-pair encoding of `vocab_size` words trained on `texts`, the same for the same
    texts.

    Digits are split and the text is not normalised, as in InternLM's model.  Newlines and runs of spaces are
    words like others, which shortens source code.  Raises UserError if the texts are too few for that many
    words or have too many different characters.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"{field}: a tokenizer has at least {SMALLEST_VOCABULARY} words, not {vocab_size}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_pieces(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size - len(END_PIECES),
            unk_id=0,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=16 * _TRAINING_PIECE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size, field) from error
    return _with_end_pieces(model.getvalue(), vocab_size)


def _training_error(message: str, vocab_size: int, field: str) -> Exception:
    """SentencePiece's failed checks as sentences; they count without the two end pieces."""
    if found := re.search(r"Vocabulary size too high .*value <= (\d+)", message):
        most = int(found[1]) + len(END_PIECES)
        return UserError(
            f"{field}: the text is enough for a tokenizer of {most} words, not of {vocab_size}; give more "
            f"text in data.prepare.text, or set vocabSize to {most} or less"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        least = int(found[1]) + len(END_PIECES)
        return UserError(
            f"{field}: the text's different characters alone need {least} words, more than {vocab_size}; set "
            f"vocabSize above {least}"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return UserError("data.prepare.text: there is no text to train a tokenizer on")
    return RuntimeError(f"training the tokenizer failed: {message}")


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of whole lines, each with its newline."""
    for text in texts:
        # The trainer takes a NUL for the end of a piece.
        lines = re.findall(r"[^\n]*\n|[^\n]+", text.replace("\0", ""))
        piece = ""
        for line in lines:
            if piece and len(piece) + len(line) > _TRAINING_PIECE_CHARACTERS:
                yield piece
                piece = ""
            for start in range(0, len(line), _TRAINING_PIECE_CHARACTERS):
                part = line[start : start + _TRAINING_PIECE_CHARACTERS]
                if len(part) == _TRAINING_PIECE_CHARACTERS:
                    yield piece + part
                    piece = ""
                else:
                    piece += part
        if piece:
            yield piece


def _with_end_pieces(model: bytes, vocab_size: int) -> bytes:
    """`model` with `<eoh>` and `<eoa>` as its last words.

    SentencePiece would number user-defined pieces before the bytes, while InternLM has them behind all
    others.  A model file is a protocol buffer (`sentencepiece_model.proto`), and appending to one adds to its
    lists and overrides its numbers: field 1 is a piece {1: text, 2: score, 3: type, 4 = user defined}, field
    2 the trainer's settings {4: vocabulary size}.
    """
    for piece in END_PIECES:
        score_and_type = b"\x15\0\0\0\0" + b"\x18\x04"
        model += _field(1, _field(1, piece.encode()) + score_and_type)
    return model + _field(2, b"\x20" + _varint(vocab_size))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
