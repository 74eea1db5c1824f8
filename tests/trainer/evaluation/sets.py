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
# Examples before each question of these tasks; the others are asked with as many as both have by default.
SHOTS = 2
WITH_SHOTS = ("mmlu", "ceval", "cmmlu", "boolq", "hellaswag", "arc_easy", "arc_challenge")


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
    for split, number in (("test", count), ("dev", 3)):
        header = ("", "Question", "A", "B", "C", "D", "Answer")
        rows = [(n, maker.han(), *(maker.words() for _ in "ABCD"), maker.letter()) for n in range(number)]
        write_csv(data / f"cmmlu/{split}/agronomy.csv", [header, *rows])
    # Some Chinese questions have several right answers.
    for subject, text, number, right in (("aqua-rat", maker.words, count, 1), ("jec-qa-kd", maker.han, 3, 2)):
        write_jsonl(
            data / f"agieval/{subject}.jsonl",
            (
                {
                    "query": text(5, 20),
                    "choices": [text() for _ in range(5)],
                    "gold": sorted({maker.index(5) for _ in range(right)}),
                }
                for _ in range(number)
            ),
        )
    for split, number in (("val", count), ("train", 7)):
        write_jsonl(
            data / f"boolq/{split}.jsonl",
            (
                {"passage": maker.words(10, 90), "question": maker.words(), "idx": n, "label": maker.index(2)}
                for n in range(number)
            ),
        )
        write_jsonl(
            data / f"hellaswag/hellaswag_{split}.jsonl",
            (
                {
                    "ind": n,
                    "activity_label": maker.words(1, 2),
                    "ctx_a": f"[header] {maker.words()} [title] {maker.words()}",
                    "ctx_b": maker.words(),
                    "endings": [f"{maker.words()}  {maker.words()} [step]" for _ in range(4)],
                    "label": str(maker.index(4)),
                }
                for n in range(number)
            ),
        )
    for split, number in (("test", count), ("train", 7)):
        for subject in ("ARC-Easy", "ARC-Challenge"):
            write_jsonl(
                data / f"arc/{subject}/{split}.jsonl",
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
    write_jsonl(
        data / "humaneval/HumanEval.jsonl",
        (
            {
                "task_id": f"HumanEval/{n}",
                "prompt": f'def f{n}(x):\n    """{maker.words()}"""\n',
                "canonical_solution": "    return x\n",
                "test": f"def check(candidate):\n    assert candidate({n}) == {n}\n",
                "entry_point": f"f{n}",
            }
            for n in range(3)
        ),
    )
    write_jsonl(data / "text.jsonl", ({"text": maker.words(1, 200)} for _ in range(count)))
