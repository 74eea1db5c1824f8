"""Where Triton kernels are tested: compiled on a GPU, else on small shapes by Triton's interpreter (../conftest.py)."""

from __future__ import annotations

import pytest
import torch

COMPILED = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")
DEVICES = [
    pytest.param(torch.device("cpu"), id="interpreted", marks=INTERPRETED),
    pytest.param(torch.device("cuda"), id="compiled", marks=COMPILED),
]
REPLACED = [
    pytest.param(torch.device("cpu"), id="cpu"),
    pytest.param(torch.device("cuda"), id="compiled", marks=COMPILED),
]
"""For kernels that have PyTorch's operations in their place on CPUs: they belong to paths that run there, too."""
