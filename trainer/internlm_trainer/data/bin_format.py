"""Tokenized data on disk, in InternLM's format.

`NAME.bin` is text, one sample a line, exactly what `json.dumps({"tokens": [...]})` writes: the id of bos,
then the sample's.  A negative id is input without loss.  `NAME.bin.meta` is a NumPy array [samples, 2] of
int64 (int32 is read too): where a sample's line starts, in bytes, and how many ids it has.  The meta is
written last, so that a `.bin` with a meta is whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from internlm_trainer.config import CacheSpec
from internlm_trainer.data.block_cache import BlockCache
from internlm_trainer.data.byte_ranges import (
    BlockMemory,
    ByteRanges,
    LocalRanges,
    RemoteFile,
    RemoteRanges,
)
from internlm_trainer.data.mapped import MappedArrays
from internlm_trainer.errors import DataError, UserError
from internlm_trainer.storage import is_local, join, open_fs, stamp_of, user_errors, write_whole

Ids = NDArray[np.int64]

PREFIX, SUFFIX = b'{"tokens": [', b"]}\n"
"""What a line has around its ids."""
_METAS_AT_ONCE = 32
_PARSED_BYTES = 256 << 10


@dataclass(frozen=True)
class LocalCache:
    """What is kept of data here: in memory and, if `data.cache` asks for it, on this machine's disk."""

    blocks: BlockCache | None = None
    arrays: MappedArrays = field(default_factory=lambda: MappedArrays(None))
    memory: BlockMemory = field(default_factory=BlockMemory)


def open_cache(spec: CacheSpec | None) -> LocalCache:
    """The cache that a job describes."""
    if spec is None:
        return LocalCache()
    return LocalCache(BlockCache(spec.path, spec.size_gi << 30), MappedArrays(spec.path))


def encode_sample(ids: Sequence[int]) -> bytes:
    """A sample's line."""
    return json.dumps({"tokens": list(ids)}).encode() + b"\n"


def decode_sample(line: bytes) -> Ids:
    """The ids [tokens] of a sample's line.  Raises ValueError if it is no such line."""
    if line.startswith(PREFIX) and line.endswith(SUFFIX):
        # Five times as fast as JSON; what it does not take in whole, JSON judges.
        text = line[len(PREFIX) : -len(SUFFIX)]
        with suppress(ValueError):
            ids: Ids = np.fromstring(text, dtype=np.int64, sep=",")
            if len(ids) == text.count(b",") + 1 and not _has_gap(text):
                return ids
    if not line.endswith(b"\n"):
        raise ValueError("the line is cut off")
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("tokens"), list):
        raise ValueError('it has no list "tokens"')
    if not all(type(token) is int and abs(token) < 2**31 for token in record["tokens"]):
        raise ValueError("a token is no whole number")
    return np.array(record["tokens"], dtype=np.int64)


class BinWriter:
    """Writes samples to a `.bin`; made by `write_bin`."""

    def __init__(self, file: IO[bytes], url: str, field: str) -> None:
        self._file, self._url, self._field = file, url, field
        self._offset = 0
        self._meta: list[tuple[int, int]] = []
        self.tokens = 0

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return len(self._meta)

    def write(self, ids: Sequence[int]) -> None:
        """Append one sample: bos and its ids."""
        line = encode_sample(ids)
        with user_errors(self._url, self._field):
            self._file.write(line)
        self._meta.append((self._offset, len(ids)))
        self._offset += len(line)
        self.tokens += len(ids)

    def meta(self) -> bytes:
        """The content of the `.meta` file."""
        content = io.BytesIO()
        np.save(content, np.array(self._meta, dtype=np.int64).reshape(-1, 2))
        return content.getvalue()


@contextmanager
def write_bin(url: str, field: str = "output") -> Iterator[BinWriter]:
    """Write the `.bin` at `url` and its meta: both appear, whole, when the block ends, the meta last.

    An error in the block leaves what was there before.  Storage errors become UserErrors that begin with
    `field`.
    """
    with user_errors(url, field):
        with write_whole(url) as file:
            writer = BinWriter(file, url, field)
            yield writer
            fs, meta_path = open_fs(url + ".meta")
            if fs.exists(meta_path):  # it must not be taken for the new file's
                fs.rm_file(meta_path)
        with write_whole(url + ".meta") as file:
            file.write(writer.meta())


