"""Blocks of remote files on a local disk, shared by the processes of a machine.

A block is a file named by what it holds, written beside and renamed, with a digest behind its bytes: so no lock is
needed to read or write, a crash leaves at worst a file that is not believed, and a disk that is full or broken
only means that blocks are fetched again.  The least recently used go when the cache is over its size.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

import xxhash

log = logging.getLogger(__name__)

# Each process adds what it wrote to a common count when that is this share of the size, and does not go on before it
# could.  Above `_FULL` blocks are removed down to `_KEPT`: so sixteen processes stay within the size, and the whole
# folder is looked at once for every tenth of it that is written.
_SHARE, _FULL, _KEPT = 0.01, 0.84, 0.74
_PAUSE = 60.0  # seconds without writing after the disk refused
_TOUCH = 60.0  # the order of use is known to the minute
_DIGEST = 8


class BlockCache:
    """At most about `size` bytes of blocks in the folder `path`."""

    def __init__(self, path: str, size: int) -> None:
        self._blocks = Path(path) / "blocks"
        self._size = size
        self._written, self._paused_until = 0, 0.0
        self._counted = False
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """The block, or None if it is not here or damaged."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                content = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH:
                    os.utime(path)
        except OSError:
            return None
        block = content[:-_DIGEST]
        if len(content) < _DIGEST or xxhash.xxh3_64_digest(block) != content[-_DIGEST:]:
            with suppress(OSError):
                path.unlink()
            return None
        return block

    def put(self, key: str, block: bytes) -> None:
        """Keep the block, if the disk lets it.  Never raises."""
        if time.monotonic() < self._paused_until:
            return
        if self._written >= self._size * _SHARE and not self._count():
            return
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb", buffering=0) as file:
                size = file.write(block) + file.write(xxhash.xxh3_64_digest(block))
            # A short write on a full disk gives no error; its digest would not match.
            if size != len(block) + _DIGEST:
                raise OSError("the disk is full")
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._paused_until = time.monotonic() + _PAUSE
            log.warning("data.cache: %s takes no more blocks (%s); going on without", self._blocks, error)
            return
        with self._lock:
            self._written += size

    def _path(self, key: str) -> Path:
        name = xxhash.xxh3_128_hexdigest(key.encode())
        return self._blocks / name[:2] / name

    def _count(self) -> bool:
        """Add what was written here to the common count, and make room if that is too much.

        False if another process or thread is at it.
        """
        with suppress(OSError), (self._blocks / "lock").open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            with self._lock:
                written, self._written = self._written, 0
            file.seek(0)
            known = file.read()
            total = int(known) + written if known.isdigit() else self._size
            # What killed processes did not count is found when the next one looks for the first time.
            if total > self._size * _FULL or not self._counted:
                total = self._shrink()
                self._counted = True
            file.truncate(0)
            file.write(str(total).encode())
        return True

    def _shrink(self) -> int:
        """Remove what was used longest ago, if there is too much; the bytes that stay."""
        found = [
            (entry.stat().st_mtime, entry.stat().st_size, entry.path)
            for folder in os.scandir(self._blocks)
            if folder.is_dir()
            for entry in _files(folder.path)
        ]
        total, an_hour_ago = sum(size for _, size, _ in found), time.time() - 3600
        limit = self._size * (_KEPT if total > self._size * _FULL else 1)
        for used, size, path in sorted(found):
            # What a killed process left half written goes too, once it cannot be one's that lives.
            if total > limit or (path.endswith(".tmp") and used < an_hour_ago):
                with suppress(OSError):
                    os.unlink(path)
                    total -= size
        return total


def _files(folder: str) -> list[os.DirEntry[str]]:
    """Files of a folder that are still there."""
    found = []
    for entry in os.scandir(folder):
        with suppress(OSError):
            entry.stat()
            found.append(entry)
    return found
