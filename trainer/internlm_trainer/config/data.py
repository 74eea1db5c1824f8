"""`spec.data`: what the model is trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from internlm_trainer.config.base import Spec


class SourceSpec(Spec):
    """A tokenized data set."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder or URL (any fsspec protocol) of `.bin` files with their `.bin.meta`, searched recursively, or one
    `.bin` file."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the rows drawn from this source, relative to the other sources' weights."""


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
