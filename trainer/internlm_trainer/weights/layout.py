"""Where the formats keep which part of which parameter.  Pure: no I/O, no torch.

A format's tensor is a stack of slices of the trainer's parameters, one above the other; one description so serves
reading and writing, for every split over tensor- and pipeline-parallel ranks.

InternLM's own files split each parameter over the tensor-parallel ranks: rows of what multiplies into more features
(Wqkv, w1, w2, the head), columns of what multiplies back (out_proj, w3).  The rows of Wqkv are ordered (three, heads,
head_dim), so a rank's share of them is three pieces.  InternLM2 orders them (kv_heads, queries of each + 2, head_dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from internlm_trainer.config import ModelShape

Shape = tuple[int, ...]


class Slice(NamedTuple):
    """Rows [start, stop) and columns [start, stop) of a parameter; a vector has one column."""

    parameter: str
    rows: tuple[int, int]
    columns: tuple[int, int]


class Stored(NamedTuple):
    """A format's tensor: its name there, its shape, and what is stacked in it."""

    name: str
    shape: Shape
    slices: tuple[Slice, ...]


def as_matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a parameter; a vector is one column."""
    return shape[0], prod(shape[1:])


def parameters(shape: ModelShape) -> dict[str, Shape]:
    """Every parameter of the model, in the order of the forward pass, and its shape."""
    hidden, head_dim = shape.hidden_size, shape.hidden_size // shape.heads
    qkv = head_dim * (shape.heads + 2 * shape.kv_heads)
    found: dict[str, Shape] = {"embedding.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.layers):
        block = f"blocks.{layer}"
        found[f"{block}.norm1.weight"] = (hidden,)
        found[f"{block}.mixer.Wqkv.weight"] = (qkv, hidden)
        found[f"{block}.mixer.out_proj.weight"] = (hidden, hidden)
        if shape.attention_bias:
            found[f"{block}.mixer.Wqkv.bias"] = (qkv,)
            found[f"{block}.mixer.out_proj.bias"] = (hidden,)
        found[f"{block}.norm2.weight"] = (hidden,)
        found[f"{block}.mlp.w1.weight"] = (shape.ffn_size, hidden)
        found[f"{block}.mlp.w2.weight"] = (shape.ffn_size, hidden)
        found[f"{block}.mlp.w3.weight"] = (hidden, shape.ffn_size)
    return found | {"norm.weight": (hidden,), "head.weight": (shape.vocab_size, hidden)}


# Hugging Face's Llama

_LLAMA = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LLAMA_BLOCK = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "mixer.out_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.up_proj",
    "mlp.w3": "mlp.down_proj",
}


def llama(shape: ModelShape) -> list[Stored]:
    """The tensors of Hugging Face's Llama, whose names InternLM and InternLM3 have there too."""
    head_dim = shape.hidden_size // shape.heads
    found = []
    for name, size in parameters(shape).items():
        if name in _LLAMA:
            found.append(_whole(_LLAMA[name], name, size))
            continue
        _, layer, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        if part != "mixer.Wqkv":
            found.append(_whole(f"model.layers.{layer}.{_LLAMA_BLOCK[part]}.{kind}", name, size))
            continue
        start = 0
        for letter, heads in zip("qkv", (shape.heads, shape.kv_heads, shape.kv_heads), strict=True):
            stop = start + heads * head_dim
            rows = Slice(name, (start, stop), (0, as_matrix(size)[1]))
            stored = f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"
            found.append(Stored(stored, (stop - start, *size[1:]), (rows,)))
            start = stop
    return found


def _whole(stored: str, name: str, size: Shape) -> Stored:
    rows, columns = as_matrix(size)
    return Stored(stored, size, (Slice(name, (0, rows), (0, columns)),))


# InternLM's files

_INTERNLM2 = {
    "embedding": "tok_embeddings",
    "head": "output",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "mixer.Wqkv": "attention.wqkv",
    "mixer.out_proj": "attention.wo",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w3",
    "mlp.w3": "feed_forward.w2",
}
EMBEDDING = "embedding.weight"
_SPLIT_COLUMNS = ("mixer.out_proj.weight", "mlp.w3.weight")
_OUT_BIAS = "mixer.out_proj.bias"  # with the first rank alone, since the ranks' outputs are added up
_SAME_EVERYWHERE = ("norm.weight", "norm1.weight", "norm2.weight", _OUT_BIAS)


def is_internlm2(shape: ModelShape) -> bool:
    """Whether InternLM's own code would hold the model as InternLM2."""
    return shape.kv_heads != shape.heads


def stages(layers: int, pipeline: int) -> list[tuple[int, int]]:
    """Blocks [start, stop) of each pipeline stage: as even as can be, the last stages longer."""
    short, longer = layers // pipeline, layers % pipeline
    starts = [stage * short + max(0, stage - (pipeline - longer)) for stage in range(pipeline + 1)]
    return list(pairwise(starts))


class Files(NamedTuple):
    """How a folder in InternLM's format is split."""

    internlm2: bool
    tensor: int = 1
    """Tensor-parallel ranks."""
    embedding: str = "weight"
    """Name of the embedding's tensor, in InternLM's code that of its class: `weight` is split by columns,
    `word_embeddings.weight` by words."""


