"""What a folder of tokenized data holds, and what is wrong in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from internlm_trainer.data.bin_format import BinFile, Ids, LocalCache, open_bins, parse_samples
from internlm_trainer.data.progress import Report, TextProgress, silent
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs, user_errors

KINDS = ("cn", "en", "code", "ja", "ar", "kaoshi")
"""InternLM's kinds of data: a folder of that name says what the files below it are."""

_ANY_VOCABULARY = 1 << 31
_LINES = 256  # read at once
_SPOT_CHECKS = 16  # lines of a file that are read when not all are


@dataclass
class Group:
    """Files that belong together: of one kind, or of one folder."""

    name: str
    files: int = 0
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    shortest: int = 0
    longest: int = 0


@dataclass
class Inspection:
    """What was found.

    histogram: samples of at least 2^n and fewer than 2^(n + 1) tokens, by n; those without tokens count as of one.
    broken: a sentence for each file or line that cannot be trained on.  checked: lines that were read.
    """

    groups: list[Group]
    histogram: list[int]
    broken: list[str]
    checked: int = 0
    examples: list[tuple[str, Ids]] = field(default_factory=list)
    """Some samples, each with its place."""

    @property
    def samples(self) -> int:
        return sum(group.samples for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)


def inspect(
    url: str,
    *,
    full: bool = False,
    examples: int = 0,
    vocab_size: int | None = None,
    seed: int = 0,
    progress: Report = silent,
) -> Inspection:
    """Look through the `.bin` files of a folder, or at one.

    full: read every line, not a few of each file.  examples: samples to bring along, drawn evenly.
    vocab_size: ids must be below it.  Raises UserError if there is no such folder or no `.bin` in it.
    """
    files, broken = _open(url)
    found = Inspection(_groups(files), _histogram(files), broken)
    random = np.random.default_rng(seed)
    total = sum(int(file.starts[-1]) for file in files)
    done = 0
    for number, file in enumerate(files, start=1):
        for samples in _chosen(file, full, random):
            found.checked += len(samples)
            found.broken += _wrong(file, samples, vocab_size or _ANY_VOCABULARY)
            if full:
                now = done + int(file.starts[samples[-1] + 1])
                progress(TextProgress("check", number - 1, len(files), now, total))
        done += int(file.starts[-1])
        progress(TextProgress("check", number, len(files), done, total))
    found.examples = list(_examples(files, examples, random))
    return found


def _open(url: str) -> tuple[list[BinFile], list[str]]:
    """The files that can be opened, and a sentence for each other one."""
    try:
        return open_bins(url, "path"), []
    except UserError:
        with user_errors(url, "path"):
            fs, path = open_fs(url)
            names = sorted(name for name in fs.find(path) if name.endswith(".bin")) if fs.isdir(path) else []
        if not names:
            raise
    files: list[BinFile] = []
    broken: list[str] = []
    cache = LocalCache()
    for name in names:
        inner = name.removeprefix(path.rstrip("/")).strip("/")
        try:
            files += [_named(file, inner) for file in open_bins(join(url, inner), "path", cache)]
        except UserError as error:
            broken.append(str(error).removeprefix("path: "))
    return files, broken


def _named(file: BinFile, name: str) -> BinFile:
    return BinFile(file.url, name, file.stamp, file.starts, file.lengths, file.ranges)


def group_of(name: str) -> str:
    """The kind that the folders of a file's name tell, else its first folder."""
    folders = name.split("/")[:-1]
    kinds = [folder for folder in folders if folder in KINDS]
    return kinds[0] if len(kinds) == 1 else (folders[0] if folders else ".")


def _groups(files: Sequence[BinFile]) -> list[Group]:
    groups: dict[str, Group] = {}
    for file in files:
        group = groups.setdefault(group_of(file.name), Group(group_of(file.name)))
        if len(file.lengths):
            shortest, longest = int(file.lengths.min()), int(file.lengths.max())
            group.shortest = min(group.shortest, shortest) if group.samples else shortest
            group.longest = max(group.longest, longest)
        group.files += 1
        group.samples += len(file.lengths)
        group.tokens += file.tokens
        group.bytes += int(file.starts[-1])
    return sorted(groups.values(), key=lambda group: -group.tokens)


def _histogram(files: Sequence[BinFile]) -> list[int]:
    counts = np.zeros(64, dtype=np.int64)
    for file in files:
        # The exponent of a number's floating point form is the place of its highest bit.
        bins = np.frexp(np.maximum(file.lengths, 1).astype(np.float64))[1] - 1
        counts += np.bincount(bins, minlength=64)
    return [int(count) for count in counts[: int(counts.nonzero()[0].max()) + 1]] if counts.any() else []


def _chosen(file: BinFile, full: bool, random: np.random.Generator) -> Iterator[list[int]]:
    """Numbers of the lines to read: all, or the first, the last and some between."""
    count = len(file.lengths)
    if full or count <= _SPOT_CHECKS:
        chosen = list(range(count))
    else:
        drawn = random.choice(np.arange(1, count - 1), _SPOT_CHECKS - 2, replace=False)
        chosen = [0, *sorted(drawn.tolist()), count - 1]
    for first in range(0, count if full else len(chosen), _LINES):
        yield chosen[first : first + _LINES]


def _wrong(file: BinFile, samples: Sequence[int], vocab_size: int) -> list[str]:
    """A sentence for each of the lines that is not as it should be."""
    lines = file.ranges.read([file.byte_range(sample) for sample in samples])
    try:
        parse_samples([(file, sample) for sample in samples], lines, vocab_size)
        return []
    except UserError:
        wrong = []
        for sample, line in zip(samples, lines, strict=True):
            try:
                file.parse(sample, line, vocab_size)
            except UserError as error:
                wrong.append(str(error))
        return wrong


def _examples(files: Sequence[BinFile], count: int, random: np.random.Generator) -> Iterator[tuple[str, Ids]]:
    """Samples drawn evenly from all, those that cannot be read left out."""
    ends = np.cumsum([len(file.lengths) for file in files])
    for number in random.integers(ends[-1], size=count).tolist() if any(ends) else []:
        place = int(np.searchsorted(ends, number, side="right"))
        file, sample = files[place], number - int(ends[place - 1] if place else 0)
        (line,) = file.ranges.read([file.byte_range(sample)])
        try:
            yield f"{file.name}, line {sample + 1}", file.parse(sample, line, _ANY_VOCABULARY)
        except UserError:
            continue
