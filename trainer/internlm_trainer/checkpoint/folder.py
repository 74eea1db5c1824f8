"""A folder in any store that fsspec knows, as checkpoints need it: patient reads, durable and atomic writes.

The only module of the package that touches fsspec, with `upload` for the S3 stores' own way of writing.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from internlm_trainer.checkpoint.errors import StorageUnavailable
from internlm_trainer.checkpoint.upload import PART, PartedUpload
from internlm_trainer.errors import UserError
from internlm_trainer.storage import StorageUnreachableError, explain, join, open_fs, user_errors

log = logging.getLogger(__name__)
T = TypeVar("T")
WHAT = "checkpoint.path"
# There a folder is only the common beginning of names: making one is needless, and s3fs makes the bucket.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "cos", "hf"}


def reason(error: BaseException, url: str) -> str:
    """An error of a store in words: what the user can do about it, or the status that the store answered."""
    sentence, _ = explain(error, url)
    if sentence:
        return sentence
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        code, message = response["Error"].get("Code", ""), response["Error"].get("Message", "")
        words = [status] if code in ("", status) else [status, code]  # a HEAD has no code but its status
        return f"the store answered {' '.join(words)}: {message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


class WriteFailed(Exception):  # noqa: N818 - it says what happened
    """The store refused a write; the message is its reason."""


class Folder:
    """Files below `url`, named by their path relative to it.

    Requests are tried again for `patience` seconds while the store fails.  Reads raise FileNotFoundError for what
    is not there, UserError for what the user must mend (credentials), StorageUnavailable for a store that
    does not come back.  Writes raise WriteFailed; those to a local disk, and those that stream to stores other
    than S3, are tried once, beyond what the driver does itself.  `what`: with what sentences for the user begin.
    """

    def __init__(self, url: str, patience: float = 60.0, what: str = WHAT) -> None:
        self.url, self.patience, self.what = url, patience, what
        with user_errors(url, what):
            self.fs, self.root = open_fs(url, retries=False)
        self.local = isinstance(self.fs, LocalFileSystem)
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.folders = not protocols & OBJECT_STORES

    def path(self, *parts: str) -> str:
        """Path inside the file system."""
        return "/".join((self.root.rstrip("/"), *parts))

    def uri(self, *parts: str) -> str:
        """The same for people and other programs, with the protocol."""
        return join(self.url, *parts)

    def names(self, *parts: str) -> dict[str, int | None]:
        """What lies directly in a folder, as the store has it now: name -> bytes, or None for a folder.

        Empty for a folder that is not there.
        """
        path = self.path(*parts)

        def listed() -> list[dict[str, Any]]:
            self.fs.invalidate_cache(path)  # others write here too
            try:
                return list(self.fs.ls(path, detail=True))
            except FileNotFoundError:
                # Some drivers say so when a file goes while they list: no reason to start afresh.
                with suppress(FileNotFoundError):
                    self.fs.info(path)
                    raise BlockingIOError(errno.EAGAIN, "the folder changed while it was listed") from None
                return []

        found: dict[str, int | None] = {}
        for entry in self._patiently(f"listing {self.uri(*parts)}", listed):
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            found[name] = None if entry["type"] == "directory" else int(entry["size"])
        return found

    def size(self, *parts: str) -> int:
        """Bytes of a file."""
        path = self.path(*parts)

        def looked_up() -> int:
            self.fs.invalidate_cache(path)
            return int(self.fs.info(path)["size"])

        return self._patiently(f"looking up {self.uri(*parts)}", looked_up)

    def read(self, *parts: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file, or bytes [start, stop) of it; fewer where it ends before."""
        path = self.path(*parts)
        return self._patiently(
            f"reading {self.uri(*parts)}", lambda: bytes(self.fs.cat_file(path, start=start, end=stop))
        )

    def _patiently(self, what: str, work: Callable[[], T]) -> T:
        """`work()`, again and again, with growing pauses, random so that ranks do not come in step."""
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:
                sentence, kind = explain(error, self.url)
                if sentence and not issubclass(kind, StorageUnreachableError):
                    raise UserError(f"{self.what}: {sentence}") from error
                pause = random.uniform(0.5, 1.0) * min(0.25 * 2**attempt, 10.0)  # noqa: S311 - no secret
                waited = time.monotonic() - started
                why = reason(error, self.url)
                if waited + pause > self.patience:
                    times = "once" if attempt == 1 else f"{attempt} times in {waited:.0f} s"
                    raise StorageUnavailable(f"{what} failed {times}: {why}") from error
                log.warning("%s failed, trying again in %.1f s: %s", what, pause, why)
                time.sleep(pause)
        raise AssertionError("unreachable")

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Stores raise all kinds of exceptions; a writer needs to know one."""
        try:
            yield
        except StorageUnavailable as error:  # after several tries, told by `_patiently`
            raise WriteFailed(str(error)) from error
        except Exception as error:
            raise WriteFailed(f"{what} failed: {reason(error, self.url)}") from error

    @contextmanager
    def create(self, *parts: str, size: int) -> Iterator[Callable[[memoryview], None]]:
        """Write a file of `size` bytes piece by piece with the function given; leaving the block makes it durable.

        The pieces must stay as they are until then.  On an error nothing of it is left, unless the process dies
        with it.
        """
        what = f"writing {parts[-1]}"
        if size <= PART and not self.folders:
            pieces: list[memoryview] = []
            yield pieces.append
            self.put(*parts, data=b"".join(pieces))
        elif hasattr(self.fs, "call_s3"):
            with self._writing(what):
                upload = PartedUpload(
                    self.fs,
                    self.path(*parts),
                    size,
                    lambda detail, work: self._patiently(f"{what}, {detail},", work),
                )
            with self._upload(upload, what) as write:
                yield write
        else:
            with self._stream(what, *parts) as write:
                yield write

    @contextmanager
    def _upload(self, upload: PartedUpload, what: str) -> Iterator[Callable[[memoryview], None]]:
        def write(data: memoryview) -> None:
            with self._writing(what):
                upload.write(data)

        try:
            yield write
            with self._writing(what):
                upload.close()
        except BaseException:
            upload.discard()
            raise

    @contextmanager
    def _stream(self, what: str, *parts: str) -> Iterator[Callable[[memoryview], None]]:
        path = self.path(*parts)
        with self._writing(what):
            self._make_folder(*parts[:-1])
            file = self.fs.open(path, "wb")

        def write(data: memoryview) -> None:
            with self._writing(what):
                file.write(data)

        try:
            yield write
            with self._writing(what):
                if self.local:
                    file.flush()
                    os.fsync(file.fileno())
                file.close()
        except BaseException:
            self._discard(file, path)
            raise

    def _discard(self, file: Any, path: str) -> None:
        """Give up a file half written, without a second error in front of the first."""
        with suppress(Exception):
            if self.local:
                file.close()
            else:
                file.discard()  # tells an object store to forget the parts that it has
        with suppress(Exception):
            file.closed = True  # or fsspec would complete the upload when the object is collected
        if self.folders:
            with suppress(Exception):
                self.fs.rm_file(path)

    def put(self, *parts: str, data: bytes) -> None:
        """Write a whole file: every reader finds the old one or the new one, and it outlasts a power cut.

        Stores that are neither object stores nor local may show a part of it for a moment.
        """
        what = f"writing {parts[-1]}"
        with self._writing(what):
            if self.local:
                self._put(*parts, data=data)
            else:
                self._patiently(what, lambda: self._put(*parts, data=data))

    def put_new(self, *parts: str, data: bytes) -> bool:
        """Write a whole small file unless there is one of that name: whether it was written.

        Atomic on local disks and on object stores with conditional writes (`If-None-Match`); others may let
        two writers pass.
        """

        def written() -> bool:
            self._make_folder(*parts[:-1])
            path = self.path(*parts)
            try:
                if self.local:
                    with open(path, "xb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                else:
                    self.fs.pipe_file(path, data, mode="create")
            except OSError as error:
                # s3fs has no FileExistsError for what some stores say of a condition that does not hold.
                if isinstance(error, FileExistsError) or "PreconditionFailed" in reason(error, self.url):
                    return False
                raise
            return True

        with self._writing(f"writing {parts[-1]}"):
            return self._patiently(f"writing {parts[-1]}", written)

    def _put(self, *parts: str, data: bytes) -> None:
        self._make_folder(*parts[:-1])
        path = self.path(*parts)
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        for depth in range(len(parts)):  # its name is durable when its folder is, and so on up
            _sync_folder(self.path(*parts[: len(parts) - 1 - depth]))

    def _make_folder(self, *parts: str) -> None:
        if self.folders:
            self.fs.makedirs(self.path(*parts), exist_ok=True)

    def remove(self, *parts: str) -> None:
        """Remove a file; nothing happens if it is not there."""
        self._remove_patiently(*parts)

    def remove_folder(self, *parts: str) -> None:
        """Remove a folder with all that is in it; nothing happens if it is not there."""
        self._remove_patiently(*parts, recursive=True)

    def _remove_patiently(self, *parts: str, recursive: bool = False) -> None:
        what, path = f"removing {parts[-1]}", self.path(*parts)
        with self._writing(what):
            self._patiently(what, lambda: self._remove(path, recursive))

    def _remove(self, path: str, recursive: bool = False) -> None:
        self.fs.invalidate_cache(path)
        with suppress(FileNotFoundError):
            if recursive:
                self.fs.rm(path, recursive=True)
            else:
                self.fs.rm_file(path)
        self.fs.invalidate_cache(path)

    def leave_probe(self) -> str:
        """Write a small file; its name.  UserError says what is wrong with the store or the access to it."""
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self._patiently(f"writing to {self.url}", lambda: self._put(name, data=b"may be removed\n"))
        except FileNotFoundError as error:  # a bucket, since a folder would have been made
            raise UserError(f"{self.what}: {reason(error, self.url)}") from error
        return name

    def check_writable(self) -> None:
        """Write a small file and remove it again.  UserError as in `leave_probe`."""
        path = self.path(self.leave_probe())
        self._patiently(f"removing from {self.url}", lambda: self._remove(path))


def _sync_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
