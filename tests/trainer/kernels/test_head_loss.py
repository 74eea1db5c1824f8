"""The head and its loss in one equals the definition, in value and in gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from internlm_trainer.config import LOSS_CHUNK
from trainer.kernels.devices import DEVICES

head_loss = pytest.importorskip(
    "internlm_trainer.kernels.head_loss", reason="Triton is not installed"
).head_loss
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of the norm: logits and slopes are rounded to the type, whose last place is 2^-8 or 2^-11 of a number."""


def draw(
    tokens: int, words: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Hidden states, weights and labels, some of which count for nothing."""
    random = torch.Generator(device).manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    labels = torch.randint(0, words, (tokens,), generator=random, device=device)
    labels[::5] = -100
    states = normal(tokens, hidden).to(dtype).requires_grad_()
    return states, (normal(words, hidden) * 3 / hidden**0.5).to(dtype).requires_grad_(), labels


def expected(states: Tensor, weight: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, ...]:
    """Loss and gradients in fp32."""
    leaves = [one.detach().float().requires_grad_() for one in (states, weight)]
    loss = F.cross_entropy(leaves[0] @ leaves[1].T, labels, reduction="sum")
    (loss * factor).backward()
    return loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [16, 37, 8192])
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_those_of_the_definition(
    device: torch.device, chunk: int, dtype: torch.dtype
) -> None:
    states, weight, labels = draw(37, 5003, 64, dtype, device)
    loss = head_loss(states, weight, labels, chunk)
    (loss * 0.3).backward()
    wanted = expected(states, weight, labels, 0.3)
    assert loss.dtype == torch.float32
    for found, right in zip((loss.detach(), states.grad, weight.grad), wanted, strict=True):
        assert found is not None
        assert (found - right).norm() <= TOLERANCE[dtype] * right.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [LOSS_CHUNK, LOSS_CHUNK + 1000])
def test_the_same_for_the_words_of_internlm(tokens: int) -> None:
    states, weight, labels = draw(tokens, 103168, 512, torch.bfloat16, torch.device("cuda"))
    loss = head_loss(states, weight, labels, LOSS_CHUNK)
    (loss * 0.3).backward()
    for found, right in zip(
        (loss.detach(), states.grad, weight.grad), expected(states, weight, labels, 0.3), strict=True
    ):
        assert found is not None
        assert (found - right).norm() <= TOLERANCE[torch.bfloat16] * right.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradients_the_loss_is_the_same_to_the_bit(device: torch.device) -> None:
    states, weight, labels = draw(20, 300, 32, torch.float16, device)
    with torch.no_grad():
        alone = head_loss(states, weight, labels, 8)
    assert not alone.requires_grad
    assert alone == head_loss(states, weight, labels, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_is_no_loss(device: torch.device) -> None:
    states, weight, labels = draw(20, 300, 32, torch.float16, device)
    with torch.no_grad():
        states[3, 4] = torch.nan
        assert head_loss(states, weight, labels, 8).isnan()
        labels[3] = -100
        assert head_loss(states, weight, labels, 8).isfinite()
