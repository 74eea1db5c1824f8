"""SwiGLU's kernels against PyTorch's operations in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from trainer.kernels.devices import REPLACED

kernels = pytest.importorskip("internlm_trainer.kernels.swiglu", reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (5, 1024), (3, 2752), (32, 11008)])
@pytest.mark.parametrize("device", REPLACED)
def test_values_gradients_and_largest_numbers(
    device: torch.device, tokens: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(size)
    joint = (3 * torch.randn(tokens, 2 * size)).to(dtype).to(device)
    slope = torch.randn(tokens, size).to(dtype).to(device)
    exact = joint.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    product = F.silu(gate) * up
    product.backward(slope.double())
    # fp32 inside, and one rounding to the type.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    for (found, largest), expected in (
        (kernels.swiglu(joint), product.detach()),
        (kernels.swiglu_backward(joint, slope), exact.grad),
    ):
        assert expected is not None
        torch.testing.assert_close(found.double(), expected, **tolerance)
        assert largest.amax() == found.abs().amax()
