"""Paths and URLs as fsspec file systems, and what goes wrong there as sentences for the user.

Everything that the trainer reads or writes (text, tokenized data, tokenizers, checkpoints) is named by a
string: a local path, `file://`, `memory://`, `s3://` or any other protocol that fsspec knows.  Credentials
and endpoints come from the environment, which the driver reads itself; for `s3://` these are the `AWS_*`
variables, with `AWS_ENDPOINT_URL` for stores other than Amazon's.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from internlm_trainer.errors import UserError

# Drivers of object stores keep folder listings; a reader must see what another process has just written.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_LOCAL_PROTOCOLS = {"file", "local"}

_NO_BUCKET = {"NoSuchBucket"}
_BAD_KEY = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
_FORBIDDEN = {"AccessDenied", "AllAccessDisabled", "403", "401"}
_BAD_NAME = {"InvalidBucketName"}
_CLOCK = {"RequestTimeTooSkewed"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError"}
_UNREACHABLE = {
    "ClientConnectorCertificateError",
    "ClientConnectorDNSError",
    "ClientConnectorError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "ProxyConnectionError",
    "SSLError",
}


class StorageUnreachableError(UserError):
    """The store did not answer: its address is wrong, or it is down for a while, so that a retry may help."""


def open_fs(url: str, *, retries: bool = True) -> tuple[Any, str]:
    """The fsspec file system that `url` names, and the path in it.

    Local paths may be relative or start with `~`; missing folders of local files that are written are made,
    as if it were an object store.  `retries`: False for a caller that tries failed requests again by itself, so that
    S3's driver does not, which takes minutes for one that hangs.  Raises UserError for an unknown protocol or one
    whose driver is not installed.
    """
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    protocol = _protocol(url)
    once = not retries and _is_s3(url) and "::" not in url
    options: dict[str, Any] = {}
    if "::" not in url:
        if protocol in _OBJECT_STORES:
            options["use_listings_cache"] = False
        elif protocol in _LOCAL_PROTOCOLS:
            options["auto_mkdir"] = True
    if once:
        # An argument takes the place of what the user's own configuration of fsspec says.
        own = (conf.get("s3", {}) | conf.get("s3a", {})).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | own
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{url}: the driver of {protocol}:// is not installed: {error}") from error
    except ValueError as error:
        if "rotocol not known" not in str(error):
            raise UserError(f"{url}: {error}") from error
        raise UserError(
            f"{url}: the protocol {protocol}:// is not known; use a path, file://, s3:// or another one of "
            "fsspec's, or install the package that provides it"
        ) from error
    if once:
        fs.retries = 1  # how often s3fs tries what botocore has given up
    return fs, path


def is_local(url: str) -> bool:
    """Whether `url` is on this machine's file system, so that its files can be memory-mapped."""
    return "::" not in url and _protocol(url) in _LOCAL_PROTOCOLS


def stamp_of(info: Mapping[str, Any]) -> str:
    """Of a file's entry in a listing, what changes when its content does; empty if its store tells nothing."""
    return str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created") or "")


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it; the end of a chained URL (`zip://inner::s3://outer`) is kept."""
    head, chain, tail = url.partition("::")
    for part in parts:
        part = part.strip("/")
        if part:
            head = head + part if head.endswith("/") else f"{head}/{part}"
    return head + chain + tail


def glob_regex(url: str) -> re.Pattern[str]:
    """What the paths match that a URL with `*`, `?`, `[...]` and `**` stands for, as `fs.glob` reads it."""
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(open_fs(url)[1]))


def remove_leftovers(url: str) -> None:
    """Remove what killed processes left of `write_whole(url)`.  No other process may be writing it."""
    fs, path = open_fs(url)
    folder, _, name = path.rpartition("/")
    leftover = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.tmp")
    with suppress(FileNotFoundError, NotADirectoryError):
        for found in fs.ls(folder, detail=False):
            if leftover.fullmatch(found.rsplit("/", 1)[-1]):
                fs.rm_file(found)


@contextmanager
def write_whole(url: str) -> Iterator[IO[bytes]]:
    """A file open for writing that appears under its name only when the block ends, and then whole.

    A process killed in the block, or an error in it, leaves the file that was there before, if any.  Object
    stores promise this of an upload; elsewhere the bytes go to a name beside it, which is renamed at the end.
    """
    fs, path = open_fs(url)
    if _protocol(url) in _OBJECT_STORES and "::" not in url:
        # Without autocommit=False, leaving the block by an error would complete the upload.
        file = fs.open(path, "wb", autocommit=False)
        try:
            yield file
        except BaseException:
            file.discard()
            file.closed = True  # or its finalizer would upload what is left of it
            raise
        file.close()
        file.commit()
        return
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with fs.open(temporary, "wb") as file:
            yield file
            file.flush()
            if is_local(url):
                os.fsync(file.fileno())
        if is_local(url):
            os.replace(temporary, path)
        else:
            fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(temporary)
        raise


@contextmanager
def user_errors(url: str, what: str) -> Iterator[None]:
    """Turn storage errors of the block into UserError sentences `what: ... url ...`.

    `what` is the job's field (`data.tokenizer`) or the thing in words (`the checkpoint`).  Errors that are
    not the user's (a store that answers 500, a connection that breaks in mid-transfer, a bug) pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence, kind = explain(error, url)
        if sentence:
            raise kind(f"{what}: {sentence}") from error
        raise


