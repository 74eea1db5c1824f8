"""Large arrays in files that the processes of a machine map together, instead of each in its own memory.

A corpus of a million million tokens has some thousand million samples: where they lie and in which order they come
takes 32 bytes each.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from internlm_trainer.storage import user_errors

log = logging.getLogger(__name__)
Array = NDArray[np.int64]
_FULL = (errno.ENOSPC, errno.EDQUOT)


class MappedArrays:
    """Arrays in the folder `path` by their keys; without a path they are simply made."""

    def __init__(self, path: str | None) -> None:
        self._folder = Path(path) / "index" if path else None
        self._told = False

    def get(self, key: str, make: Callable[[], Array], *, instead_of: str | None = None) -> Array:
        """The array of `key`; `make` makes it where it is not there, in one process at a time.

        The array with the key `instead_of` is not needed any more.  One that the disk has no room for is this process's
        own.  Raises UserError if the folder cannot be written.
        """
        if self._folder is None:
            return make()
        path = self._path(self._folder, key)
        if (array := _mapped(path)) is not None:
            return array
        made = cache(make)
        with user_errors(str(path), "data.cache.path"):
            try:
                return self._shared(path, made, instead_of)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not self._told:
                    sentence = "data.cache: %s has no room for the index (%s); going on with it in memory"
                    log.warning(sentence, self._folder, error)
                self._told = True
        return made()

    def _shared(self, path: Path, make: Callable[[], Array], instead_of: str | None) -> Array:
        assert self._folder is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (array := _mapped(path)) is None:
                _write(path, make())
                array = _mapped(path)
            if instead_of:
                # Who has it mapped keeps it.
                self._path(self._folder, instead_of).unlink(missing_ok=True)
        assert array is not None
        return array

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        name = xxhash.xxh3_128_hexdigest(key.encode())
        return folder / name[:2] / f"{name}.npy"


def _mapped(path: Path) -> Array | None:
    """The array, unless it is missing or cut off.  These files are never changed, so the map is safe."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array


def _write(path: Path, array: Array) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is None:  # NumPy's word for a short write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
