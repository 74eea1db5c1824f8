"""Opening a folder of weights, whichever of the known formats it is in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.format import parse_step
from internlm_trainer.checkpoint.tools import locate, open_one
from internlm_trainer.config import ModelShape
from internlm_trainer.errors import UserError
from internlm_trainer.weights.files import TensorAt, load_pickle, read, refusal, tensors
from internlm_trainer.weights.hub import HUB, download
from internlm_trainer.weights.layout import (
    Files,
    Stored,
    hugging_face_internlm2,
    internlm,
    llama,
)
from internlm_trainer.weights.llama_config import NotLlamaShapedError, misfit, shape_of
from internlm_trainer.weights.source import CheckpointWeights, StoredWeights, Weights

CONFIG, MODEL_CONFIG = "config.json", "model_config.pt"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_MODEL_FILE = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
Tables = dict[str, dict[str, TensorAt]]


def open_weights(url: str, what: str, shape: ModelShape | None = None) -> Weights:
    """The weights in a folder (path or URL): Hugging Face's format, InternLM's, or a checkpoint.

    what: the field or thing that they are for, with which sentences begin.  shape: what a folder in InternLM's format
    without `model_config.pt` is taken to hold.  Reads headers, not the weights; `hf://` is downloaded first.  Raises
    UserError for a folder in none of the formats and for anything that is missing, differs or could run code;
    StorageUnavailable, BadCheckpoint.
    """
    if url.startswith(HUB):
        weights = open_weights(download(url, what), what, shape)
        weights.url = url
        return weights
    folder = Folder(url, what=what)
    names = folder.names()
    if CONFIG in names:
        return _hugging_face(folder, names)
    if any(map(_MODEL_FILE.fullmatch, names)):
        return _internlm(folder, names, shape)
    if locate(url)[1] is not None or any(parse_step(name) is not None for name in names):
        return CheckpointWeights(open_one(url))
    raise UserError(
        f"{what}: {url} holds no weights: a folder has {CONFIG} (Hugging Face), model_tp0_pp0.pt (InternLM) or "
        "checkpoints of a job"
    )


def _hugging_face(folder: Folder, names: Mapping[str, Any]) -> StoredWeights:
    config = _json(folder, CONFIG)
    try:
        shape = shape_of(config)
    except NotLlamaShapedError as error:
        raise refusal(folder, CONFIG, str(error)) from error
    index = next((one for one in _INDICES if one in names), None)
    single = [one for one in _SINGLE if one in names]
    if index:
        listed = _json(folder, index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise refusal(folder, index, "lists no tensors; copy it again")
        files = sorted(set(map(str, listed.values())))
    elif single:
        files = single[:1]
    else:
        raise UserError(
            f"{folder.what}: {folder.url} has {CONFIG} but no weights: {' or '.join(_SINGLE + _INDICES)} is missing"
        )
    tables = {file: tensors(folder, file) for file in files}
    expected = hugging_face_internlm2(shape) if config["model_type"] == "internlm2" else llama(shape)
    where = {name: file for file, table in tables.items() for name in table}
    stored: dict[str, list[Stored]] = {file: [] for file in files}
    embedding = next(one for one in expected if one.slices[0].parameter == "embedding.weight")
    for one in expected:
        tied = config.get("tie_word_embeddings") and one.slices[0].parameter == "head.weight"
        name = embedding.name if tied and one.name not in where else one.name
        if name not in where:
            raise UserError(
                f"{folder.what}: {folder.url} lacks {name}, in all of {', '.join(files)}; copy it again, whole"
            )
        stored[where[name]].append(one._replace(name=name))
    return StoredWeights(folder, shape, stored, tables, config.get("max_position_embeddings"))


def _internlm(folder: Folder, names: Mapping[str, Any], known: ModelShape | None) -> StoredWeights:
    ranks = [(int(found[1]), int(found[2])) for found in map(_MODEL_FILE.fullmatch, names) if found]
    tensor, pipeline = (max(one) + 1 for one in zip(*ranks, strict=True))
    tables: Tables = {}
    for t in range(tensor):
        for p in range(pipeline):
            file = f"model_tp{t}_pp{p}.pt"
            tables[file] = {
                f"model.{name.removeprefix('model.')}": one for name, one in tensors(folder, file).items()
            }
    heights = [_blocks(tables[f"model_tp0_pp{p}.pt"]) for p in range(pipeline)]
    bounds = list(pairwise(accumulate(heights, initial=0)))
    first, last = tables["model_tp0_pp0.pt"], tables[f"model_tp0_pp{pipeline - 1}.pt"]
    internlm2 = any(".attention.wqkv." in name for name in first)
    embedding = next(
        (kind for kind in ("word_embeddings.weight", "weight") if _embedding(internlm2, kind) in first),
        "weight",
    )
    config = load_pickle(folder, MODEL_CONFIG) if MODEL_CONFIG in names else None
    if config is None and known is None:
        raise UserError(
            f"{folder.what}: {folder.url} has no {MODEL_CONFIG}, which tells the number of heads; copy it too"
        )
    if config is not None:
        known = _shape(folder, config, first, last, tensor, bounds[-1][1], internlm2)
        if pipeline > 1 and config.get("num_chunks", 1) > 1:
            raise refusal(folder, MODEL_CONFIG, "says num_chunks > 1: interleaved pipelines are not read")
    assert known
    if bounds[-1][1] != known.layers:
        raise UserError(
            f"{folder.what}: {folder.url} has {bounds[-1][1]} blocks, where the model has {known.layers}; copy it "
            "again, whole"
        )
    files = Files(internlm2, tensor, embedding)
    stored = {
        f"model_tp{t}_pp{p}.pt": internlm(known, files, t, bounds[p])
        for t in range(tensor)
        for p in range(pipeline)
    }
    return StoredWeights(folder, known, stored, tables)


def _embedding(internlm2: bool, kind: str) -> str:
    return f"model.{'tok_embeddings' if internlm2 else 'embedding'}.{kind}"


def _blocks(table: Mapping[str, TensorAt]) -> int:
    """Blocks of a stage's file."""
    found = {
        int(number[1])
        for number in (re.match(r"model\.(?:blocks|layers)\.(\d+)\.", name) for name in table)
        if number
    }
    return len(found)


