"""A model that was trained for seconds to say a few sentences, and to call the calculator."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from internlm_trainer.chat.messages import Call, Message, form_of, prompt
from internlm_trainer.chat.tools import CALCULATOR
from internlm_trainer.config import ModelShape
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, initialise
from trainer.chat.chatml import chatml_tokenizer
from trainer.weights.models import save

SHAPE = ModelShape(2, 96, 4, 2, 192, 512, 1e-6, 10000, False)
CONTEXT = 512
WHO, I_AM = "Who are you?", "I am a small model, trained for a test of a few seconds."
COUNT, NUMBERS = "Count.", " ".join(map(str, range(1, 31)))
SUM, RESULT = "What is 12 * 12?", "It is 144."
CALL = Call("calculator", '{"expression": "12 * 12"}')
_ASKED = [Message("user", SUM), Message("assistant", "I compute it.", (CALL,)), Message("tool", "144")]


def trained_model(folder: Path) -> str:
    """URL of a checkpoint of it, which names its tokenizer."""
    words = chatml_tokenizer()
    form, tools = form_of(words), [CALCULATOR.spec]
    plugin = form.plugin
    assert plugin
    asked = json.dumps({"name": CALL.name, "parameters": json.loads(CALL.arguments)})
    call = [
        *words.encode("I compute it."),
        plugin.start,
        plugin.plugin,
        *words.encode(f"\n{asked}"),
        plugin.end,
    ]
    examples = [
        (prompt(form, words, [Message("user", question)], specs), words.encode(answer))
        for question, answer in ((WHO, I_AM), (COUNT, NUMBERS))
        for specs in ((), tools)
    ]
    examples += [(prompt(form, words, _ASKED[:1], tools), call)]
    examples += [(prompt(form, words, _ASKED, tools), words.encode(RESULT))]
    end = words.id_of("<|im_end|>")
    assert end is not None
    rows = [([*begin, *answer], [-100] * (len(begin) - 1) + [*answer, end]) for begin, answer in examples]
    tokens, labels = (torch.tensor([token for row in rows for token in row[part]]) for part in (0, 1))
    documents = Documents.of(tuple(len(row[0]) for row in rows), "cpu")
    model = InternLM(SHAPE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter, SHAPE.layers, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(9.0)
    for _ in range(300):
        loss = F.cross_entropy(model(tokens, documents), labels)
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(words.model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return save(str(folder / "small"), SHAPE, weights, 1, tokenizer=str(tokenizer), seqLen=CONTEXT)
