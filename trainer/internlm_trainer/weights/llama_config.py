"""Hugging Face's `config.json` of Llama-shaped models, both ways.  Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internlm_trainer.config import ModelShape

FAMILIES = ("llama", "internlm", "internlm2", "internlm3")
# `dynamic` changes nothing up to the length that the model was trained for.
_PLAIN_ROPE = (None, "default", "dynamic")


class NotLlamaShapedError(ValueError):
    """Why the model of a `config.json` is none that is trained here."""


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes.  Raises NotLlamaShapedError."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise NotLlamaShapedError(f"is of a {family!r} model; models here are {', '.join(FAMILIES)}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        shape = ModelShape(
            layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            ffn_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_base=int(_rope(config).get("rope_theta", 10000)),
            attention_bias=_bias(config, family),
        )
    except KeyError as error:
        raise NotLlamaShapedError(f"lacks {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise NotLlamaShapedError(f"is no model's configuration: {error}") from error
    if problem := misfit(shape):
        raise NotLlamaShapedError(problem)
    if (config.get("head_dim") or hidden // heads) * heads != hidden:
        raise NotLlamaShapedError("has a head_dim other than hidden_size / num_attention_heads")
    if config.get("hidden_act", "silu") != "silu":
        raise NotLlamaShapedError(f"has the activation {config['hidden_act']}; models here have silu")
    kind = _rope(config).get("rope_type")
    if kind not in _PLAIN_ROPE:
        raise NotLlamaShapedError(f"scales the rotary embedding by {kind!r}, which models here do not")
    return shape


def misfit(shape: ModelShape) -> str:
    """Why there can be no model of this shape, or nothing."""
    if (
        min(shape.layers, shape.hidden_size, shape.heads, shape.kv_heads, shape.ffn_size, shape.vocab_size)
        < 1
    ):
        return "has a size below 1"
    if shape.hidden_size % (2 * shape.heads) or shape.heads % shape.kv_heads:
        return (
            f"has {shape.hidden_size} hidden columns, {shape.heads} heads and {shape.kv_heads} key heads, which do not "
            "divide each other"
        )
    return ""


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and kind of the rotary embedding: in `rope_parameters`, or as older versions and InternLM write it."""
    scaling = config.get("rope_scaling") or {}
    found = {"rope_type": scaling.get("rope_type", scaling.get("type"))}
    if "rotary" in config:
        found["rope_theta"] = config["rotary"].get("base", 10000)
    if "rope_theta" in config:
        found["rope_theta"] = config["rope_theta"]
    return found | (config.get("rope_parameters") or {})


def _bias(config: Mapping[str, Any], family: str) -> bool:
    if family == "internlm":
        return bool(config.get("bias", True))
    return bool(config.get("attention_bias", config.get("qkv_bias", config.get("bias", False))))


def config_of(
    shape: ModelShape, dtype: str, context: int, special: Mapping[str, int | None]
) -> dict[str, Any]:
    """`config.json` of a `LlamaForCausalLM`, which needs no code but Transformers' own, of any version.

    context: the longest sequence it was trained on.  special: ids under their names in the file.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": shape.attention_bias,
        "attention_dropout": 0.0,
        **special,
        "head_dim": shape.hidden_size // shape.heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_size,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": float(shape.rope_base),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
