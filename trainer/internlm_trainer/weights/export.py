"""Writing a model's weights for others: as Hugging Face's Llama, or in InternLM's format.

What makes a folder whole for its readers, Hugging Face's `config.json` and InternLM's `model_config.pt`, is written
last, and an export begins by looking that none is there: one that was interrupted opens nowhere.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import IO

import torch

from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.config import ModelShape
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, remove_leftovers, user_errors, write_whole
from internlm_trainer.weights.archive import Part, Progress, size, write_pt, write_safetensors
from internlm_trainer.weights.files import TYPES, Type
from internlm_trainer.weights.layout import (
    Files,
    Stored,
    internlm,
    is_internlm2,
    llama,
    parameters,
    stages,
    tensor_split_problem,
)
from internlm_trainer.weights.llama_config import config_of
from internlm_trainer.weights.optimizer_files import checkpoint_of, optimizer_content, optimizer_file
from internlm_trainer.weights.recognise import CONFIG, MODEL_CONFIG
from internlm_trainer.weights.source import Weights
from internlm_trainer.weights.tokenizer_files import generation_config, tokenizer_files

LARGEST_FILE = 5_000_000_000  # bytes, as Hugging Face's own tools cut them
WHAT = "OUT"


def total_bytes(weights: Weights, dtype: str) -> int:
    """Of the weights in a type."""
    return sum(map(prod, parameters(weights.shape).values())) * TYPES[dtype].dtype.itemsize


def export_llama(
    weights: Weights,
    out: str,
    dtype: str,
    tokenizer: Tokenizer | None,
    context: int,
    progress: Progress = lambda _: None,
    largest_file: int = LARGEST_FILE,
) -> list[str]:
    """Write a `LlamaForCausalLM` below `out` (path or URL): safetensors of at most `largest_file` bytes, tokenizer and
    configurations; the files' names.

    context: the longest sequence that the model knows.  Raises UserError for a place that cannot be written or has
    an export already, and what reading the weights does.
    """
    type = TYPES[dtype]
    parts = _parts(llama(weights.shape), type, largest_file)
    names = [
        "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    folder, origin = _Out(out, CONFIG, names), {"source": weights.url}
    for name, part in zip(names, parts, strict=True):
        with folder.file(name) as file:
            write_safetensors(file, weights, part, type, origin, progress)
    if len(parts) > 1:
        where = {one.name: name for name, part in zip(names, parts, strict=True) for one in part}
        index = {"metadata": {"total_size": size(llama(weights.shape), type)}, "weight_map": where}
        folder.json("model.safetensors.index.json", index)
    special: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    if tokenizer:
        for name, data in tokenizer_files(tokenizer, context):
            folder.bytes(name, data)
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": None}
    folder.json("generation_config.json", generation_config(tokenizer, context))
    folder.json(CONFIG, config_of(weights.shape, type.name, context, special))
    return folder.written


def export_internlm(
    weights: Weights,
    out: str,
    dtype: str,
    tensor: int,
    pipeline: int,
    progress: Progress = lambda _: None,
    *,
    optimizer: bool = False,
) -> list[str]:
    """Write InternLM's format below `out`, for so many tensor- and pipeline-parallel ranks; the files' names.

    optimizer: also the states of a checkpoint's AdamW, in fp32.  Models with grouped queries are written as InternLM2.
    Raises as `export_llama`.
    """
    shape, type = weights.shape, TYPES[dtype]
    if problem := tensor_split_problem(shape, tensor):
        raise UserError(f"--tp {tensor}: {problem}; give a divisor")
    if pipeline > shape.layers:
        raise UserError(
            f"--pp {pipeline}: the model has {shape.layers} blocks; give no more stages than that"
        )
    files = Files(is_internlm2(shape), tensor)
    plan = {
        f"model_tp{t}_pp{p}.pt": internlm(shape, files, t, blocks)
        for t in range(tensor)
        for p, blocks in enumerate(stages(shape.layers, pipeline))
    }
    checkpoint = checkpoint_of(weights) if optimizer else None
    states = {name: optimizer_file(name) for name in plan} if checkpoint else {}
    folder = _Out(out, MODEL_CONFIG, [*plan, *states.values()])
    for name, tensors in plan.items():
        with folder.file(name) as file:
            write_pt(file, {one.name: Part(weights, one) for one in tensors}, type, progress)
        if checkpoint:
            with folder.file(states[name]) as file:
                write_pt(file, optimizer_content(checkpoint, tensors), TYPES["fp32"], progress)
    config = io.BytesIO()
    torch.save(_model_config(shape, type, files), config)
    folder.bytes(MODEL_CONFIG, config.getvalue())
    return folder.written


def _model_config(shape: ModelShape, type: Type, files: Files) -> dict[str, object]:
    """InternLM's `model` dictionary."""
    config: dict[str, object] = {
        "num_chunks": 1,
        "checkpoint": False,
        "dtype": f"torch.{type.name}",
        "embed_split_hidden": True,
        "num_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "num_attention_heads": shape.heads,
        "mlp_ratio": shape.ffn_size / shape.hidden_size,
        "apply_post_layer_norm": False,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": shape.norm_eps,
        "use_flash_attn": True,
        "rope_base": shape.rope_base,
    }
    if not shape.attention_bias:
        config["no_bias"] = True
    if files.internlm2:
        config |= {"num_kv_attention_heads": shape.kv_heads, "adapt_hf": True, "norm_head": False}
    return config


def _parts(tensors: Sequence[Stored], type: Type, largest: int) -> list[list[Stored]]:
    """Tensors in order, in as few files of at most `largest` bytes as that allows; none is cut."""
    parts: list[list[Stored]] = [[]]
    for one in tensors:
        if parts[-1] and size([*parts[-1], one], type) > largest:
            parts.append([])
        parts[-1].append(one)
    return parts


class _Out:
    """The folder of an export, which has the files `names` and is whole with the file `last`."""

    def __init__(self, url: str, last: str, names: Sequence[str]) -> None:
        self.url, self.written = url, list[str]()
        there = Folder(url, what=WHAT).names().keys()
        if last in there:
            raise UserError(f"{WHAT}: {url} holds weights already ({last}); give an empty folder")
        if others := [name for name in there - set(names) if name.endswith((".safetensors", ".pt", ".bin"))]:
            raise UserError(f"{WHAT}: {url} holds other weights ({min(others)}); give an empty folder")

    @contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        """A file that appears when it is whole."""
        url = join(self.url, name)
        with user_errors(url, WHAT):
            remove_leftovers(url)
            with write_whole(url) as file:
                yield file
        self.written.append(name)

    def bytes(self, name: str, data: bytes) -> None:
        with self.file(name) as file:
            file.write(data)

    def json(self, name: str, content: object) -> None:
        self.bytes(name, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
