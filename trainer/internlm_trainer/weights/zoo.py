"""InternLM's releases.  Pure: a table; nothing is looked up or downloaded.

From the model cards in https://github.com/InternLM/InternLM.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from internlm_trainer.config.model import PRESETS, Preset
from internlm_trainer.weights.layout import parameters

_APACHE = "Apache-2.0"
_OWN = "InternLM's"  # free for research; commercial use is free too, on application
LICENSES = "InternLM's license: free for research, and on application for commercial use; see the model card."


class Release(NamedTuple):
    """Weights that were released."""

    name: str
    preset: Preset
    context: int
    """Tokens of the longest sequence."""
    repository: str
    license: str

    @property
    def where(self) -> str:
        """URL that `model.init.from` takes."""
        return f"hf://internlm/{self.repository}"


RELEASES = (
    Release("InternLM 7B", "internlm-7b", 2048, "internlm-7b", _OWN),
    Release("InternLM Chat 7B", "internlm-7b", 2048, "internlm-chat-7b", _OWN),
    Release("InternLM 20B", "internlm-20b", 4096, "internlm-20b", _OWN),
    Release("InternLM Chat 20B", "internlm-20b", 4096, "internlm-chat-20b", _OWN),
    Release("InternLM2 1.8B", "internlm2-1.8b", 32768, "internlm2-1_8b", _OWN),
    Release("InternLM2 Base 7B", "internlm2-7b", 32768, "internlm2-base-7b", _OWN),
    Release("InternLM2 7B", "internlm2-7b", 32768, "internlm2-7b", _OWN),
    Release("InternLM2 Chat 7B", "internlm2-7b", 32768, "internlm2-chat-7b", _OWN),
    Release("InternLM2 20B", "internlm2-20b", 32768, "internlm2-20b", _OWN),
    Release("InternLM2 Chat 20B", "internlm2-20b", 32768, "internlm2-chat-20b", _OWN),
    Release("InternLM2.5 1.8B", "internlm2-1.8b", 32768, "internlm2_5-1_8b", _OWN),
    Release("InternLM2.5 7B", "internlm2-7b", 32768, "internlm2_5-7b", _OWN),
    Release("InternLM2.5 20B", "internlm2-20b", 32768, "internlm2_5-20b", _OWN),
    Release("InternLM3 8B Instruct", "internlm3-8b", 32768, "internlm3-8b-instruct", _APACHE),
)


def parameter_count(preset: Preset) -> int:
    """Parameters of a preset's model."""
    return sum(map(prod, parameters(PRESETS[preset]).values()))
