"""The same training with Hugging Face's Llama in plain PyTorch: no code of ours in model, optimizer, schedule or loop.

What it shares with the job is what is not compared: the rows (read by the job's loader), the initial weights, and under
which names Hugging Face has them.
There are two common ways of training in bf16, and this is either: fp32 weights under autocast, as the Hugging Face
Trainer has it with `bf16=True`, whose residual stream stays fp32; or bf16 weights with a master copy in fp32.

    python benchmarks/loss_curve/reference.py JOB.yaml OUT.csv [--weights fp32|bf16]
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_operator.manifest import load_manifests, parse_job
from internlm_trainer import config
from internlm_trainer.data.loader import RowLoader, validation_rows
from internlm_trainer.data.packing import Row
from internlm_trainer.model.internlm import InternLM, initialise, parameter_generator
from internlm_trainer.weights import layout
from internlm_trainer.weights.llama_config import config_of


def llama(shape: config.ModelShape, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """Hugging Face's model of this shape, with the weights of our model's `state_dict`, and where these are."""
    settings = LlamaConfig.from_dict(config_of(shape, "float32", 2048, {}) | {"use_cache": False})
    settings._attn_implementation = "sdpa"
    model = LlamaForCausalLM(settings).to(weights["norm.weight"].device)
    model.load_state_dict(
        {
            one.name: torch.cat([weights[part.parameter][slice(*part.rows)] for part in one.slices])
            for one in layout.llama(shape)
        }
    )
    return model


def initial_weights(shape: config.ModelShape, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Those that a job draws from its seed."""
    with torch.device("meta"):
        ours = InternLM(shape)
    ours.to_empty(device=device)
    for name, parameter in ours.named_parameters():
        initialise(name, parameter.data, shape.layers, parameter_generator(name, seed, parameter))
    return ours.state_dict()


def learning_rate(step: int, training: config.TrainingSpec) -> float:
    """Linear warm-up to the peak, then cosine to `minLr`; step 0 is the first."""
    peak, low, warmup = training.optimizer.lr, training.schedule.min_lr, training.schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    assert training.steps
    done = (step - warmup) / max(1, training.steps - 1 - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    """Train, and write (step, loss) of every step and (step, validation loss) of the evaluations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--weights", default="fp32", choices=("fp32", "bf16"), help="of a bf16 job's forward pass"
    )
    arguments = parser.parse_args()
    spec = parse_job(load_manifests(arguments.job)[0]).spec
    training, shape = spec.training, config.model_shape(spec.model)
    assert spec.data.packing == "contiguous"
    assert training.steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = training.precision == "bf16" and arguments.weights == "fp32"
    model = llama(shape, initial_weights(shape, training.seed, device))
    masters = [p.detach().clone() for p in model.parameters()] if arguments.weights == "bf16" else []
    if masters:
        model.bfloat16()
    updated = masters or list(model.parameters())
    decayed = [p for p in updated if p.dim() > 1]
    other = [p for p in updated if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": training.optimizer.weight_decay},
            {"params": other, "weight_decay": 0.0},
        ],
        betas=(training.optimizer.betas[0], training.optimizer.betas[1]),
        eps=training.optimizer.eps,
        fused=True,
    )
    rows = {
        "row_tokens": config.row_tokens(spec),
        "seq_len": spec.model.seq_len,
        "packing": spec.data.packing,
        "seed": training.seed,
        "vocab_size": shape.vocab_size,
    }
    loader = RowLoader(spec.data.train, **rows)
    held_out = validation_rows(spec.data.validation, **rows, count=training.validation_rows)

    def loss_of(row: Row) -> tuple[Tensor, int]:
        tokens = torch.from_numpy(row.tokens).view(-1, spec.model.seq_len).to(device)
        labels = torch.from_numpy(row.labels).to(device)
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            logits = model(tokens).logits
        total = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        return total, int((row.labels != -100).sum())

    count, began = config.gradient_accumulation(spec, 1), time.monotonic()
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss", "validation_loss"))
        # Since the last evaluation; read only there, so that no step waits for its loss.
        losses: list[Tensor] = []
        for step in range(1, training.steps + 1):
            batch = loader.next_step(count, range(count))
            labels = sum(int((row.labels != -100).sum()) for row in batch)
            total = torch.zeros((), device=device)
            for row in batch:
                loss = loss_of(row)[0] / labels
                loss.backward()
                total += loss.detach()
                for master, parameter in zip(masters, model.parameters(), strict=bool(masters)):
                    gradient = parameter.grad.float()
                    master.grad = gradient if master.grad is None else master.grad + gradient
                    parameter.grad = None
            torch.nn.utils.clip_grad_norm_(updated, training.optimizer.clip_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, training)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for master, parameter in zip(masters, model.parameters(), strict=bool(masters)):
                    parameter.copy_(master)
            losses.append(total)
            every = training.validate_every_steps
            if step < training.steps and (not every or step % every):
                continue
            with torch.no_grad():
                sums = [loss_of(row) for row in held_out]
            validation = float(sum(s for s, _ in sums)) / max(1, sum(n for _, n in sums))
            values = torch.stack(losses).tolist()
            for index, value in enumerate(values, step - len(values) + 1):
                writer.writerow((index, f"{value:.5f}", f"{validation:.4f}" if index == step else ""))
            file.flush()
            losses.clear()
            speed = step * count * rows["row_tokens"] / (time.monotonic() - began)
            print(
                f"step {step}  loss {values[-1]:.4f}  validation {validation:.4f}  {speed:,.0f} tokens/s",
                flush=True,
            )
    loader.close()


if __name__ == "__main__":
    main()
