"""The InternLM model: a pre-norm decoder with rotary embedding, SwiGLU and biased attention projections.

Parameters carry the names of InternLM's checkpoint files (`blocks.0.mixer.Wqkv.weight`).  There is no
parallelism here: `internlm_trainer.parallel` applies it from outside.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from internlm_trainer.config import LOSS_CHUNK, ModelShape
from internlm_trainer.kernels.attention import Attention, Documents, sdpa
from internlm_trainer.kernels.products import PLAIN, Products


class RMSNorm(nn.Module):
    """Zhang and Sennrich, arXiv:1910.07467: scale to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(positions: Tensor, head_dim: int, base: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 `[tokens, 1, head_dim / 2]`, of every position's angles."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / base**exponents  # spelt as Hugging Face does, for the same rounding
    angles = positions[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Su et al., arXiv:2104.09864, in the rotate-half layout: number i turns with number i + head_dim / 2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Mixer(nn.Module):
    """The projections of causal self-attention with grouped keys and values."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.hidden_size // shape.heads
        self.heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        width = self.head_dim * sum(self.heads)
        self.Wqkv = nn.Linear(shape.hidden_size, width, bias=shape.attention_bias)
        self.out_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=shape.attention_bias)


class SwiGLU(nn.Module):
    """Shazeer, arXiv:2002.05202: `w3(silu(w1 x) * w2 x)`."""

    def __init__(self, shape: ModelShape, products: Products) -> None:
        super().__init__()
        self.products = products
        self.w1 = nn.Linear(shape.hidden_size, shape.ffn_size, bias=False)
        self.w2 = nn.Linear(shape.hidden_size, shape.ffn_size, bias=False)
        self.w3 = nn.Linear(shape.ffn_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.products.swiglu(x, self.w1, self.w2, self.w3)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream.

    What comes before attention and what comes after have a method each: fixed shapes and no documents, so that
    each can be compiled or recomputed as a whole (`internlm_trainer.parallel` does it from outside).
    """

    def __init__(self, shape: ModelShape, attention: Attention, products: Products) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mixer = Mixer(shape)
        self.norm2 = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = SwiGLU(shape, products)
        self.attention, self.products = attention, products

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        q, k, v = self.before_attention(x, cos, sin)
        return self.after_attention(x, self.attention(q, k, v, documents))

    @property
    def multiplied(self) -> list[tuple[nn.Linear, ...]]:
        """The layers, those together that multiply the same numbers."""
        mixer, mlp = self.mixer, self.mlp
        return [(mixer.Wqkv,), (mixer.out_proj,), (mlp.w1, mlp.w2), (mlp.w3,)]

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values `[tokens, heads or kv_heads, head_dim]`."""
        mixer = self.mixer
        qkv = self.products.linear(self.norm1(x), mixer.Wqkv)
        q, k, v = torch.split(qkv.view(len(x), -1, mixer.head_dim), mixer.heads, dim=1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream with what attention found, and what the feed-forward makes of it."""
        x = x + self.products.linear(attended.flatten(1), self.mixer.out_proj)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Head(nn.Linear):
    """Logits of the next tokens, or what they lose: one module, so that its weights are there for either."""

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[tokens, vocab_size]` of `[tokens, hidden_size]`; with labels, int64 `[tokens]`, the sum of the
        losses of those that are not -100, in nats, 0-dim fp32."""
        if labels is None:
            return super().forward(states)
        # Not in fp16, whose gradients must be scaled before they are rounded.
        if states.is_cuda and states.dtype == torch.bfloat16:
            from internlm_trainer.kernels.head_loss import head_loss  # needs Triton

            return head_loss(states, self.weight, labels, LOSS_CHUNK)
        logits = super().forward(states).float()
        return F.cross_entropy(logits, labels, reduction="sum")


class InternLM(nn.Module):
    """Maps a packed row of tokens to the logits of the next ones."""

    def __init__(self, shape: ModelShape, attention: Attention = sdpa, products: Products = PLAIN) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape, attention, products) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head = Head(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        """Logits `[tokens, vocab_size]` of an int64 row `[tokens]`."""
        logits: Tensor = self.head(self.hidden(tokens, documents))
        return logits

    def loss(self, tokens: Tensor, documents: Documents, labels: Tensor) -> Tensor:
        """Sum of the losses of a row's tokens, 0-dim fp32; `labels`: the ids that follow, or -100."""
        loss: Tensor = self.head(self.hidden(tokens, documents), labels)
        return loss

    def hidden(self, tokens: Tensor, documents: Documents) -> Tensor:
        """What the head reads, `[tokens, hidden_size]`."""
        head_dim = self.shape.hidden_size // self.shape.heads
        cos, sin = rotary_tables(documents.positions, head_dim, self.shape.rope_base)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, documents)
        states: Tensor = self.norm(x)
        return states


def initialise(name: str, parameter: Tensor, layers: int, generator: torch.Generator) -> None:
    """Fill one parameter in place: norms 1, biases 0, matrices normal with deviation 0.02.

    The projections that write into the residual stream are scaled by 1/sqrt(2 layers), so that its variance
    does not grow with depth (GPT-2).
    """
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        residual = name.endswith(("out_proj.weight", "w3.weight"))
        parameter.normal_(0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02, generator=generator)


def parameter_generator(name: str, seed: int, like: Tensor) -> torch.Generator:
    """Random numbers for one parameter, on the device of `like`.

    They depend on its name and the seed alone: no layout, and no other parameter, changes the initial weights.
    """
    return torch.Generator(like.device).manual_seed(seed << 32 | zlib.crc32(name.encode()))


def decays(name: str) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return not name.endswith("bias") and "norm" not in name


def hidden_matrices(name: str, shape: ModelShape) -> tuple[int, ...]:
    """Rows of each matrix that lies in a block's 2-dim weight; none for embedding, head, norms and biases."""
    if not name.startswith("blocks.") or not decays(name):
        return ()
    head_dim = shape.hidden_size // shape.heads
    if "Wqkv" in name:
        return shape.heads * head_dim, shape.kv_heads * head_dim, shape.kv_heads * head_dim
    return (shape.ffn_size if name.endswith(("w1.weight", "w2.weight")) else shape.hidden_size,)


def parameter_count(shape: ModelShape) -> int:
    """Parameters of the model; 7.32 billion for InternLM-7B."""
    with torch.device("meta"):
        return sum(p.numel() for p in InternLM(shape).parameters())
