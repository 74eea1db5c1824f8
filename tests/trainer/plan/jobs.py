"""Jobs to plan."""

from __future__ import annotations

from typing import Any

from internlm_trainer.config import TrainSpec


def job(model: dict[str, Any], **parts: dict[str, Any]) -> TrainSpec:
    """A job of this model; `parts` are its training and parallel settings."""
    return TrainSpec.model_validate(
        {
            "model": model,
            "data": {"tokenizer": "t", "train": [{"path": "d"}]} | parts.get("data", {}),
            "training": {"steps": 1} | parts.get("training", {}),
            "parallel": parts.get("parallel", {}),
            "checkpoint": {"path": "c"},
        }
    )


def small(
    world_size: int,
    degrees: tuple[int, int, int],
    *,
    zero: dict[str, str] | None = None,
    precision: str = "fp32",
    micro_batches: int = 1,
    tokens: int = 64,
    vocabulary: int = 300,
    recompute: str = "none",
    optimizer: dict[str, str] | None = None,
) -> TrainSpec:
    """One of four narrow layers."""
    shape = {"layers": 4, "hiddenSize": 64, "heads": 4, "kvHeads": 2, "ffnSize": 192, "vocabSize": vocabulary}
    p, g, o = degrees
    return job(
        shape | {"seqLen": tokens},
        training={
            "precision": precision,
            "globalBatchTokens": tokens * micro_batches * world_size,
            "optimizer": optimizer or {},
        },
        parallel={
            "zero": {"parameters": p, "gradients": g, "optimizer": o} | (zero or {}),
            "recompute": recompute,
        },
    )


def seven_b(micro_batch_size: int = 1, **zero: int) -> TrainSpec:
    """InternLM-7B in steps of 4 Mi tokens."""
    return job(
        {"preset": "internlm-7b"},
        training={"microBatchSize": micro_batch_size, "globalBatchTokens": "4Mi"},
        parallel={"zero": zero},
    )
