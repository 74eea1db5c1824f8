"""InternLM's releases.  Pure: a table; nothing is looked up or downloaded.

From the READMEs and model cards in https://github.com/InternLM/InternLM, 2023 to 2025.
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
    """In Hugging Face's format: the one of the owner `internlm` on the hub."""
    original: str | None
    """In InternLM's format: the one of the owner `OpenLMLab` on openxlab.org.cn."""
    license: str = _OWN

    @property
    def where(self) -> str:
        """URL that `model.init.from` and `internlm import` take."""
        return f"hf://internlm/{self.repository}"


RELEASES = (
    Release("InternLM 7B", "internlm-7b", 2048, "internlm-7b", "InternLM-7b-original"),
    Release("InternLM Chat 7B", "internlm-7b", 2048, "internlm-chat-7b", "InternLM-chat-7b-original"),
    Release(
        "InternLM Chat 7B v1.1",
        "internlm-7b",
        2048,
        "internlm-chat-7b-v1_1",
        "InternLM-chat-7b-v1.1-original",
    ),
    Release(
        "InternLM Chat 7B 8K", "internlm-7b", 8192, "internlm-chat-7b-8k", "InternLM-chat-7b-8k-original"
    ),
    Release("InternLM 20B", "internlm-20b", 4096, "internlm-20b", "InternLM-20b-original"),
    Release("InternLM Chat 20B", "internlm-20b", 4096, "internlm-chat-20b", "InternLM-chat-20b-original"),
    Release("InternLM2 1.8B", "internlm2-1.8b", 32768, "internlm2-1_8b", "internlm2-base-1.8b-original"),
    Release(
        "InternLM2 Chat 1.8B SFT",
        "internlm2-1.8b",
        32768,
        "internlm2-chat-1_8b-sft",
        "internlm2-chat-1.8b-sft-original",
    ),
    Release(
        "InternLM2 Chat 1.8B", "internlm2-1.8b", 32768, "internlm2-chat-1_8b", "internlm2-chat-1.8b-original"
    ),
    Release("InternLM2 Base 7B", "internlm2-7b", 32768, "internlm2-base-7b", "internlm2-base-7b-original"),
    Release("InternLM2 7B", "internlm2-7b", 32768, "internlm2-7b", "internlm2-7b-original"),
    Release(
        "InternLM2 Chat 7B SFT",
        "internlm2-7b",
        32768,
        "internlm2-chat-7b-sft",
        "internlm2-chat-7b-sft-original",
    ),
    Release("InternLM2 Chat 7B", "internlm2-7b", 32768, "internlm2-chat-7b", "internlm2-chat-7b-original"),
    Release(
        "InternLM2 Base 20B", "internlm2-20b", 32768, "internlm2-base-20b", "internlm2-base-20b-original"
    ),
    Release("InternLM2 20B", "internlm2-20b", 32768, "internlm2-20b", "internlm2-20b-original"),
    Release(
        "InternLM2 Chat 20B SFT",
        "internlm2-20b",
        32768,
        "internlm2-chat-20b-sft",
        "internlm2-chat-20b-sft-original",
    ),
    Release(
        "InternLM2 Chat 20B", "internlm2-20b", 32768, "internlm2-chat-20b", "internlm2-chat-20b-original"
    ),
    Release("InternLM2.5 1.8B", "internlm2-1.8b", 32768, "internlm2_5-1_8b", "internlm2_5-1_8b-original"),
    Release(
        "InternLM2.5 1.8B Chat",
        "internlm2-1.8b",
        32768,
        "internlm2_5-1_8b-chat",
        "internlm2_5-1_8b-chat-original",
    ),
    Release("InternLM2.5 7B", "internlm2-7b", 32768, "internlm2_5-7b", "internlm2_5-7b-original"),
    Release(
        "InternLM2.5 7B Chat", "internlm2-7b", 32768, "internlm2_5-7b-chat", "internlm2_5-7b-chat-original"
    ),
    Release("InternLM2.5 20B", "internlm2-20b", 32768, "internlm2_5-20b", "internlm2_5-20b-original"),
    Release(
        "InternLM2.5 20B Chat",
        "internlm2-20b",
        32768,
        "internlm2_5-20b-chat",
        "internlm2_5-20b-chat-original",
    ),
    Release("InternLM3 8B Instruct", "internlm3-8b", 32768, "internlm3-8b-instruct", None, _APACHE),
)


def parameter_count(preset: Preset) -> int:
    """Parameters of a preset's model."""
    return sum(map(prod, parameters(PRESETS[preset]).values()))
