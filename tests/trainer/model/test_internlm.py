"""The model and its attention equal plain references: Hugging Face's Llama, and the definition of attention."""

from __future__ import annotations

import pytest
import torch

from internlm_trainer.config import ModelShape
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, initialise, parameter_count
from loss_curve.reference import llama

SHAPES = {
    "InternLM": ModelShape(3, 96, 6, 6, 256, 300, 1e-6, 10000, True),
    "grouped queries, no bias": ModelShape(2, 64, 8, 2, 176, 300, 1e-5, 1000000, False),
}


def filled(shape: ModelShape) -> InternLM:
    """A model with every parameter random, the biases and norms too."""
    model = InternLM(shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter, shape.layers, generator)
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(3)  # so that logits and attention are far from uniform
    return model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_those_of_hugging_faces_llama(shape: ModelShape) -> None:
    """fp32, to 1e-5 of the largest logit: the order of additions differs, nothing else."""
    model = filled(shape)
    tokens = torch.randint(0, shape.vocab_size, (130,), generator=torch.Generator().manual_seed(2))
    ours = model(tokens, Documents.of((130,), "cpu"))
    theirs = llama(shape, model.state_dict()).eval()(tokens[None]).logits[0]
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = filled(SHAPES["InternLM"])
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(3))
    lengths = (17, 1, 30, 12)
    packed = model(tokens, Documents.of(lengths, "cpu")).split(list(lengths))
    for logits, document in zip(packed, tokens.split(list(lengths)), strict=True):
        alone = model(document, Documents.of((len(document),), "cpu"))
        assert (logits - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("lengths", [(64,), (16, 16, 16), (1, 40, 7, 1), (33, 2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_equals_the_definition_of_attention_forward_and_backward(
    lengths: tuple[int, ...], kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(4)

    def leaf(heads: int) -> torch.Tensor:
        return torch.randn(sum(lengths), heads, 16, generator=generator).requires_grad_()

    q, k, v = leaf(4), leaf(kv_heads), leaf(kv_heads)
    documents = Documents.of(lengths, "cpu")
    weights = torch.randn(sum(lengths), 4, 16, generator=generator)
    results = []
    for function in (attention.sdpa, attention.reference):
        out = function(q, k, v, documents)
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(512,), (256, 256), (1, 400, 70, 41), (333, 179)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (8, 2, 64)])
@pytest.mark.parametrize("name", ["sdpa", "torch_varlen", "flash_attn"])
def test_every_back_end_on_the_card_equals_the_definition(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, name: str
) -> None:
    """bf16: within 2% of the largest value; a bf16 number has 8 bits, and the gradients sum products of them."""
    if name == "flash_attn":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    generator = torch.Generator("cuda").manual_seed(5)

    def leaf(count: int) -> torch.Tensor:
        values = torch.randn(sum(lengths), count, head_dim, generator=generator, device="cuda")
        return values.bfloat16().requires_grad_()

    q, k, v = leaf(heads), leaf(kv_heads), leaf(kv_heads)
    documents = Documents.of(lengths, "cuda")
    results = []
    for function in (getattr(attention, name), attention.reference):
        out = function(q, k, v, documents)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= 0.02 * theirs.float().abs().max()


def test_the_7b_preset_has_the_released_number_of_parameters() -> None:
    shape = ModelShape(32, 4096, 32, 32, 11008, 103168, 1e-6, 10000, True)
    assert parameter_count(shape) == 7_321_948_160


def test_norms_and_biases_are_not_decayed() -> None:
    with torch.device("meta"):
        names = [name for name, _ in InternLM(SHAPES["InternLM"]).named_parameters()]
    kept = [name for name in names if not decays(name)]
    assert {name.rsplit(".", 2)[-2] for name in kept} == {"norm", "norm1", "norm2", "Wqkv", "out_proj"}
    assert all(decays(name) for name in names if name.endswith("weight") and "norm" not in name)
