"""A `.bin` in the making, which outlives the process that makes it.

What is done lies in `NAME.bin.part` and its companions, beside the file where that is on a disk, and in the
user's cache folder where it goes to a store, which cannot append.  A journal says how much of it counts and where
in the input that ends; it is written after the data has reached the disk, so whatever a killed process leaves can be
cut back to it.  A finished file keeps a record of what it was made from, so that the same command does not
make it twice.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from internlm_trainer.data.line_encoder import Lines
from internlm_trainer.errors import UserError
from internlm_trainer.storage import is_local, open_fs, user_errors, write_whole

JOURNAL_SECONDS = 10.0
_COPIED = 16 << 20
_FIELD = "--out"


def finished(url: str, made_from: Mapping[str, Any]) -> tuple[int, int] | None:
    """(samples, tokens) of the `.bin` at `url` if it is whole and made from just this, else None."""
    with user_errors(url, _FIELD):
        fs, path = open_fs(url)
        try:
            record = json.loads(fs.cat_file(_record(path)))
            whole = fs.size(path) == record["bytes"] and fs.exists(path + ".meta")
            return (record["samples"], record["tokens"]) if whole and record["from"] == made_from else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


class PartialBin:
    """Collects the lines of the `.bin` at `url`.

    `made_from`: JSON values that name inputs and settings; what another maker left is not gone on with.
    Errors of the disk or the store are UserErrors.
    """

    def __init__(
        self, url: str, made_from: Mapping[str, Any], journal_seconds: float = JOURNAL_SECONDS
    ) -> None:
        self.url, self._made_from, self._seconds = url, dict(made_from), journal_seconds
        self._part = _part_of(url)
        with user_errors(str(self._part), _FIELD):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._bin = _locked(self._part, url)
            self._meta = _beside(self._part, ".meta").open("ab")
            journal = self._read_journal()
            self.position: Any = journal["position"] if journal else None
            """Where to go on, as given to `add`; None at the beginning."""
            done: list[int] = journal["done"] if journal else [0, 0, 0]
            self._bytes, self.samples, self.tokens = done
            for file, size in ((self._bin, self._bytes), (self._meta, 16 * self.samples)):
                file.truncate(size)
                file.seek(size)
        self._saved = time.monotonic()

    def add(self, lines: Lines, position: Any) -> None:
        """Append lines; the next ones will be those of `position` (JSON)."""
        starts = self._bytes + np.cumsum(lines.sizes) - lines.sizes
        with user_errors(str(self._part), _FIELD):
            self._bin.write(lines.content)
            self._meta.write(np.column_stack((starts, lines.tokens)).tobytes())
            self._bytes += len(lines.content)
            self.samples += len(lines.tokens)
            self.tokens += int(lines.tokens.sum())
            self.position = position
            if time.monotonic() - self._saved >= self._seconds:
                self._write_journal()

    def finish(self) -> None:
        """Put the file in its place, then its meta and its record."""
        with user_errors(self.url, _FIELD):
            self._write_journal()
            fs, path = open_fs(self.url)
            for old in (_record(path), path + ".meta"):  # they must not be taken for the new file's
                with suppress(FileNotFoundError):
                    fs.rm_file(old)
            if is_local(self.url):
                os.replace(self._part, path)
            else:
                with self._part.open("rb") as source, write_whole(self.url) as target:
                    shutil.copyfileobj(source, target, _COPIED)
            with write_whole(self.url + ".meta") as target:
                np.save(target, self._rows())
            self.discard()
            done = {"bytes": self._bytes, "samples": self.samples, "tokens": self.tokens}
            with write_whole(_record(self.url)) as target:
                target.write(json.dumps({**done, "from": self._made_from}, indent=1).encode() + b"\n")

    def discard(self) -> None:
        """Remove what was collected."""
        self.close()
        for ending in ("", ".meta", ".new", ".json"):
            _beside(self._part, ending).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave what was collected to the next process; its journal may be some seconds old."""
        for file in (self._bin, self._meta):
            # What a full disk does not take, the journal does not count.
            with suppress(OSError):
                file.close()

    def save(self) -> None:
        """Bring the journal up to date, if the disk lets it."""
        with suppress(OSError, UserError):
            self._write_journal()

    def _rows(self) -> np.ndarray[Any, Any]:
        self._meta.flush()
        return np.fromfile(_beside(self._part, ".meta"), dtype=np.int64).reshape(-1, 2)

    def _read_journal(self) -> dict[str, Any] | None:
        """The journal, if it belongs to this input and all that it counts is there."""
        try:
            journal: dict[str, Any] = json.loads(_beside(self._part, ".json").read_bytes())
            size, samples, _ = journal["done"]
            there = os.fstat(self._bin.fileno()).st_size, os.fstat(self._meta.fileno()).st_size
        except (FileNotFoundError, ValueError, KeyError):
            return None
        whole = there[0] >= size and there[1] >= 16 * samples
        return journal if whole and journal.get("from") == self._made_from else None

    def _write_journal(self) -> None:
        for file in (self._bin, self._meta):
            file.flush()
            os.fsync(file.fileno())
        done = [self._bytes, self.samples, self.tokens]
        content = json.dumps({"from": self._made_from, "position": self.position, "done": done})
        journal, new = _beside(self._part, ".json"), _beside(self._part, ".new")
        with new.open("wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, journal)
        self._saved = time.monotonic()


def _record(url: str) -> str:
    return url + ".made.json"


def _beside(part: Path, ending: str) -> Path:
    return part.with_name(part.name + ending)


def _part_of(url: str) -> Path:
    if is_local(url):
        return Path(open_fs(url)[1] + ".part")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "internlm" / "tokenize" / f"{xxhash.xxh3_64_hexdigest(url.encode())}.part"


def _locked(path: Path, url: str) -> io.FileIO | IO[bytes]:
    """The file, which no other process may write now."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{_FIELD}: another process is writing {url}; wait for it or choose another place"
        ) from None
    return file
