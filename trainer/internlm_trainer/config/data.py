"""`spec.data`: what the model is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from internlm_trainer.config.base import Spec

STEPS_PATTERN = "^[1-9][0-9]{0,17}(-[1-9][0-9]{0,17})?$"


def parse_steps(text: str) -> str:
    """`text` if it is a step or a range of steps; ValueError otherwise."""
    first, last = step_range(text)
    if first > last:
        raise ValueError(f"{text} ends before it begins; write the smaller step first")
    return text


def step_range(text: str) -> tuple[int, int]:
    """(first, last) of `"1-10"` or `"20"`."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def skipped_after(skip_steps: Iterable[str], step: int) -> int:
    """How many steps directly after `step` are to be skipped."""
    last = step
    for first, end in sorted(map(step_range, skip_steps)):
        if first <= last + 1 <= end:
            last = end
    return last - step


class SourceSpec(Spec):
    """A tokenized data set."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder or URL (any fsspec protocol) of `.bin` files with their `.bin.meta`, searched recursively, or one
    `.bin` file."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the rows drawn from this source, relative to the other sources' weights."""


class CacheSpec(Spec):
    """Room on each node's own disk."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder on a local disk, shared by the processes of a node and kept from one attempt to the next: an emptyDir or
    hostPath volume of `template`."""
    size_gi: Annotated[int, Field(ge=1, le=1 << 20)]
    """GiB for the blocks of remote files; the least recently used go first. The index of the samples, 32 bytes
    each, comes on top."""


class PrepareSpec(Spec):
    """Raw text to make the tokenizer and the tokenized data from, where they do not exist yet."""

    text: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=64)
    ]
    """Text files: paths or URLs with `*` and `**`. `${NAME}` stands for an environment variable;
    `${PYTHON_STDLIB}` is always known: the sources of the Python that runs the job."""
    exclude: Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=64)] = []
    """Files to leave out of `text`: patterns like those."""
    sample: Literal["file", "line"] = "file"
    """What one training sample is: a whole file, or a line of it."""
    validation_percent: Annotated[int, Field(ge=1, le=50)] = 2
    """Share of the samples held out for `data.validation`."""


class DataSpec(Spec):
    """What the model is trained on."""

    tokenizer: Annotated[str, Field(min_length=1, max_length=1024)]
    """SentencePiece model file (path or URL)."""
    prepare: PrepareSpec | None = None
    """Make the tokenizer, `train` and `validation` from raw text before training, if they are not there yet."""
    train: Annotated[list[SourceSpec], Field(min_length=1, max_length=256)]
    """Training sources, mixed by their weights."""
    validation: Annotated[list[SourceSpec], Field(max_length=64)] = []
    """Held-out sources; the loss on them is reported."""
    packing: Literal["documents", "contiguous"] = "documents"
    """`documents`: attention stays inside a document. `contiguous`: it sees the whole window of seqLen tokens."""
    min_length: Annotated[int, Field(ge=0, le=1 << 30)] = 0
    """Training samples with fewer tokens are left out, and files of which nothing is left."""
    skip_steps: Annotated[
        list[Annotated[str, Field(max_length=40, pattern=STEPS_PATTERN), AfterValidator(parse_steps)]],
        Field(max_length=256),
    ] = []
    """Steps whose rows are drawn and thrown away, without an update: `"1-10"` or `"20"`. For data that makes the
    loss jump: resume from a checkpoint before the step, and skip it."""
    cache: CacheSpec | None = None
    """Keep what is read of remote sources, and the index of all sources, on the node's own disk. Without it the index
    takes 32 bytes of each process's memory a sample."""
