"""Tokens a second of generation beside Transformers' compiled generate with a static cache, on one GPU.

    python benchmarks/generation.py [--preset internlm-7b] [--rows 1] [--prompt 512] [--new 256] [--rounds 3]

Random weights in bf16, the likeliest token each time, caches of the same length.  Each of the three is warmed up by the
request that is then timed, prompt included; they take turns in one process, the order swapped from round to round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_trainer.config import ModelSpec, model_shape
from internlm_trainer.generate import Decoder, Request, Sampling
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.llama_config import config_of

Generate = Callable[[list[list[int]], int], list[list[int]]]


def ours(spec: ModelSpec, context: int, rows: int, compiled: bool, device: torch.device) -> Generate:
    """A decoder of this project."""
    with torch.device("meta"):
        model = InternLM(model_shape(spec)).to(torch.bfloat16)
    model.to_empty(device=device)
    randomise(model)
    decoder = Decoder(model.eval(), context, rows, compiled)
    greedy = Sampling(temperature=0)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        return decoder.generate([Request(prompt, frozenset(), new, greedy) for prompt in prompts])

    return generate


def transformers(spec: ModelSpec, device: torch.device) -> Generate:
    """Hugging Face's Llama of the same shape; on GPUs its generate compiles itself where the cache is static."""
    settings = LlamaConfig.from_dict(config_of(model_shape(spec), "bfloat16", spec.seq_len, {}))
    with torch.device("meta"):
        model = LlamaForCausalLM(settings).bfloat16()
    model.to_empty(device=device)
    # What a model on `meta` cannot have computed: the angles of its positions.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)
    randomise(model)
    model.eval()

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
        )
        return [row[ids.shape[1] :] for row in made.tolist()]

    return generate


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="internlm-7b")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--rows", type=int, default=1, help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=256, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {"preset": arguments.preset} | ({"layers": arguments.layers} if arguments.layers else {})
    spec = ModelSpec.model_validate(given)
    rows, new, context = arguments.rows, arguments.new, arguments.prompt + arguments.new
    contestants = {
        "transformers, static cache, compiled": transformers(spec, device),
        "internlm": ours(spec, context, rows, False, device),
        "internlm --compile": ours(spec, context, rows, True, device),
    }
    words = torch.Generator().manual_seed(0)
    vocabulary = model_shape(spec).vocab_size
    prompts = torch.randint(3, vocabulary, (rows, arguments.prompt), generator=words).tolist()
    for generate in contestants.values():
        generate(prompts, new)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(arguments.rounds):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            made = contestants[name](prompts, new)
            rates[name].append(rows * new / (time.perf_counter() - began))
            assert all(len(row) == new for row in made), name
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}: {arguments.preset}, {rows} prompts of {arguments.prompt} tokens, {new} new ones each")
    for name, found in rates.items():
        print(f"{name:40} {median(found):7.1f} tokens/s   {' '.join(f'{rate:.1f}' for rate in found)}")


if __name__ == "__main__":
    main()
