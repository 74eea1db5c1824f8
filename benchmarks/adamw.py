"""Time of AdamW's update by our own kernel, by PyTorch's fused one and, where it is installed, by apex's, in turn.

python benchmarks/adamw.py [--parameters 1e9] [--rounds 3]
"""

from __future__ import annotations

import argparse
import importlib.util
from statistics import median
from types import SimpleNamespace

import torch

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.optim.adamw import KINDS, AdamW
from internlm_trainer.optim.state import Part
from internlm_trainer.parallel.layout import Span

BACKENDS = ("auto", "torch", *(("apex",) if importlib.util.find_spec("amp_C") else ()))
# Weight, gradient and two moments are read, all but the gradient are written; ours also writes bf16 weights.
BYTES_A_PARAMETER = {"auto": 30, "torch": 28, "apex": 28}
UPDATES = 20


def optimizer(backend: str, parameters: int) -> AdamW:
    """AdamW with two parts, as a bucket has: most of it decays."""
    device = torch.device("cuda")
    parts = []
    for size in (parameters - parameters // 1000, parameters // 1000):
        generator = torch.Generator(device).manual_seed(size)
        bucket = SimpleNamespace(
            master=torch.randn(size, device=device, generator=generator),
            master_grad=torch.randn(size, device=device, generator=generator),
            own=torch.empty(size, device=device, dtype=torch.bfloat16),
            optimizer_span=Span(0, size),
        )
        parts.append(Part(bucket, Span(0, size), KINDS, torch.float32))  # type: ignore[arg-type]
    return AdamW(parts[:1], parts[1:], OptimizerSpec.model_validate({"backend": backend}))


def milliseconds(adamw: AdamW) -> float:
    """Median time of an update."""
    skip = torch.zeros((), dtype=torch.bool, device="cuda")
    times: list[float] = []
    for _ in range(UPDATES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        adamw.step(1e-4, 0.95, skip)
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, {arguments.parameters:.2g} parameters")
    for _ in range(arguments.rounds):
        weights = {}
        for backend in BACKENDS:
            adamw = optimizer(backend, int(arguments.parameters))
            time = milliseconds(adamw)
            rate = BYTES_A_PARAMETER[backend] * arguments.parameters / time / 1e6
            print(f"{backend:6} {time:.2f} ms an update, {rate:.0f} GB/s", flush=True)
            weights[backend] = adamw.parts[0].weight.cpu()
            del adamw
        for backend, found in weights.items():
            difference = (found - weights["torch"]).norm() / weights["torch"].norm()
            print(f"{backend}: weights after {UPDATES} updates differ from torch's by {difference:.1e}")


if __name__ == "__main__":
    main()
