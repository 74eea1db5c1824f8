"""What is asked: the tasks by name, and how their records become prompts, choices and answers.  Pure: no I/O.

Prompts, metrics and names are those of lm-evaluation-harness (Gao et al., doi:10.5281/zenodo.12608602), so that numbers
can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from internlm_trainer.errors import UserError
from internlm_trainer.evaluation.records import Record
from internlm_trainer.evaluation.subjects import CEVAL, CMMLU

_LETTERS = ("A", "B", "C", "D")


class Question(NamedTuple):
    """A record as it is asked."""

    prompt: str
    """Ends where the answer, after a space, begins."""
    answer: str
    """As it stands in an example."""
    choices: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    """Numbers of the right choices."""
    record: Record = MappingProxyType({})


@dataclass(frozen=True)
class Task:
    """A set of questions.

    `questions` and `examples` name the splits of its files, of which the first that is there is used.
    """

    name: str
    folder: str
    """Its place in the folder of all tasks."""
    questions: tuple[str, ...]
    ask: Callable[[Record], Question]
    examples: tuple[str, ...] = ()
    shots: int = 0
    """Examples before a question, where no number is asked for."""
    drawn: bool = False
    """Whether each question's examples are drawn at random, instead of the first ones of their split."""
    spare: int = 0
    """Examples that are drawn after those that are shown."""
    intro: Callable[[str], str] = lambda _: ""
    """What the prompts of a subject begin with."""
    subjects: str = ""
    """Pattern that the names of its subjects begin with."""

    def takes(self, subject: str) -> bool:
        return re.match(self.subjects, subject, re.IGNORECASE) is not None

    def read(self, record: Record, where: str) -> Question:
        """A record's question.  Raises UserError with its place where it is none of this task's."""
        try:
            return self.ask(record)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: is no question of {self.name}: {type(error).__name__}: {error}; it has "
                f"{', '.join(map(str, record)) or 'nothing'}"
            ) from error

    def prompt(self, subject: str, examples: list[Question], question: Question) -> str:
        """The whole text before an answer."""
        shown = [f"{one.prompt} {one.answer}\n\n" for one in examples]
        return "".join((self.intro(subject), *shown, question.prompt))


@dataclass(frozen=True)
class Writing(Task):
    """A task whose answers are written: up to one of `stop`, the likeliest word each time."""

    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    grade: Callable[[Question, str], dict[str, float]] | None = None
    """What an answer is worth, in 0 to 1."""
    program: Callable[[Question, str], str] | None = None
    """The program that ends well if the answer is right, for tasks that are graded so."""
    seconds: int = 10
    """How long it may take."""


def _choice(prompt: str, choices: tuple[str, ...], right: int) -> Question:
    return Question(prompt, choices[right], choices, (right,))


def _letter(answer: Any) -> int:
    """The number of a choice, written as its letter or as a number."""
    return _LETTERS.index(answer) if isinstance(answer, str) else range(len(_LETTERS))[answer]


def _mmlu(record: Record) -> Question:
    texts = record["choices"] if "choices" in record else [record[letter] for letter in _LETTERS]
    a, b, c, d = texts
    prompt = f"{record['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    return _choice(prompt, _LETTERS, _letter(record["answer"]))


def _chinese(record: Record) -> Question:
    found = {key.lower() if len(key) > 1 else key: value for key, value in record.items()}
    lines = (found["question"].strip(), *(f"{letter}. {found[letter]}" for letter in _LETTERS), "答案：")
    return _choice("\n".join(lines), _LETTERS, _letter(found["answer"]))


def _agieval(record: Record) -> Question:
    """Zhong et al., AGIEval, arXiv:2304.06364: its questions with choices, asked without examples."""
    if "query" in record:
        choices, right = tuple(record["choices"]), record["gold"]
        right = tuple(right) if isinstance(right, list) else (right,)
        return Question(record["query"], choices[right[0]], choices, right)
    question, options = record["question"], record["options"]
    last = chr(ord("A") + len(options) - 1)
    text, listed = f"{record.get('passage') or ''}", " ".join(options)
    if any("\u4e00" <= sign <= "\u9fff" for sign in question + listed):
        prompt = f"{text}问题：{question} 选项：{listed}\n答案：从A到{last}, 我们应选择"
    else:
        prompt = f"{text}Q: {question} Answer Choices: {listed}\nA: Among A through {last}, the answer is"
    label = record["label"]
    right = tuple(ord(letter) - ord("A") for letter in label)
    return Question(prompt, options[right[0]], tuple(options), right)


