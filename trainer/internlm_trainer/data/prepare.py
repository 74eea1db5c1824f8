"""`data.prepare`: from raw text to a tokenizer and tokenized training and validation data.

Everything that is written follows from the text and the settings alone.  A run that was killed at any
point is simply repeated: files appear whole or not at all, and `prepared.json`, written last, says that
all is there.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from internlm_trainer.config import PrepareSpec, TrainSpec, model_shape
from internlm_trainer.data.bin_format import BinWriter, write_bin
from internlm_trainer.data.progress import Report, TextProgress, silent
from internlm_trainer.data.text_files import NotTextError, TextFile, find_files, samples_of
from internlm_trainer.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs, remove_leftovers, user_errors, write_whole

logger = logging.getLogger(__name__)

MARKER, BIN_NAME = "prepared.json", "text.bin"
_FORMAT = 1
# More text makes a tokenizer no better, only slower to train.
_TOKENIZER_BYTES = 64 << 20
# Text that is encoded at once: enough to keep the threads busy.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Split:
    """What was written for training or for validation."""

    url: str
    samples: int
    tokens: int


@dataclass(frozen=True)
class PreparedReport:
    """What `prepare` found or made.

    made: whether anything was written now.  unigram_entropy: nats a token of the training data, the loss of a
    model that knows how often each token occurs and nothing else.  unreadable: files that are not UTF-8.
    """

    made: bool
    tokenizer: str
    vocab_size: int
    train: Split
    validation: Split | None
    unigram_entropy: float
    unreadable: list[str] = field(default_factory=list)


def prepare(spec: TrainSpec, progress: Report = silent, threads: int = 2) -> PreparedReport:
    """Make what `spec.data.prepare` describes, unless it is there already.

    Writes `spec.data.tokenizer` if there is no such file, `text.bin` in the folders `data.train[0].path` and
    `data.validation[0].path`, and the marker beside the former.  To be run by one process of a job.  Raises
    UserError if the text is missing or too little, or if the folders hold data made in another way.
    """
    settings = spec.data.prepare
    if settings is None:
        raise ValueError("prepare() is for jobs with data.prepare")
    targets = _Targets(spec)
    wanted = _settings(spec, settings)
    with user_errors(targets.marker, "data.train[0].path"):
        marker = _read_marker(targets.marker)
    if marker is not None:
        _check_settings(marker, wanted, targets)
        if targets.are_there():
            tokenizer = load_tokenizer(spec.data.tokenizer)
            check_vocabulary(tokenizer, wanted["vocabSize"], spec.data.tokenizer)
            if tokenizer.digest != marker["tokenizer"]:
                raise UserError(
                    f"data.tokenizer: {spec.data.tokenizer} is not the tokenizer that {targets.train} was "
                    f"made with; put it back, or remove {targets.names()} to make them anew"
                )
            return _report(spec, targets, marker, made=False)
    else:
        targets.check_unused()
    files = find_files(settings.text, settings.exclude)
    for url in (*targets.files, targets.marker):
        with user_errors(url, "data.prepare"):
            remove_leftovers(url)
    texts = _Texts(files, settings, holds_out=targets.validation is not None)
    tokenizer = _make_tokenizer(spec, texts, wanted["vocabSize"], progress)
    made = _tokenize(targets, texts, tokenizer, progress, threads)
    marker = {"settings": wanted, "tokenizer": tokenizer.digest, **made}
    with user_errors(targets.marker, "data.train[0].path"), write_whole(targets.marker) as file:
        file.write(json.dumps(marker, indent=1).encode() + b"\n")
    return _report(spec, targets, marker, made=True)


class _Targets:
    """Where the data goes."""

    def __init__(self, spec: TrainSpec) -> None:
        self.tokenizer = spec.data.tokenizer
        self.train = _bin_of(spec.data.train[0].path)
        self.validation = _bin_of(spec.data.validation[0].path) if spec.data.validation else None
        self.folders = [source.path for source in (*spec.data.train, *spec.data.validation)]
        if self.train == self.validation:
            raise UserError(
                "data.validation[0].path: must not be data.train[0].path; give it a folder of its own"
            )
        path = spec.data.train[0].path
        self.marker = f"{path}.{MARKER}" if path.endswith(".bin") else join(path, MARKER)

    @property
    def files(self) -> list[str]:
        """All files but the marker."""
        bins = [url for url in (self.train, self.validation) if url]
        return [self.tokenizer, *bins, *(url + ".meta" for url in bins)]

    def are_there(self) -> bool:
        """Whether all files exist."""
        return all(fs.exists(path) for fs, path in map(open_fs, self.files))

    def check_unused(self) -> None:
        """Raises UserError if a folder holds tokenized data that `prepare` did not write."""
        for number, url in enumerate(self.folders):
            where = "data.train[0].path" if number == 0 else "data.validation[0].path"
            with user_errors(url, where):
                fs, path = open_fs(url)
                others = [
                    name
                    for name in (fs.find(path) if fs.isdir(path) else [])
                    if name.endswith(".bin") and name.rsplit("/", 1)[-1] != BIN_NAME
                ]
            if others:
                raise UserError(
                    f"{where}: {url} already holds tokenized data ({others[0]}); remove data.prepare to "
                    "train on it, or give an empty folder"
                )

    def names(self) -> str:
        """The folders to remove in order to start anew."""
        return " and ".join(self.folders)


def _bin_of(path: str) -> str:
    return path if path.endswith(".bin") else join(path, BIN_NAME)


def _settings(spec: TrainSpec, settings: PrepareSpec) -> dict[str, Any]:
    """All that the data depends on but the text itself."""
    return {
        "format": _FORMAT,
        "text": list(settings.text),
        "exclude": list(settings.exclude),
        "sample": settings.sample,
        "validationPercent": settings.validation_percent if spec.data.validation else 0,
        "vocabSize": model_shape(spec.model).vocab_size,
    }


def _read_marker(url: str) -> dict[str, Any] | None:
    fs, path = open_fs(url)
    if not fs.exists(path):
        return None
    try:
        marker = json.loads(fs.cat_file(path))
        if {"settings", "tokenizer", "train", "validation"} <= marker.keys():
            return dict(marker)
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{url} is not what data.prepare writes; remove its folder to make the data anew")


def _check_settings(marker: dict[str, Any], wanted: dict[str, Any], targets: _Targets) -> None:
    changed = [name for name in wanted if marker["settings"].get(name) != wanted[name]]
    if changed:
        old, new = marker["settings"].get(changed[0]), wanted[changed[0]]
        raise UserError(
            f"data.prepare: the data in {targets.names()} was made with other settings ({changed[0]} was "
            f"{old} and is {new} now); set it back, or remove {targets.names()} and {targets.tokenizer} to "
            "make them anew"
        )


def _report(spec: TrainSpec, targets: _Targets, marker: dict[str, Any], made: bool) -> PreparedReport:
    return PreparedReport(
        made=made,
        tokenizer=spec.data.tokenizer,
        vocab_size=marker["settings"]["vocabSize"],
        train=Split(targets.train, **marker["train"]),
        validation=Split(targets.validation, **marker["validation"]) if targets.validation else None,
        unigram_entropy=marker["unigramEntropy"],
        unreadable=marker["unreadable"],
    )


class _Texts:
    """The samples of the files, each for training or for validation by a hash of its place."""

    def __init__(self, files: Sequence[TextFile], settings: PrepareSpec, holds_out: bool) -> None:
        self.files = files
        self.total_bytes = sum(file.size for file in files)
        self.unreadable: list[str] = []
        self._kind = settings.sample
        self._percent = settings.validation_percent if holds_out else 0

    def of(self, file: TextFile) -> list[tuple[bool, str]]:
        """(held out for validation, text) of a file's samples; none, and a note, if it is not UTF-8."""
        with user_errors(file.path, "data.prepare.text"):
            content = file.read()
        try:
            samples = list(samples_of(io.BytesIO(content), self._kind, file.path))
        except NotTextError:
            if file.name not in self.unreadable:
                self.unreadable.append(file.name)
                logger.warning("%s is not UTF-8 text and is left out", file.path)
            return []
        return [
            (_held_out(f"{file.name}\0{number}", self._percent), text) for number, text in enumerate(samples)
        ]

    def for_tokenizer(self, progress: Report) -> Iterator[str]:
        """Training samples of files in the order of their hash, up to the bytes that a tokenizer needs."""
        total, read = min(self.total_bytes, _TOKENIZER_BYTES), 0
        order = sorted(self.files, key=lambda file: xxhash.xxh3_64_intdigest(file.name.encode()))
        for number, file in enumerate(order, start=1):
            for held_out, text in self.of(file):
                if not held_out:
                    yield text
            read += file.size
            progress(TextProgress("tokenizer", number, len(order), min(read, total), total))
            if read >= total:
                return


