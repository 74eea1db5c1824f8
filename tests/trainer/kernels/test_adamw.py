"""AdamW in one pass equals PyTorch's, after scaling and before rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.adamw import adamw

from trainer.kernels.devices import DEVICES

adamw_ = pytest.importorskip("internlm_trainer.kernels.adamw", reason="Triton is not installed").adamw_
SIZE = 5000  # no multiple of a program's elements
RULE: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("device", DEVICES)
def test_updates_are_those_of_pytorch(device: torch.device) -> None:
    """Within fp32's last place or two a step: a product and a sum may be rounded once or twice."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, generator=random).to(device)
    first, second, rounded = (torch.zeros_like(weight) for _ in range(3))
    right, right_first, right_second, steps = (
        weight.clone(),
        first.clone(),
        second.clone(),
        torch.zeros((), device=device),
    )
    for step in range(1, 21):
        gradient = torch.randn(SIZE, generator=random).to(device)
        factor = torch.tensor(0.37, device=device)
        adamw_(
            weight,
            gradient,
            (first, second),
            rounded,
            factor,
            torch.tensor(False, device=device),
            torch.tensor(float(step), device=device),
            **RULE,
        )
        adamw(
            [right],
            [gradient * factor],
            [right_first],
            [right_second],
            [],
            [steps],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.95,
            lr=1e-2,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )
    for found, wanted in ((weight, right), (first, right_first), (second, right_second)):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(rounded, weight)


@pytest.mark.parametrize("device", DEVICES)
def test_a_skipped_update_changes_nothing(device: torch.device) -> None:
    tensors = [torch.full((SIZE,), float(number), device=device) for number in range(1, 6)]
    weight, gradient, first, second, rounded = tensors
    gradient.fill_(torch.inf)
    adamw_(
        weight,
        gradient,
        (first, second),
        rounded,
        torch.tensor(1.0, device=device),
        torch.tensor(True, device=device),
        torch.tensor(1.0, device=device),
        **RULE,
    )
    assert [float(one.unique()) for one in (weight, first, second, rounded)] == [1, 3, 4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_narrow_types_are_rounded_to_the_nearest() -> None:
    """On a GPU alone: Triton's interpreter cuts bf16 off."""
    device = torch.device("cuda")
    random = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(SIZE, generator=random).to(device) for _ in range(2))
    narrow = [torch.zeros(SIZE, dtype=torch.bfloat16, device=device) for _ in range(3)]
    wide = [torch.zeros(SIZE, device=device) for _ in range(3)]
    others = weight.clone()
    for of, values in ((weight, narrow), (others, wide)):
        adamw_(
            of,
            gradient,
            (values[0], values[1]),
            values[2],
            torch.tensor(1.0, device=device),
            torch.tensor(False, device=device),
            torch.tensor(1.0, device=device),
            **RULE,
        )
    assert torch.equal(weight, others)
    for found, exact in zip(narrow, wide, strict=True):
        assert torch.equal(found, exact.bfloat16())