def explain(error: BaseException, url: str) -> tuple[str | None, type[UserError]]:
    """A sentence about `url` for an error that the user can mend, and its type; (None, UserError) for others.

    Drivers are recognised by the names of their exceptions, so that none of them has to be imported.
    """
    chain = _chain(error)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    codes = {code for link in chain if (code := _service_code(link))}
    endpoint = _endpoint(url)
    sentence: str | None
    if codes & _NO_BUCKET:
        sentence = f"the bucket of {url} does not exist{endpoint}; create it or correct its name"
    elif codes & _BAD_NAME or "ParamValidationError" in names:
        sentence = (
            f"{url} names no valid bucket; a bucket has 3 to 63 lower-case letters, digits, dots or dashes"
        )
    elif codes & _BAD_KEY:
        reason = sorted(codes & _BAD_KEY)[0]
        sentence = (
            f"the store refuses the credentials for {url}{endpoint} ({reason}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and, if it is used, AWS_SESSION_TOKEN"
        )
    elif codes & _CLOCK:
        sentence = f"the store refuses requests for {url}: this machine's clock is wrong; set it"
    elif names & _NO_CREDENTIALS:
        sentence = (
            f"there are no credentials for {url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "another source of credentials that the driver reads"
        )
    elif names & _UNREACHABLE or isinstance(error, ConnectionRefusedError):
        hint = (
            "check AWS_ENDPOINT_URL and the network" if _is_s3(url) else "check the address and the network"
        )
        return f"the store of {url} cannot be reached{endpoint}; {hint}", StorageUnreachableError
    elif isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        sentence = f"AWS_ENDPOINT_URL is no URL ({error}); write it with http:// or https://"
    elif codes & _FORBIDDEN or isinstance(error, PermissionError):
        sentence = _forbidden(url, endpoint)
    else:
        sentence = _explain_os_error(error, url, endpoint)
    return sentence, UserError


def _forbidden(url: str, endpoint: str) -> str:
    if is_local(url):
        return f"this process (user id {os.getuid()}) has no permission for {url}; change its owner or mode"
    return (
        f"access to {url} is denied{endpoint}; the credentials are wrong or lack the right to list, read or "
        "write it"
    )


def _explain_os_error(error: BaseException, url: str, endpoint: str) -> str | None:
    if isinstance(error, FileNotFoundError):
        return f"{url} does not exist{endpoint}; correct the path or create it"
    if isinstance(error, IsADirectoryError):
        return f"{url} is a folder, where a file was expected"
    if isinstance(error, FileExistsError):
        return f"{url} is a file, where a folder was expected; choose another path"
    if isinstance(error, NotADirectoryError):
        return f"{url} has a file in its path where a folder was expected"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"there is no space left to write {url}; free some or choose another place"
    if code == errno.EROFS:
        return f"{url} is on a read-only file system; choose another place"
    if code == errno.ENAMETOOLONG:
        return f"{url} is too long a name for its file system"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, nearest first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    return chain


def _service_code(error: BaseException) -> str | None:
    """The code of a botocore ClientError, such as `NoSuchBucket`."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    code = response.get("Error", {}).get("Code")
    return str(code) if code else None


def _protocol(url: str) -> str:
    return url.split("://", 1)[0] if "://" in url else "file"


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _endpoint(url: str) -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint and _is_s3(url) else ""