@dataclass(frozen=True)
class BinFile:
    """A `.bin` file opened for reading: `starts` [samples + 1] in bytes, `lengths` [samples] in ids."""

    url: str
    name: str
    stamp: str
    """Changes when the file does; empty where the store does not tell."""
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    ranges: ByteRanges

    @property
    def tokens(self) -> int:
        """Ids in the whole file."""
        return int(self.lengths.sum())

    def byte_range(self, sample: int) -> tuple[str, int, int]:
        """What to ask `ranges` for to get the sample's line."""
        return self.url, int(self.starts[sample]), int(self.starts[sample + 1])

    def parse(self, sample: int, line: bytes, vocab_size: int) -> Ids:
        """The ids of the sample's line.

        Raises DataError, with file and line, if they are not what the meta says or not in the vocabulary.
        """
        place = f"{self.url}, line {sample + 1}"
        try:
            ids = decode_sample(line)
        except ValueError as error:
            raise DataError(f"{place}: not a tokenized sample ({error}); tokenize this file again") from error
        if len(ids) != self.lengths[sample]:
            raise DataError(
                f"{place}: {len(ids)} tokens, but {self.url}.meta says {self.lengths[sample]}; the two "
                "do not belong together: tokenize this file again"
            )
        if (largest := _largest(ids)) >= vocab_size:
            raise DataError(
                f"{place}: token {largest}, but the model's vocabulary (spec.model.vocabSize) has "
                f"{vocab_size} words; use the tokenizer that this data was made with"
            )
        return ids


def parse_samples(
    samples: Sequence[tuple[BinFile, int]], lines: Sequence[bytes], vocab_size: int
) -> list[Ids]:
    """The ids of samples (file, number), each from its line, as `BinFile.parse` checks and gives them.

    Many lines are read by one call, which takes a third of the time, but not so many that it keeps the
    interpreter from the thread that trains for more than a few milliseconds.
    """
    parsed: list[Ids] = []
    while len(parsed) < len(lines):
        first, last, size = len(parsed), len(parsed), 0
        while last < len(lines) and size < _PARSED_BYTES:
            size += len(lines[last])
            last += 1
        parsed += _parse_some(samples[first:last], lines[first:last], vocab_size)
    return parsed


def _parse_some(samples: Sequence[tuple[BinFile, int]], lines: Sequence[bytes], vocab_size: int) -> list[Ids]:
    """Where the one call does not find what it should, the lines are looked at one by one."""
    texts = [line[len(PREFIX) : -len(SUFFIX)] for line in lines]
    lengths = [int(file.lengths[sample]) for file, sample in samples]
    if (
        all(line.startswith(PREFIX) and line.endswith(SUFFIX) for line in lines)
        and [text.count(b",") + 1 for text in texts] == lengths
        and all(texts)
        and not _has_gap(joined := b", ".join(texts))
    ):
        with suppress(ValueError):
            ids: Ids = np.fromstring(joined, dtype=np.int64, sep=",")
            if len(ids) == sum(lengths) and _largest(ids) < vocab_size:
                # Copies: a view would keep the others in memory.
                return [part.copy() for part in np.split(ids, list(accumulate(lengths[:-1])))]
    return [file.parse(sample, line, vocab_size) for (file, sample), line in zip(samples, lines, strict=True)]


def _has_gap(text: bytes) -> bool:
    """Whether a number is missing before a comma or at the end, where NumPy would read a zero."""
    signs = np.frombuffer(text, dtype=np.uint8)
    ends = np.append(signs[1:] == ord(","), True)
    return not ((signs - ord("0") < 10) | ~ends).all()


def _largest(ids: Ids) -> int:
    return max(int(ids.max()), -int(ids.min())) if len(ids) else 0


