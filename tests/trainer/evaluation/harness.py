"""lm-evaluation-harness on the tasks of a folder: `python harness.py MODEL DATA OUT`.

The tasks are its own definitions and defaults; only where their data comes from is replaced.  It is a process of its
own, since it reads its settings and its cache's place from the environment when it is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from sets import SHOTS, WITH_SHOTS  # beside this file

# Each is a task of `internlm eval`, or one of its subjects.
PLACES: dict[str, tuple[str, str, dict[str, str]]] = {
    "mmlu": (
        "mmlu/default/mmlu_anatomy.yaml",
        "parquet",
        {
            "test": "mmlu/anatomy/test-00000-of-00001.parquet",
            "dev": "mmlu/anatomy/dev-00000-of-00001.parquet",
        },
    ),
    "ceval": (
        "ceval/ceval-valid_law.yaml",
        "csv",
        {"val": "ceval/val/law_val.csv", "dev": "ceval/dev/law_dev.csv"},
    ),
    "cmmlu": (
        "cmmlu/cmmlu_agronomy.yaml",
        "csv",
        {"test": "cmmlu/test/agronomy.csv", "dev": "cmmlu/dev/agronomy.csv"},
    ),
    "agieval aqua-rat": ("agieval/aqua-rat.yaml", "json", {"test": "agieval/aqua-rat.jsonl"}),
    "agieval jec-qa-kd": ("agieval/jec-qa-kd.yaml", "json", {"test": "agieval/jec-qa-kd.jsonl"}),
    "boolq": (
        "super_glue/boolq/default.yaml",
        "json",
        {"validation": "boolq/val.jsonl", "train": "boolq/train.jsonl"},
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "json",
        {"validation": "hellaswag/hellaswag_val.jsonl", "train": "hellaswag/hellaswag_train.jsonl"},
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        "json",
        {"test": "arc/ARC-Easy/test.jsonl", "train": "arc/ARC-Easy/train.jsonl"},
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        "json",
        {"test": "arc/ARC-Challenge/test.jsonl", "train": "arc/ARC-Challenge/train.jsonl"},
    ),
    "gsm8k": ("gsm8k/gsm8k.yaml", "json", {"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"}),
    "humaneval": ("humaneval/humaneval.yaml", "json", {"test": "humaneval/HumanEval.jsonl"}),
}


def definition(name: str, data: Path) -> dict[str, Any]:
    place, kind, files = PLACES[name]
    # The functions of HumanEval load a grader from the network, so what is written is compared, and not graded.
    graded = name != "humaneval"
    config = load_yaml(Path(tasks.__file__).parent / place, resolve_func=graded)
    if not graded:
        config |= {"metric_list": [{"metric": "bypass"}], "filter_list": None, "unsafe_code": False}
    files = {split: str(data / file) for split, file in files.items()}
    config |= {
        "task": name,
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(split) not in files:
            config[split] = None
    if name in WITH_SHOTS:
        config["num_fewshot"] = SHOTS
    if "generation_kwargs" in config:
        config["generation_kwargs"]["max_gen_toks"] = 24
    return dict(config)


def perplexity_task(data: Path) -> dict[str, Any]:
    return {
        "task": "text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "text.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }


def _once(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A task with several ways to grade lists its samples once for each."""
    return [one for one in samples if one["filter"] == samples[0]["filter"]]


def main(model: str, data: Path, out: Path) -> None:
    found = {}
    manager = tasks.TaskManager(include_defaults=False)
    # Once as its tokenizer does it, with <s> before each text, and once for texts in windows, where it puts it itself.
    for bos, wanted in (
        (True, [definition(name, data) for name in PLACES]),
        (False, [perplexity_task(data)]),
    ):
        lm = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=4, add_bos_token=bos)
        done = lm_eval.simple_evaluate(
            lm, tasks=wanted, task_manager=manager, bootstrap_iters=1, log_samples=True
        )
        for name, samples in done["samples"].items():
            ordered = sorted(_once(samples), key=lambda one: one["doc_id"])
            found[name] = {
                "metrics": done["results"][name],
                "prompts": [one["arguments"][0][0] for one in ordered],
                "responses": [one["resps"] for one in ordered],
            }
    out.write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
