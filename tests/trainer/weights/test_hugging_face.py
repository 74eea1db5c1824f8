"""What Transformers makes of an export: the same numbers, the same tokens, without a line of code of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.config import ModelShape
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.export import export_llama
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import CheckpointWeights
from trainer.weights.models import SHAPES, assert_equal, content, random_weights, save

TEXT = """def f(x):\n    return "a  b" + x  # caf\u00e9 \u4f60\u597d, \U0001f600 12345\n\n\n\tEnd.   """


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    sources = [Path(json.__file__).with_name(name).read_text() for name in ("decoder.py", "encoder.py")]
    return Tokenizer(train_tokenizer(sources, 512))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_transformers_opens_an_export_and_finds_the_same_logits(
    tmp_path: Path, tokenizer: Tokenizer, shape: ModelShape
) -> None:
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    out = str(tmp_path / "out")
    export_llama(weights, out, "fp32", tokenizer, 256, largest_file=300_000)
    theirs, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs) is LlamaForCausalLM
    assert not any(told.values())
    assert AutoConfig.from_pretrained(out).max_position_embeddings == 256
    model = InternLM(shape)
    model.load_state_dict(ours)
    tokens = torch.randint(0, 512, (130,), generator=torch.Generator().manual_seed(2))
    mine = model(tokens, Documents.of((130,), "cpu"))
    logits = theirs(tokens[None]).logits[0]
    assert logits.abs().max() > 1
    assert (mine - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    shape = SHAPES["InternLM2"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_llama(weights, str(tmp_path / "out"), "bf16", None, 256)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    found = open_weights(str(tmp_path / "saved"), "SOURCE")
    assert found.shape == shape
    assert_equal(content(found), ours)


def test_the_exported_tokenizer_gives_the_ids_of_training_and_the_chat_prompt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shape = SHAPES["InternLM-7B"]
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, random_weights(shape))))
    export_llama(weights, str(tmp_path / "out"), "bf16", tokenizer, 256)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in (TEXT, "", " ", "\n", "<|User|>:", Path(json.__file__).read_text()):
        expected = tokenizer.encode(text)
        assert theirs(text).input_ids == [tokenizer.bos, *expected]
        assert theirs.decode(expected) == text
    turns = [("user", "Who?"), ("assistant", "Me."), ("user", "Why?\nTell.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == ("<s><|User|>:Who?<eoh>\n<|Bot|>:Me.<eoa>\n<s><|User|>:Why?\nTell.<eoh>\n<|Bot|>:")
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    eoh, eoa, bos = tokenizer.id_of("<eoh>"), tokenizer.id_of("<eoa>"), tokenizer.bos
    expected = [bos, *tokenizer.encode("<|User|>:Who?"), eoh, *tokenizer.encode("\n<|Bot|>:Me."), eoa]
    expected += [*tokenizer.encode("\n"), bos, *tokenizer.encode("<|User|>:Why?\nTell."), eoh]
    assert ids == [*expected, *tokenizer.encode("\n<|Bot|>:")]
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.eos, eoa]