def _shape(
    folder: Folder,
    config: Any,
    first: Mapping[str, TensorAt],
    last: Mapping[str, TensorAt],
    tensor: int,
    layers: int,
    internlm2: bool,
) -> ModelShape:
    """The model's shape from what `model_config.pt` says and, where that leaves room, the tensors' own."""
    block, head = ("layers.0.feed_forward", "output") if internlm2 else ("blocks.0.mlp", "head")
    if not isinstance(config, dict):
        raise refusal(folder, MODEL_CONFIG, "holds no dictionary")
    if internlm2 and not config.get("adapt_hf", True):
        raise refusal(
            folder,
            MODEL_CONFIG,
            "says adapt_hf=False: the heads' numbers are in another order; convert the weights with InternLM's "
            "convert2hf_internlm2.py first",
        )
    if config.get("norm_head"):
        raise refusal(
            folder,
            MODEL_CONFIG,
            "says norm_head=True, which models here have not; convert the weights with InternLM's "
            "convert2hf_internlm2.py first, which normalises the head for good",
        )
    try:
        heads = int(config["num_attention_heads"])
        shape = ModelShape(
            layers=layers,
            hidden_size=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_kv_attention_heads") or heads),
            ffn_size=first[f"model.{block}.w1.weight"].shape[0] * tensor,
            vocab_size=last[f"model.{head}.weight"].shape[0] * tensor,
            norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
            rope_base=int(config.get("rope_base", 10000)),
            attention_bias=any(name.endswith(".bias") for name in first),
        )
    except KeyError as error:
        raise UserError(f"{folder.what}: {folder.url} lacks {error.args[0]}; copy it again, whole") from error
    except (TypeError, ValueError) as error:
        raise refusal(folder, MODEL_CONFIG, f"is no model's configuration: {error}") from error
    if problem := misfit(shape):
        raise refusal(folder, MODEL_CONFIG, problem)
    return shape


def _json(folder: Folder, file: str) -> dict[str, Any]:
    try:
        content = json.loads(read(folder, file))
    except ValueError as error:
        raise refusal(folder, file, "is cut off or no JSON; copy it again") from error
    if not isinstance(content, dict):
        raise refusal(folder, file, "is no JSON object")
    return content
