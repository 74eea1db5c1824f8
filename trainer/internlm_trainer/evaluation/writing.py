"""Answers that a model writes, the likeliest word each time, and what they are worth."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from internlm_trainer.chat.reading import Text
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.evaluation.likelihood import Progress
from internlm_trainer.evaluation.tasks import Question, Writing
from internlm_trainer.generate import Decoder, Request, Sampling
from internlm_trainer.sandbox import run_python

_GREEDY = Sampling(temperature=0)
# Characters of what a program prints: all that it may.
_OUTPUT = 1 << 20
# Words that end an answer, besides `</s>`.
_ENDS = ("<eoa>", "<|im_end|>")


def write(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    stop: Sequence[str],
    max_tokens: int,
    progress: Progress = lambda _: None,
) -> list[str]:
    """What follows each prompt, up to and without any of the texts `stop`, as many at a time as the decoder has rows.

    Of a prompt that leaves no room for `max_tokens` in the context, the end is read.
    """
    room = min(max_tokens, decoder.context // 2)
    ends = {tokenizer.eos, *filter(None, map(tokenizer.id_of, _ENDS))}
    waiting = list(enumerate(prompts))[::-1]
    answers = [""] * len(prompts)
    under_way: dict[int, tuple[int, Text]] = {}  # by row: the prompt's number, and how words become text
    while waiting or under_way:
        while waiting and decoder.free:
            number, prompt = waiting.pop()
            tokens = [tokenizer.bos, *tokenizer.encode(prompt)][-(decoder.context - room) :]
            row = decoder.begin(Request(tokens, frozenset(ends), room, _GREEDY))
            under_way[row] = number, Text(tokenizer)
            under_way[row][1].add(tokens[-1])  # or a space before the first word would be lost
        for made in decoder.step():
            number, text = under_way[made.row]
            answers[number] += text.add(made.token) if made.token is not None else ""
            answers[number] += text.end() if made.finish else ""
            found = [place for one in stop if (place := answers[number].find(one)) >= 0]
            if found and not made.finish:
                decoder.end(made.row)
            if found or made.finish:
                answers[number] = answers[number][: min(found, default=None)]
                del under_way[made.row]
                progress(1)
    return answers


def grade(task: Writing, question: Question, text: str, isolated: bool = True) -> dict[str, float]:
    """What an answer is worth.  Runs programs that it makes: for the caller to have been asked to.

    isolated: without network.  Raises UserError where that is not possible.
    """
    if task.program is not None:
        # A program that ends itself before its tests do does not know this.
        word = secrets.token_hex(16)
        program = f"{task.program(question, text)}\nprint({word!r})\n"
        ran = run_python(program, task.seconds, output=_OUTPUT, isolated=isolated)
        return {"pass@1": float(word in ran.output)}
    assert task.grade is not None
    return task.grade(question, text)