def internlm(shape: ModelShape, files: Files, rank: int, blocks: tuple[int, int]) -> list[Stored]:
    """The tensors of the file of a tensor-parallel rank and of the stage that has `blocks` [start, stop).

    The first stage has the embedding, the last one norm and head; blocks are counted from 0 in each stage.
    """
    found = []
    for name, size in parameters(shape).items():
        layer, part = _split_name(name)
        if layer is None:
            here = blocks[0] == 0 if part == EMBEDDING else blocks[1] == shape.layers
        else:
            here = blocks[0] <= layer < blocks[1]
        if not here or (part == _OUT_BIAS and rank > 0):
            continue
        stem, kind = part.rsplit(".", 1)
        stem = _INTERNLM2.get(stem, stem) if files.internlm2 else stem
        if layer is not None:
            stem = f"{'layers' if files.internlm2 else 'blocks'}.{layer - blocks[0]}.{stem}"
        kind = files.embedding if part == EMBEDDING else kind
        slices = tuple(_share(shape, files, rank, name, size))
        height = sum(one.rows[1] - one.rows[0] for one in slices)
        width = slices[0].columns[1] - slices[0].columns[0]
        stored = (height, width) if len(size) > 1 else (height,)
        found.append(Stored(f"model.{stem}.{kind}", stored, slices))
    return found


_MODULES = (
    "mixer.Wqkv.weight",
    "mixer.Wqkv.bias",
    "mixer.out_proj.weight",
    _OUT_BIAS,
    "norm1.weight",
    "norm2.weight",
)


def flattened(tensors: Sequence[Stored]) -> list[Stored]:
    """A file's tensors as InternLM's optimizer lays them flat: the largest first, and of one size in the order of its
    modules, in which a block's norms come after attention."""

    def in_modules(tensor: Stored) -> tuple[float, int]:
        layer, part = _split_name(tensor.name.removeprefix("model."))
        if layer is None:
            return (-1 if part.startswith("embedding") else float("inf")), 0
        return layer, _MODULES.index(part) if part in _MODULES else len(_MODULES)

    return sorted(sorted(tensors, key=in_modules), key=lambda one: -prod(one.shape))


def _split_name(name: str) -> tuple[int | None, str]:
    """`blocks.3.norm1.weight` as (3, `norm1.weight`); None for what is in no block."""
    if not name.startswith("blocks."):
        return None, name
    _, layer, part = name.split(".", 2)
    return int(layer), part


def _share(shape: ModelShape, files: Files, rank: int, name: str, size: Shape) -> Iterator[Slice]:
    """What a tensor-parallel rank has of a parameter."""
    rows, columns = as_matrix(size)
    part = _split_name(name)[1]
    by_columns = part in _SPLIT_COLUMNS or (part == EMBEDDING and files.embedding == "weight")
    if part in _SAME_EVERYWHERE:
        yield Slice(name, (0, rows), (0, columns))
    elif by_columns:
        yield Slice(name, (0, rows), _part(columns, files.tensor, rank))
    elif part.startswith("mixer.Wqkv"):
        heads = _interleaved if files.internlm2 else _three
        for one in heads(shape, files.tensor, rank):
            yield Slice(name, one, (0, columns))
    else:
        yield Slice(name, _part(rows, files.tensor, rank), (0, columns))


def _part(size: int, tensor: int, rank: int) -> tuple[int, int]:
    return size * rank // tensor, size * (rank + 1) // tensor


def _three(shape: ModelShape, tensor: int, rank: int) -> Iterator[tuple[int, int]]:
    """Rows of Wqkv that InternLM's rank has: its heads' queries, their keys, their values."""
    hidden = shape.hidden_size
    start, stop = _part(hidden, tensor, rank)
    for which in range(3):
        yield which * hidden + start, which * hidden + stop


def _interleaved(shape: ModelShape, tensor: int, rank: int) -> Iterator[tuple[int, int]]:
    """Rows of Wqkv that InternLM2's rank has: for each key head its queries, the key, the value."""
    head_dim, queries = shape.hidden_size // shape.heads, shape.heads // shape.kv_heads
    keys = shape.heads * head_dim
    values = keys + shape.kv_heads * head_dim
    for head in range(*_part(shape.kv_heads, tensor, rank)):
        yield head * queries * head_dim, (head + 1) * queries * head_dim
        yield keys + head * head_dim, keys + (head + 1) * head_dim
        yield values + head * head_dim, values + (head + 1) * head_dim


def hugging_face_internlm2(shape: ModelShape) -> list[Stored]:
    """The tensors of InternLM2 as it is released on Hugging Face, where it needs code of its own."""
    whole = internlm(shape, Files(internlm2=True), 0, (0, shape.layers))
    return [one._replace(name=one.name.replace("model.output", "output")) for one in whole]


def tensor_split_problem(shape: ModelShape, tensor: int) -> str:
    """Why the model cannot be split over so many tensor-parallel ranks, or nothing."""
    for what, size in (
        ("key and value heads", shape.kv_heads),
        ("columns of the feed-forward", shape.ffn_size),
        ("words of the vocabulary", shape.vocab_size),
        ("hidden columns", shape.hidden_size),
    ):
        if size % tensor:
            return f"{size} {what} cannot be shared equally by {tensor}"
    return ""


class Place(NamedTuple):
    """Rows of a stored tensor, from `row` on, that hold a slice of a parameter."""

    slice: Slice
    file: str
    tensor: str
    row: int


def places(stored: Mapping[str, list[Stored]]) -> dict[str, list[Place]]:
    """Where each parameter is kept, by its rows and columns; `stored` is the content of each file.

    What several files have (norms, for each tensor-parallel rank) is taken from the first.
    """
    found: dict[str, dict[Slice, Place]] = {}
    for file, tensors in stored.items():
        for tensor in tensors:
            row = 0
            for one in tensor.slices:
                found.setdefault(one.parameter, {}).setdefault(one, Place(one, file, tensor.name, row))
                row += one.rows[1] - one.rows[0]
    return {name: sorted(places.values()) for name, places in found.items()}
