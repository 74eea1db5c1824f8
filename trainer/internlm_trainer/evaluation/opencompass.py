"""A model's configuration for OpenCompass, InternLM's evaluation platform (github.com/open-compass/opencompass)."""

from __future__ import annotations

import json
from pathlib import Path

from internlm_trainer.errors import UserError

# Transformers before 5 has tokenizers of no model's class give token types, too, which a Llama does not take.
_CONFIG = """\
from opencompass.models import {type}

models = [
    dict(
        type={type},
        abbr={name!r},
        path={path!r},
        model_kwargs=dict(torch_dtype={dtype!r}),
        tokenizer_kwargs=dict(model_input_names=["input_ids", "attention_mask"]),
        max_seq_len={context},
        max_out_len={answer},
        batch_size=8,
        run_cfg=dict(num_gpus={gpus}),
    )
]
"""
# Tokens of an answer, at most: as in OpenCompass's own configurations of InternLM.
_ANSWER = 1024


def configuration(path: str, name: str, dtype: str, context: int, gpus: int, chat: bool) -> str:
    """A Python file for `opencompass/configs/models`.

    path: of the exported model, here and where OpenCompass runs.  name: in its tables.  dtype: of torch.  context: in
    tokens.  chat: ask through the chat template, instead of in plain text.  Raises UserError where there is none.
    """
    if chat and not _has_template(Path(path)):
        raise UserError(
            f"--chat: the tokenizer in {path} has no chat template; leave the option away for a base model"
        )
    known = f"torch.{dtype}" if dtype in ("float16", "bfloat16") else "torch.float"
    kind = "HuggingFacewithChatTemplate" if chat else "HuggingFaceBaseModel"
    answer = min(_ANSWER, context // 2)
    return _CONFIG.format(
        type=kind, name=name, path=path, dtype=known, context=context, answer=answer, gpus=gpus
    )


def _has_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists():  # where newer versions of Transformers write it
        return True
    try:
        return "chat_template" in json.loads((model / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
