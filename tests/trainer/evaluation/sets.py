"""Small sets of questions as their publishers lay them out."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

WORDS = Path(json.__file__).read_text().split()
HAN = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主"
    "发年动同工也能下过子说产种面而方后多定行学法所民得经"
)
# Examples before each question, by task.
SHOTS = {"mmlu": 2, "ceval": 2, "cmmlu": 0, "agieval": 0, "boolq": 0, "hellaswag": 0, "arc_challenge": 1}


class Maker:
    """Texts and choices at random, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def words(self, least: int = 1, most: int = 8) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(least, most)))

    def han(self, least: int = 2, most: int = 12) -> str:
        return "".join(self.random.choices(HAN, k=self.random.randint(least, most)))

    def letter(self) -> str:
        return self.random.choice("ABCD")

    def index(self, count: int) -> int:
        return self.random.randrange(count)


def write_jsonl(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))


def write_csv(file: Path, rows: Iterable[Sequence[object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(rows)


def write_parquet(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(records), file)


def make(data: Path, count: int = 6) -> None:
    """Every set that the harness and `internlm eval` are compared on."""
    maker = Maker(1)
    for split, number in (("test", count), ("dev", 3)):
        write_parquet(
            data / f"mmlu/anatomy/{split}-00000-of-00001.parquet",
            [
                {
                    "question": maker.words(3, 20),
                    "choices": [maker.words() for _ in "ABCD"],
                    "answer": maker.index(4),
                }
                for _ in range(number)
            ],
        )
    for split, number in (("val", count), ("dev", 3)):
        header = ("id", "question", "A", "B", "C", "D", "answer", "explanation")
        rows = [(n, maker.han(), *(maker.han() for _ in "ABCD"), maker.letter(), "") for n in range(number)]
        write_csv(data / f"ceval/{split}/law_{split}.csv", [header, *rows])
    header = ("", "Question", "A", "B", "C", "D", "Answer")
    rows = [(n, maker.han(), *(maker.words() for _ in "ABCD"), maker.letter()) for n in range(count)]
    write_csv(data / "cmmlu/test/agronomy.csv", [header, *rows])
    write_jsonl(
        data / "agieval/aqua-rat.jsonl",
        (
            {
                "query": maker.words(5, 20),
                "choices": [maker.words() for _ in range(5)],
                "gold": [maker.index(5)],
            }
            for _ in range(count)
        ),
    )
    write_jsonl(
        data / "boolq/val.jsonl",
        (
            {"passage": maker.words(10, 90), "question": maker.words(), "idx": n, "label": maker.index(2)}
            for n in range(count)
        ),
    )
    write_jsonl(
        data / "hellaswag/hellaswag_val.jsonl",
        (
            {
                "ind": n,
                "activity_label": maker.words(1, 2),
                "ctx_a": f"[header] {maker.words()} [title] {maker.words()}",
                "ctx_b": maker.words(),
                "endings": [f"{maker.words()}  {maker.words()} [step]" for _ in range(4)],
                "label": str(maker.index(4)),
            }
            for n in range(count)
        ),
    )
    for split, number in (("test", count), ("train", 3)):
        write_jsonl(
            data / f"arc/ARC-Challenge/{split}.jsonl",
            (
                {
                    "question": maker.words(3, 20),
                    "choices": {"text": [maker.words() for _ in "ABCD"], "label": ["A", "B", "C", "D"]},
                    "answerKey": maker.letter(),
                }
                for _ in range(number)
            ),
        )
        write_jsonl(
            data / f"gsm8k/{split}.jsonl",
            (
                {"question": maker.words(3, 20), "answer": f"{maker.words()}\n#### {maker.index(9):,}"}
                for _ in range(number)
            ),
        )
    write_jsonl(data / "text.jsonl", ({"text": maker.words(1, 200)} for _ in range(count)))
