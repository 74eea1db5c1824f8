"""A SentencePiece tokenizer as Hugging Face's `tokenizers` reads it, with InternLM's prompt as chat template.

`tokenizer.json` needs no code but the `tokenizers` library's own, and gives the ids that the model was trained on: a
byte-pair merge is a word of the vocabulary and the two words that it is made of, in the order of the words' scores.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from internlm_trainer.data.tokenizer import CHAT_PIECES, END_PIECES, Tokenizer
from internlm_trainer.errors import UserError

_SPACE = "\u2581"
_BPE = 2
_SPECIAL = (*END_PIECES, *CHAT_PIECES.values())
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Wang et al., InternLM (2023): a turn ends with <eoa>, and the open one after `<|Bot|>:`.
_INTERNLM = (
    "{% for message in messages %}"
    "{% if loop.first or (message['role'] == 'user' and loop.previtem['role'] != 'system') %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>:' + message['content'] + '<eoh>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' + message['content'] + '<eoa>\\n' }}"
    "{% elif message['role'] == 'system' %}{{ '<|System|>:' + message['content'] + '\\n' }}"
    "{% else %}{{ raise_exception('the roles of this model are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)
# InternLM2 and later, as many others: ChatML; tools and calls of them as InternLM2's chat_format.md has them.
_CHATML = (
    "{% macro turn(role, content) %}{{ '<|im_start|>' + role + '\\n' + content + '<|im_end|>\\n' }}{% endmacro %}"
    "{% macro offered() %}{% if tools %}{{ '<|im_start|>system name=<|plugin|>\\n[' }}"
    "{% for tool in tools %}{{ tool.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}"
    "{{ ']<|im_end|>\\n' }}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ offered() }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ turn('environment name=<|plugin|>', message['content']) }}"
    "{% elif message.tool_calls %}{{ '<|im_start|>assistant\\n' + (message['content'] or '') }}"
    "{% for call in message.tool_calls %}{{ '<|action_start|><|plugin|>\\n' }}"
    """{{ '{"name": ' + call.function.name | tojson + ', "parameters": ' }}"""
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{ '}<|action_end|>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ turn(message['role'], message['content']) }}{% endif %}"
    "{% if loop.first and message['role'] == 'system' %}{{ offered() }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Piece(NamedTuple):
    """A word of the vocabulary."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What a `.model` file says."""

    pieces: list[Piece]
    kind: int
    normalizer: str
    dummy_prefix: bool
    """Whether a space is put before the text."""
    removes_spaces: bool


def parse(model: bytes) -> Model:
    """A `.model` file: a protocol buffer of `sentencepiece_model.proto`."""
    pieces, kind = list[Piece](), 1
    normal: dict[int, Any] = {1: b"", 3: 1, 4: 1}
    for number, content in _fields(model):
        if number == 1:
            found = dict(_fields(content))
            score = struct.unpack("<f", found.get(2, bytes(4)))[0]
            piece = Piece(found[1].decode(), score, found.get(3, _NORMAL))
            if shown := CHAT_PIECES.get(piece.text):
                piece = Piece(shown, score, _USER_DEFINED)
            pieces.append(piece)
        elif number == 2:
            kind = dict(_fields(content)).get(3, kind)
        elif number == 3:
            normal |= dict(_fields(content))
    return Model(pieces, kind, normal[1].decode(), bool(normal[3]), bool(normal[4]))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and content of each field of a protocol buffer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(key & 7)
        if length is None:
            length, at = _varint(data, at)
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    continued = len(list(takewhile(lambda byte: byte > 127, data[at : at + 10])))
    digits = data[at : at + continued + 1]
    return sum((byte & 127) << (7 * place) for place, byte in enumerate(digits)), at + continued + 1


def tokenizer_files(tokenizer: Tokenizer, context: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files that a model's folder has for its tokenizer.

    Raises UserError for a tokenizer that is no byte-pair encoding of unchanged text.
    """
    model = parse(tokenizer.model)
    if model.kind != _BPE or model.normalizer != "identity" or model.removes_spaces:
        raise UserError(
            f"{tokenizer.name} is no byte-pair encoding of unchanged text, for which alone a tokenizer.json can be "
            "made; give --tokenizer none, and copy the tokenizer's own files into the folder"
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": model.pieces[tokenizer.bos].text,
        "eos_token": model.pieces[tokenizer.eos].text,
        "unk_token": _unknown(model),
        "pad_token": model.pieces[tokenizer.eos].text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        # Transformers 4 adds token types, which Llama refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if template := chat_template(tokenizer):
        config["chat_template"] = template
    yield "tokenizer.model", tokenizer.model
    yield "tokenizer.json", json.dumps(tokenizer_json(model, tokenizer.bos), ensure_ascii=False).encode()
    yield "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The prompt that the vocabulary is made for, as a Jinja template."""
    if tokenizer.id_of("<eoh>") and tokenizer.id_of("<eoa>"):
        return _INTERNLM
    return _CHATML if tokenizer.id_of("<|im_start|>") and tokenizer.id_of("<|im_end|>") else None


def generation_config(tokenizer: Tokenizer | None, context: int) -> dict[str, Any]:
    """How InternLM's own chat samples, and what ends an answer: any limit that a caller gives goes before this one."""
    bos, stops = (tokenizer.bos, [tokenizer.eos]) if tokenizer else (1, [2])
    pad = stops[0]
    for piece in ("<eoa>", "<|im_end|>"):
        if tokenizer and (stop := tokenizer.id_of(piece)):
            stops.append(stop)
    return {
        "bos_token_id": bos,
        "eos_token_id": stops,
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.8,
        "max_length": context,
    }


def _unknown(model: Model) -> str | None:
    return next((piece.text for piece in model.pieces if piece.kind == _UNKNOWN), None)


def tokenizer_json(model: Model, bos: int) -> dict[str, Any]:
    """The content of `tokenizer.json`; `bos` goes before every text, as in training."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    restored = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    normalizers: list[dict[str, Any]] = [replaced]
    decoders: list[dict[str, Any]] = [restored, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    begin = {"SpecialToken": {"id": model.pieces[bos].text, "type_id": 0}}
    text, pair = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.kind != _USER_DEFINED or piece.text in _SPECIAL,
            }
            for number, piece in enumerate(model.pieces)
            if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, begin, pair],
            "special_tokens": {
                model.pieces[bos].text: {
                    "id": model.pieces[bos].text,
                    "ids": [bos],
                    "tokens": [model.pieces[bos].text],
                }
            },
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _unknown(model),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
            "merges": [list(pair) for pair in merges(model)],
        },
    }


def merges(model: Model) -> list[tuple[str, str]]:
    """All pairs of words that make a word, the best words first and of the same word the longest left part."""
    ids = {piece.text: number for number, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    found = []
    for text, number in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-model.pieces[number].score, number, -cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]
