"""Causal attention inside the documents of a packed row, on whichever back end fits the device.

All back ends take q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` and give
`[tokens, heads, head_dim]`; token i attends to the tokens of its own document up to itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents of a packed row begin and end."""

    cu_seqlens: Tensor
    """int32 `[documents + 1]`: cumulative lengths, from 0 to the row's length, on the model's device."""
    positions: Tensor
    """int64 `[tokens]`: each token's position in its document."""
    lengths: tuple[int, ...]
    """The lengths once more, on the host: reading them from the device would stall it."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | str) -> Documents:
        host = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths])
        return cls(host.to(device), positions.to(device), lengths)


Attention = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The definition, with the whole matrix of scores in fp32: what the others must equal."""
    tokens, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.tensor(documents.lengths, device=q.device))
    index = torch.arange(tokens, device=q.device)
    visible = (document[:, None] == document) & (index[:, None] >= index)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * head_dim**-0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, over runs of equally long documents at once.

    On Hopper cuDNN serves equal lengths, faster than flash-attn 2.
    """
    if len(documents.lengths) > 1 and len(set(documents.lengths)) > 1:
        parts = [x.split(list(documents.lengths)) for x in (q, k, v)]
        return torch.cat([_sdpa_equal(*one, 1) for one in zip(parts[0], parts[1], parts[2], strict=True)])
    return _sdpa_equal(q, k, v, len(documents.lengths))


def _sdpa_equal(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    # [tokens, heads, dim] -> [documents, heads, length, dim] without a copy
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """PyTorch's own flash kernel for documents of different lengths (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = (
        x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x
        for x in (k, v)
    )
    longest = max(documents.lengths)
    ends = documents.cu_seqlens
    out = varlen_attn(q, k, v, ends, ends, longest, longest, **_causal_argument())
    assert isinstance(out, Tensor)
    return out


@cache
def _causal_argument() -> dict[str, Any]:
    """`varlen_attn` said `is_causal` up to PyTorch 2.10 and says `window_size` since."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}


def flash_attn(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The flash-attn package's kernel for documents of different lengths (CUDA, bf16 or fp16).

    Dao, FlashAttention-2, arXiv:2307.08691.
    """
    from flash_attn import flash_attn_varlen_func

    longest = max(documents.lengths)
    ends = documents.cu_seqlens
    out: Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    return out


class Choice(NamedTuple):
    """A back end and why it was chosen."""

    name: str
    attention: Attention
    reason: str


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The back end for rows of documents of different lengths."""
    if device.type != "cuda":
        return Choice("sdpa", sdpa, "no GPU: PyTorch's attention, a document at a time")
    if dtype == torch.float32:
        return Choice("sdpa", sdpa, "fp32: flash kernels take bf16 and fp16 only")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Choice("sdpa", sdpa, "flash kernels need compute capability 8.0 or newer")
    if importlib.util.find_spec("flash_attn"):
        return Choice(
            "flash_attn", _equal_or(flash_attn), "flash-attn is installed; cuDNN where lengths are equal"
        )
    return Choice(
        "torch_varlen", _equal_or(torch_varlen), "PyTorch's flash kernel; flash-attn is not installed"
    )


# Sizes that every build of flash-attn has kernels for; a build without the others reads out of bounds there.
FLASH_HEAD_DIMS = (32, 64, 96, 128, 160, 192, 224, 256)


def _equal_or(varlen: Attention) -> Attention:
    """cuDNN for equal lengths, `varlen` for others where its kernels fit."""

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        fits = q.shape[-1] in FLASH_HEAD_DIMS and len(set(documents.lengths)) > 1
        return (varlen if fits else sdpa)(q, k, v, documents)

    return attention
