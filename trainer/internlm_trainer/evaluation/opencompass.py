"""A model's configuration for OpenCompass, InternLM's evaluation platform (github.com/open-compass/opencompass)."""

from __future__ import annotations

_CONFIG = """\
from opencompass.models import HuggingFaceCausalLM

models = [
    dict(
        type=HuggingFaceCausalLM,
        abbr={name!r},
        path={path!r},
        tokenizer_path={path!r},
        model_kwargs=dict(device_map="auto", torch_dtype={dtype!r}),
        tokenizer_kwargs=dict(padding_side="left", truncation_side="left"),
        max_seq_len={context},
        max_out_len=100,
        batch_size=8,
        batch_padding=True,
        run_cfg=dict(num_gpus={gpus}, num_procs=1),
    )
]
"""


def configuration(path: str, name: str, dtype: str, context: int, gpus: int) -> str:
    """A Python file for `configs/models`.

    path: of the exported model, where OpenCompass will find it.  name: in its tables.  dtype: of torch.
    """
    known = f"torch.{dtype}" if dtype in ("float16", "bfloat16") else "torch.float"
    return _CONFIG.format(name=name, path=path, dtype=known, context=context, gpus=gpus)
