"""Gradients are added and copied between types as PyTorch does it, to the bit."""

from __future__ import annotations

import pytest
import torch

from trainer.kernels.devices import DEVICES

widen = pytest.importorskip("internlm_trainer.kernels.widen", reason="Triton is not installed").widen


@pytest.mark.parametrize("size", [1, 4096, 10007])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_what_pytorch_does(device: torch.device, add: bool, source: torch.dtype, size: int) -> None:
    random = torch.Generator().manual_seed(size)
    target, gradient = (torch.randn(size, generator=random).to(device) for _ in range(2))
    gradient = gradient.to(source)
    expected = target + gradient if add else gradient.float()
    widen(target, gradient, add=add)
    assert torch.equal(target, expected)
