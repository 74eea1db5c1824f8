"""Tokenized data on disk, in InternLM's format.

`NAME.bin` is text, one sample a line, exactly what `json.dumps({"tokens": [...]})` writes: the id of bos,
then the sample's.  A negative id is input without loss.  `NAME.bin.meta` is a NumPy array [samples, 2] of
int64 (int32 is read too): where a sample's line starts, in bytes, and how many ids it has.  The meta is
written last, so that a `.bin` with a meta is whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from internlm_trainer.data.byte_ranges import ByteRanges, LocalRanges, RemoteRanges
from internlm_trainer.errors import UserError
from internlm_trainer.storage import is_local, join, open_fs, user_errors, write_whole

Ids = NDArray[np.int64]

_PREFIX, _SUFFIX = b'{"tokens": [', b"]}\n"


def encode_sample(ids: Sequence[int]) -> bytes:
    """A sample's line."""
    return json.dumps({"tokens": list(ids)}).encode() + b"\n"


def decode_sample(line: bytes) -> Ids:
    """The ids [tokens] of a sample's line.  Raises ValueError if it is no such line."""
    if line.startswith(_PREFIX) and line.endswith(_SUFFIX):
        # Five times as fast as JSON; what it does not take in whole, JSON judges.
        text = line[len(_PREFIX) : -len(_SUFFIX)]
        with suppress(ValueError):
            ids: Ids = np.fromstring(text, dtype=np.int64, sep=",")
            if len(ids) == text.count(b",") + 1 and b", ," not in text and b",," not in text:
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

        Raises UserError, with file and line, if they are not what the meta says or not in the vocabulary.
        """
        place = f"{self.url}, line {sample + 1}"
        try:
            ids = decode_sample(line)
        except ValueError as error:
            raise UserError(f"{place}: not a tokenized sample ({error}); tokenize this file again") from error
        if len(ids) != self.lengths[sample]:
            raise UserError(
                f"{place}: {len(ids)} tokens, but {self.url}.meta says {self.lengths[sample]}; the two "
                "do not belong together: tokenize this file again"
            )
        if len(ids) and (largest := max(int(ids.max()), -int(ids.min()))) >= vocab_size:
            raise UserError(
                f"{place}: token {largest}, but the model's vocabulary (spec.model.vocabSize) has "
                f"{vocab_size} words; use the tokenizer that this data was made with"
            )
        return ids


def open_bins(url: str, field: str) -> list[BinFile]:
    """All `.bin` files of a folder, searched recursively and sorted by name, or the one file that `url`
    names.

    Reads their metas.  Raises UserError if there is no such folder, no `.bin` in it, or a meta is missing,
    broken or not its file's.
    """
    with user_errors(url, field):
        fs, path = open_fs(url)
        sizes = _list_bins(fs, path, url, field)
        bins = sorted(name for name in sizes if name.endswith(".bin"))
        metas = _read_all(fs, [name + ".meta" for name in bins])
        ranges: ByteRanges = LocalRanges() if is_local(url) else RemoteRanges(fs)
        files = []
        for name in bins:
            shown = _url_of(url, path, name)
            starts, lengths = _parse_meta(metas[name + ".meta"], sizes[name], shown)
            files.append(BinFile(name, _relative(path, name), starts, lengths, ranges))
        return files


def _list_bins(fs: Any, path: str, url: str, field: str) -> dict[str, int]:
    """Sizes of the `.bin` and `.meta` files in a folder, or of one file and its meta."""
    found = {name: info["size"] for name, info in fs.find(path, detail=True).items()}
    if path in found and path.endswith(".bin") and fs.exists(path + ".meta"):
        found[path + ".meta"] = fs.size(path + ".meta")
    sizes = {name: size for name, size in found.items() if name.endswith((".bin", ".bin.meta"))}
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


def _read_all(fs: Any, names: list[str]) -> dict[str, bytes]:
    """The contents of small files; drivers of object stores read them at the same time."""
    found = fs.cat(names)
    return found if isinstance(found, dict) else {names[0]: found}


def _relative(path: str, name: str) -> str:
    """The name of a file below `path`, the same wherever the folder is copied to."""
    inner = name.removeprefix(path.rstrip("/")).strip("/")
    return inner or name.rsplit("/", 1)[-1]


def _url_of(url: str, path: str, name: str) -> str:
    return url if name == path else join(url, _relative(path, name))


def _parse_meta(content: bytes, size: int, url: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts [samples + 1], lengths [samples]) of a `.bin` of `size` bytes."""
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
    return starts, lengths