def _boolq(record: Record) -> Question:
    answer = record["label"] if "label" in record else record["answer"]
    prompt = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _choice(prompt, ("no", "yes"), int(answer))


def _hellaswag(record: Record) -> Question:
    text = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices = tuple(map(_without_brackets, record["endings"]))
    return _choice(_without_brackets(text), choices, int(record["label"]))


def _without_brackets(text: str) -> str:
    """Headings of the WikiHow part of HellaSwag are in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(record: Record) -> Question:
    question, choices = record["question"], record.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    if not isinstance(choices, Mapping):
        choices = {key: [one[key] for one in choices or ()] for key in ("text", "label")}
    right = list(choices["label"]).index(record["answerKey"])
    return _choice(f"Question: {question}\nAnswer:", tuple(choices["text"]), right)


def _gsm8k(record: Record) -> Question:
    return Question(f"Question: {record['question']}\nAnswer:", record["answer"])


_STRICT, _FLEXIBLE = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def _gsm8k_grade(question: Question, text: str) -> dict[str, float]:
    """Cobbe et al., arXiv:2110.14168: the number after `####`; flexible: the last number, whatever is before it."""
    expected = _number(question.answer)
    strict = _STRICT.findall(text)
    flexible = [next(filter(None, found)) for found in _FLEXIBLE.findall(text)]
    return {
        "exact_match": float(bool(strict) and _number(strict[0]) == expected),
        "exact_match_flexible": float(bool(flexible) and _number(flexible[-1]) == expected),
    }


def _number(text: str) -> str:
    """A number without what may be written around it."""
    for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text.strip())
    return text.lower()


def _humaneval(record: Record) -> Question:
    return Question(record["prompt"], record["canonical_solution"], record=record)


def _humaneval_program(question: Question, text: str) -> str:
    """Chen et al., arXiv:2107.03374: the function with its tests."""
    record = question.record
    return f"{record['prompt']}{text}\n{record['test']}\ncheck({record['entry_point']})\n"


def _spaced(subject: str) -> str:
    return subject.replace("_", " ")


_TASKS = (
    Task(
        "mmlu",
        "mmlu",
        ("test",),
        _mmlu,
        examples=("dev",),
        shots=5,
        intro=lambda subject: (
            f"The following are multiple choice questions (with answers) about {_spaced(subject)}.\n\n"
        ),
        subjects="(?!(all|auxiliary_train)$)",
    ),
    Task(
        "ceval",
        "ceval",
        ("validation",),
        _chinese,
        examples=("dev",),
        shots=5,
        intro=lambda subject: (
            f"以下是中国关于{CEVAL.get(subject, _spaced(subject))}的单项选择题，请选出其中的正确答案。\n\n"
        ),
    ),
    Task(
        "cmmlu",
        "cmmlu",
        ("test",),
        _chinese,
        examples=("dev",),
        shots=5,
        intro=lambda subject: (
            f"以下是关于{CMMLU.get(subject, _spaced(subject))}的单项选择题，请直接给出正确答案的选项。\n\n"
        ),
    ),
    Task(
        "agieval",
        "agieval",
        ("test", ""),
        _agieval,
        subjects="(?!(agieval-)?(math|gaokao-mathcloze)$|few_shot)",
    ),
    # Of sets without a test split the harness draws one more, to leave out the question if it is among them.
    Task("boolq", "boolq", ("validation", "dev"), _boolq, examples=("train",), drawn=True, spare=1),
    Task("hellaswag", "hellaswag", ("validation",), _hellaswag, examples=("train",), drawn=True, spare=1),
    Task("arc_easy", "arc", ("test",), _arc, examples=("train",), drawn=True, subjects="ARC-Easy$"),
    Task("arc_challenge", "arc", ("test",), _arc, examples=("train",), drawn=True, subjects="ARC-Challenge$"),
    Writing(
        "gsm8k",
        "gsm8k",
        ("test",),
        _gsm8k,
        examples=("train",),
        shots=5,
        drawn=True,
        subjects="(?!socratic)",
        stop=("Question:", "</s>", "<|im_end|>"),
        grade=_gsm8k_grade,
    ),
    Writing(
        "humaneval",
        "humaneval",
        ("test", ""),
        _humaneval,
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_tokens=1024,
        program=_humaneval_program,
    ),
    # Whoever has questions of his own writes them as AGIEval's authors do: query, choices and gold.
    Task("choices", "choices", ("test", ""), _agieval),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
