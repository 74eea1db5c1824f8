"""Products in float8: rounded as PyTorch rounds, and within what eight bits can give of those in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from internlm_trainer.kernels.products import PLAIN
from trainer.kernels.devices import REPLACED

float8 = pytest.importorskip("internlm_trainer.kernels.float8", reason="Triton is not installed")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 1000])
@pytest.mark.parametrize("columns", [16, 4096])
@pytest.mark.parametrize("device", REPLACED)
def test_numbers_are_rounded_as_pytorch_does(
    device: torch.device, columns: int, rows: int, wide: bool
) -> None:
    dtype = float8.E5M2 if wide else float8.E4M3
    x = torch.randn(rows, 2 * columns, device=device, dtype=torch.bfloat16)[:, :columns]
    largest = torch.finfo(dtype).max
    for scale in (float8.scale_of(x.abs().amax(), dtype), torch.tensor(1e-4, device=device)):
        expected = (x.float() * (1 / scale)).clamp(-largest, largest).to(dtype)
        plain, turned = float8.round_float8(x, scale, wide)
        assert torch.equal(plain.float(), expected.float())
        assert torch.equal(turned.float(), expected.float().T)


def results(products: list[Tensor], x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """What products give and their gradients."""
    slopes = torch.Generator().manual_seed(1)
    torch.autograd.backward(products, [torch.randn(p.shape, generator=slopes).to(p) for p in products])
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    found = [*products, x.grad, *(parameter.grad for parameter in parameters)]
    for tensor in (x, *parameters):
        tensor.grad = None
    return [tensor.detach() for tensor in found if tensor is not None]


def assert_close(found: list[Tensor], exact: list[Tensor]) -> None:
    """e4m3 has 3 bits of mantissa, so an error of 2^-4 at most and 0.026 in the root mean square; e5m2 twice that.
    A product of two has both, and another 0.03 for each that is a product itself."""
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).float().norm() <= 0.1 * theirs.float().norm()
        assert not torch.equal(ours, theirs) or ours.dim() == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", REPLACED)
def test_a_layer_and_its_gradients_are_those_of_bf16(device: torch.device, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(80, 48, bias, device, torch.bfloat16)
    rounded = float8.Weight(layer)
    rounded.round()
    x = torch.randn(96, 80, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert_close(results([float8.linear(x, rounded, layer)], x, layer), results([layer(x)], x, layer))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", REPLACED)
def test_a_feed_forward_and_its_gradients_are_those_of_bf16(device: torch.device, compiled: bool) -> None:
    torch.manual_seed(0)
    w1, w2 = (nn.Linear(80, 2064, False, device, torch.bfloat16) for _ in range(2))
    w3 = nn.Linear(2064, 80, False, device, torch.bfloat16)
    up, down = float8.Weight(w1, w2), float8.Weight(w3)
    up.round()
    down.round()
    x = torch.randn(96, 80, device=device, dtype=torch.bfloat16, requires_grad=True)
    ours = torch.compile(float8.feed_forward) if compiled else float8.feed_forward
    assert_close(
        results([ours(x, up, down, w1, w2, w3)], x, w1, w2, w3),
        results([PLAIN.swiglu(x, w1, w2, w3)], x, w1, w2, w3),
    )
