"""Files are read as their publishers lay them out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from internlm_trainer.errors import UserError
from internlm_trainer.evaluation.records import find, part_of, texts
from internlm_trainer.evaluation.run import load
from internlm_trainer.evaluation.tasks import TASKS, Task
from internlm_trainer.storage import write_whole
from trainer.evaluation.sets import write_csv, write_jsonl, write_parquet


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/test/anatomy_test.csv", ("test", "anatomy")),
        ("anatomy/test-00000-of-00001.parquet", ("test", "anatomy")),
        ("formal_ceval/val/law_val.csv", ("validation", "law")),
        ("dev/agronomy.csv", ("dev", "agronomy")),
        ("data/v1_1/aqua-rat.jsonl", ("", "aqua-rat")),
        ("agieval-sat-math/data/test-00000-of-00001.parquet", ("test", "agieval-sat-math")),
        ("BoolQ/val.jsonl", ("validation", "BoolQ")),
        ("dev.jsonl", ("dev", "")),
        ("hellaswag_val.jsonl", ("validation", "hellaswag")),
        ("ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl", ("test", "ARC-Easy")),
        ("grade_school_math/data/test.jsonl", ("test", "grade_school_math")),
        ("HumanEval.jsonl.gz", ("", "HumanEval")),
        ("ARC_Corpus.txt", None),
    ],
)
def test_a_path_tells_split_and_subject(name: str, expected: tuple[str, str] | None) -> None:
    found = part_of(name)
    assert (found[:2] if found else None) == expected


def only(task: Task, data: Path, shots: int = 0) -> tuple[str, str, tuple[str, ...], tuple[int, ...]]:
    (item,) = load(task, str(data), shots, None)
    return item.subject, item.prompt, item.question.choices, item.question.right


def test_mmlu_is_the_same_from_csv_without_header_and_from_parquet(tmp_path: Path) -> None:
    question, example = ("Why?\nSo?", *"wxyz", "C"), ("How?", *"1234", "A")
    write_csv(tmp_path / "csv/mmlu/data/test/high_school_physics_test.csv", [question])
    write_csv(tmp_path / "csv/mmlu/data/dev/high_school_physics_dev.csv", [example])
    for split, (text, *choices, answer) in (("test", question), ("dev", example)):
        record = {"question": text, "choices": choices, "answer": "ABCD".index(answer)}
        write_parquet(tmp_path / f"hf/mmlu/high_school_physics/{split}-00000-of-00001.parquet", [record])
        write_parquet(tmp_path / f"hf/mmlu/all/{split}-00000-of-00001.parquet", [record])
    expected = (
        "high_school_physics",
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "How?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\nWhy?\nSo?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        ("A", "B", "C", "D"),
        (2,),
    )
    assert only(TASKS["mmlu"], tmp_path / "csv", 1) == expected
    assert only(TASKS["mmlu"], tmp_path / "hf", 1) == expected


def test_agieval_as_its_authors_publish_it(tmp_path: Path) -> None:
    english = {"passage": None, "question": "2+2?", "options": ["(A)4", "(B)5"], "label": "A", "answer": None}
    chinese = {
        "passage": "读：",
        "question": "几？",
        "options": ["(A)一", "(B)二", "(C)三"],
        "label": ["A", "C"],
    }
    write_jsonl(tmp_path / "agieval/v1_1/sat-math.jsonl", [english])
    write_jsonl(tmp_path / "agieval/v1_1/jec-qa-kd.jsonl", [chinese])
    write_jsonl(tmp_path / "agieval/v1_1/math.jsonl", [{"question": "a cloze", "answer": "4"}])
    kd, sat = load(TASKS["agieval"], str(tmp_path), None, None)
    assert sat.prompt == "Q: 2+2? Answer Choices: (A)4 (B)5\nA: Among A through B, the answer is"
    assert (sat.question.choices, sat.question.right) == (("(A)4", "(B)5"), (0,))
    assert kd.prompt == "读：问题：几？ 选项：(A)一 (B)二 (C)三\n答案：从A到C, 我们应选择"
    assert kd.question.right == (0, 2)


def test_arc_and_boolq_as_their_authors_publish_them(tmp_path: Path) -> None:
    choices = [{"text": "sun", "label": "1"}, {"text": "moon", "label": "2"}]
    record = {"question": {"stem": "What shines?", "choices": choices}, "answerKey": "1"}
    write_jsonl(tmp_path / "arc/ARC-V1/ARC-Easy/ARC-Easy-Test.jsonl", [record])
    write_csv(tmp_path / "arc/ARC-V1/ARC-Easy/ARC-Easy-Test.csv", [("questionID", "question"), ("1", "?")])
    write_jsonl(tmp_path / "arc/ARC-V1/ARC-Challenge/ARC-Challenge-Test.jsonl", [record, record])
    expected = ("ARC-Easy", "Question: What shines?\nAnswer:", ("sun", "moon"), (0,))
    assert only(TASKS["arc_easy"], tmp_path) == expected
    write_jsonl(tmp_path / "boolq/dev.jsonl", [{"passage": "P.", "question": "is it", "answer": True}])
    assert only(TASKS["boolq"], tmp_path) == ("", "P.\nQuestion: is it?\nAnswer:", ("no", "yes"), (1,))


def test_texts_are_files_or_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": "four"}\n'))
    assert texts(f"{tmp_path}/*") == ["one\n\ntwo\n", "three", "four"]


@pytest.mark.parametrize(
    ("file", "content", "task", "shots", "says"),
    [
        ("notes.txt", "x", "mmlu", 0, "holds no parquet, jsonl"),
        ("dev/law_dev.csv", "question,A,B,C,D,answer\n", "ceval", 0, "holds no validation files of ceval"),
        ("val/law_val.csv", "question,A,B,C,D,answer\n", "ceval", 0, "holds no questions"),
        ("val/law_val.csv", "question,A,B,C,D,answer\nq,1,2,3,4,A\n", "ceval", 5, "has 0 examples of law"),
        ("test.jsonl", '{"question": "q"}\n', "gsm8k", 0, "test.jsonl, record 1: is no question of gsm8k"),
        ("test.jsonl", '{"question"\n', "gsm8k", 0, "test.jsonl: cannot be read as jsonl"),
        ("test.jsonl", "[1]\n", "gsm8k", 0, "no list of objects"),
        ("test/a_test.csv", "q,1,2,3,4,A\nq,1\n", "mmlu", 0, "record 2 has 2 columns, not 6"),
        ("test/a_test.csv", "q,1,2,3,4,E\n", "mmlu", 0, "record 1: is no question of mmlu"),
        ("test-00000-of-00001.parquet", "no", "mmlu", 0, "cannot be read as parquet"),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path, file: str, content: str, task: str, shots: int, says: str
) -> None:
    path = tmp_path / task / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        load(TASKS[task], str(tmp_path), shots, None)


def test_every_store_gives_files(url: str) -> None:
    with write_whole(f"{url}/boolq/val.jsonl") as file:
        file.write(json.dumps({"passage": "P.", "question": "is it", "label": False}).encode())
    assert [file.part for file in find(f"{url}/boolq")] == [("validation", "", ".jsonl")]
    (item,) = load(TASKS["boolq"], url, None, None)
    assert item.question.right == (0,)
