"""torchtitan on random tokens with InternLM-7B's shape, as one of torchrun's processes; `beside.py` starts it.

torchtitan 0.2.2 has Llama's architecture, which is InternLM's without the biases of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torchtitan.protocols.train_spec as specs
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
from torchtitan.train import Trainer, main

WORDS = 103168


class RandomTokens(IterableDataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    def __init__(self, length: int, rank: int) -> None:
        self.length, self.rank = length, rank

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.rank)
        while True:
            tokens = torch.randint(0, WORDS, (self.length + 1,), generator=generator)
            yield {"input": tokens[:-1]}, tokens[1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


def loader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: object,  # noqa: ARG001
    job_config: Any,
) -> ParallelAwareDataloader:
    training = job_config.training
    return ParallelAwareDataloader(
        RandomTokens(training.seq_len, dp_rank),
        dp_rank,
        dp_world_size,
        batch_size=training.local_batch_size,
    )


class NoTokenizer:
    eos_id = 0


def register(depths: list[int]) -> None:
    """The model `internlm` with a flavor for each depth."""
    shape = TransformerModelArgs(
        dim=4096, n_heads=32, n_kv_heads=32, multiple_of=256, vocab_size=WORDS, rope_theta=10000
    )
    spec = replace(
        get_train_spec(),
        model_args={str(depth): replace(shape, n_layers=depth) for depth in depths},
        build_dataloader_fn=loader,
        build_tokenizer_fn=lambda _: None,
        state_dict_adapter=None,
    )
    specs.register_train_spec("internlm", spec)


register([8, 16, 32])
if __name__ == "__main__":
    main(Trainer)