def open_bins(url: str, field: str, cache: LocalCache | None = None) -> list[BinFile]:
    """All `.bin` files of a folder, searched recursively and sorted by name, or the one file that `url`
    names.

    Reads their metas.  Raises UserError if there is no such folder, no `.bin` in it, or a meta is missing,
    broken or not its file's.
    """
    cache = cache or LocalCache()
    with user_errors(url, field):
        fs, path = open_fs(url)
        found = _list_bins(fs, path, url, field)
        bins = sorted(name for name in found if name.endswith(".bin"))
        ranges: ByteRanges = LocalRanges()
        if not is_local(url):
            once, _ = open_fs(url, retries=False)
            ranges = RemoteRanges(once, {n: found[n] for n in bins}, cache.memory, cache.blocks)
        files: list[BinFile] = []
        for name, content in _read_all(fs, [name + ".meta" for name in bins]):
            name = name.removesuffix(".meta")
            size, stamp = found[name]
            shown = _url_of(url, path, name)

            def make(content: Callable[[], bytes] = content, size: int = size, shown: str = shown) -> Ids:
                return _parse_meta(content(), size, shown)

            key = f"meta\0{name}\0{size}\0{stamp}\0{found[name + '.meta']}"
            starts, lengths = cache.arrays.get(key, make)
            files.append(BinFile(name, _relative(path, name), stamp, starts, lengths[:-1], ranges))
        return files


def _list_bins(fs: Any, path: str, url: str, field: str) -> dict[str, RemoteFile]:
    """The `.bin` and `.meta` files in a folder, or one file and its meta."""
    found = dict(fs.find(path, detail=True))
    if path in found and path.endswith(".bin") and fs.exists(path + ".meta"):
        found[path + ".meta"] = fs.info(path + ".meta")
    sizes = {
        name: RemoteFile(int(info["size"]), stamp_of(info))
        for name, info in found.items()
        if name.endswith((".bin", ".bin.meta"))
    }
    if not any(name.endswith(".bin") for name in sizes):
        if not found and not fs.exists(path):
            raise UserError(f"{field}: {url} does not exist; correct the path or tokenize text into it")
        raise UserError(f"{field}: {url} has no .bin file; tokenize text into it (internlm tokenize)")
    for name in sizes:
        if name.endswith(".bin") and name + ".meta" not in sizes:
            raise UserError(
                f"{field}: {_url_of(url, path, name)} has no .meta beside it, so its writing did not end; "
                "tokenize it again"
            )
    return sizes


def _read_all(fs: Any, names: list[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each file with a function that gives its content.

    Where that is asked for, drivers of object stores read some at the same time: as many as memory can hold.
    """
    for first in range(0, len(names), _METAS_AT_ONCE):
        some = names[first : first + _METAS_AT_ONCE]
        contents: dict[str, bytes] = {}

        def content(name: str, some: list[str] = some, contents: dict[str, bytes] = contents) -> bytes:
            if name not in contents:
                found = fs.cat([one for one in some if one >= name])
                contents.update(found if isinstance(found, dict) else {name: found})
            return contents.pop(name)

        for name in some:
            yield name, partial(content, name)


def _relative(path: str, name: str) -> str:
    """The name of a file below `path`, the same wherever the folder is copied to."""
    inner = name.removeprefix(path.rstrip("/")).strip("/")
    return inner or name.rsplit("/", 1)[-1]


def _url_of(url: str, path: str, name: str) -> str:
    return url if name == path else join(url, _relative(path, name))


def _parse_meta(content: bytes, size: int, url: str) -> Ids:
    """[2, samples + 1]: starts and, but for the last, lengths of a `.bin` of `size` bytes."""
    again = f"tokenize {url} again"
    try:
        meta = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{url}.meta is cut off or no NumPy array; {again}") from error
    if meta.size == 0:
        meta = meta.astype(np.int64).reshape(0, 2)
    if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
        raise UserError(f"{url}.meta is not an array of whole numbers with two columns; {again}")
    starts = np.append(meta[:, 0].astype(np.int64), size)
    lengths = np.ascontiguousarray(meta[:, 1], dtype=np.int64)
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or (lengths < 0).any():
        hint = ""
        if meta.dtype.itemsize == 4 and size > np.iinfo(np.int32).max:
            hint = " (32-bit numbers are too small for a file of more than 2 GiB)"
        raise UserError(f"{url}.meta does not belong to its file of {size} bytes{hint}; {again}")
    return np.stack((starts, np.append(lengths, 0)))