def _held_out(place: str, percent: int) -> bool:
    return xxhash.xxh3_64_intdigest(place.encode()) % 100 < percent


def _make_tokenizer(spec: TrainSpec, texts: _Texts, vocab_size: int, progress: Report) -> Tokenizer:
    url = spec.data.tokenizer
    with user_errors(url, "data.tokenizer"):
        fs, path = open_fs(url)
        is_there = fs.exists(path)
    if not is_there:
        model = train_tokenizer(texts.for_tokenizer(progress), vocab_size)
        with user_errors(url, "data.tokenizer"), write_whole(url) as file:
            file.write(model)
    tokenizer = load_tokenizer(url)
    check_vocabulary(tokenizer, vocab_size, url)
    return tokenizer


def _tokenize(
    targets: _Targets, texts: _Texts, tokenizer: Tokenizer, progress: Report, threads: int
) -> dict[str, Any]:
    """Write the `.bin` files; what the marker says about them."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    with ExitStack() as stack:
        writers: list[BinWriter] = []
        for url, where in (
            (targets.train, "data.train[0].path"),
            (targets.validation, "data.validation[0].path"),
        ):
            if url:
                writers.append(stack.enter_context(write_bin(url, where)))
        for batch, done in _batches(texts):
            ids = tokenizer.encode_many([text for _, text in batch], threads)
            for (held_out, _), sample in zip(batch, ids, strict=True):
                writers[held_out].write([tokenizer.bos, *sample])
            learned = [sample for (held_out, _), sample in zip(batch, ids, strict=True) if not held_out]
            learned_ids = np.fromiter(chain.from_iterable(learned), dtype=np.int64)
            counts += np.bincount(learned_ids, minlength=len(counts))
            progress(replace(done, tokens=sum(writer.tokens for writer in writers)))
        _check_split(writers)
    train, *validation = [{"samples": writer.samples, "tokens": writer.tokens} for writer in writers]
    return {
        "train": train,
        "validation": validation[0] if validation else None,
        "unigramEntropy": _entropy(counts),
        "unreadable": texts.unreadable,
    }


def _batches(texts: _Texts) -> Iterator[tuple[list[tuple[bool, str]], TextProgress]]:
    """The samples of all files in order, many at once, and how far they are."""
    batch: list[tuple[bool, str]] = []
    characters, read = 0, 0
    for number, file in enumerate(texts.files, start=1):
        for sample in texts.of(file):
            batch.append(sample)
            characters += len(sample[1])
        read += file.size
        if characters >= _BATCH_CHARACTERS or number == len(texts.files):
            yield batch, TextProgress("tokenize", number, len(texts.files), read, texts.total_bytes)
            batch, characters = [], 0


def _check_split(writers: Sequence[BinWriter]) -> None:
    samples = [writer.samples for writer in writers]
    if not sum(samples):
        raise UserError("data.prepare.text: its files hold no text; give other ones")
    if 0 in samples:
        part = "training" if not samples[0] else "validation"
        raise UserError(
            f"data.prepare: none of the {sum(samples)} samples went to {part}; give more text, set sample to "
            "line, or change validationPercent"
        )


def _entropy(counts: NDArray[np.int64]) -> float:
    """Nats a token of tokens that occur this often."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
