"""Paths and URLs: one way to open them, one sentence for what goes wrong."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fsspec.config import conf

from internlm_trainer.errors import UserError
from internlm_trainer.storage import (
    StorageUnreachableError,
    is_local,
    join,
    open_fs,
    remove_leftovers,
    user_errors,
    write_whole,
)
from ports import free_port
from trainer.conftest import CUT, HANG, FaultProxy


def read(url: str) -> bytes:
    fs, path = open_fs(url)
    return bytes(fs.cat_file(path))


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("/data", ["a", "b.bin"], "/data/a/b.bin"),
        ("/data/", ["a/"], "/data/a"),
        ("s3://bucket", ["step-1", "", "/x"], "s3://bucket/step-1/x"),
        ("memory://", ["x"], "memory://x"),
        ("zip://inner::s3://bucket/x.zip", ["y"], "zip://inner/y::s3://bucket/x.zip"),
        ("relative", [], "relative"),
    ],
)
def test_join_adds_parts_with_single_slashes(url: str, parts: list[str], joined: str) -> None:
    assert join(url, *parts) == joined


@pytest.mark.parametrize(
    ("url", "local"),
    [("x", True), ("~/x", True), ("file:///x", True), ("memory://x", False), ("zip://a::/x.zip", False)],
)
def test_only_plain_files_are_local(url: str, local: bool) -> None:
    assert is_local(url) is local


def test_a_path_and_its_file_url_are_the_same_file(tmp_path: Path) -> None:
    with write_whole(f"file://{tmp_path}/folder/x") as file:
        file.write(b"text")
    assert read(str(tmp_path / "folder" / "x")) == b"text"


def test_home_and_relative_paths_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_fs("~/x")[1] == open_fs("x")[1] == str(tmp_path / "x")


def test_storage_is_cheap_to_import() -> None:
    heavy = {"torch", "fsspec", "botocore", "numpy"}
    script = f"import sys, internlm_trainer.storage; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense://x", ["nonsense://x", "nonsense:// is not known", "s3://"]),
        ("gs://bucket/x", ["gs://bucket/x", "not installed", "gcsfs"]),
    ],
)
def test_a_protocol_without_driver_says_what_to_install(url: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        open_fs(url)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file"), ["does not exist"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["no space left", "free some"]),
        (OSError(errno.EDQUOT, "Quota exceeded"), ["no space left"]),
        (OSError(errno.EROFS, "Read-only file system"), ["read-only"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), ["is a folder"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), ["folder was expected"]),
        (PermissionError(errno.EACCES, "Permission denied"), ["no permission", f"user id {os.getuid()}"]),
    ],
)
def test_an_operating_system_error_becomes_a_sentence_with_the_place(
    error: OSError, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught, user_errors("/data/x", "data.train[0].path"):
        raise error
    assert str(caught.value).startswith("data.train[0].path: ")
    for word in ["/data/x", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "500"), KeyError("x"), TimeoutError(), ValueError("bug")]
)
def test_an_error_that_is_not_the_users_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, user_errors("/data/x", "data"):
        raise error
    assert caught.value is error


def test_a_sentence_is_not_wrapped_in_another_one() -> None:
    with pytest.raises(UserError, match=r"^first$"), user_errors("/data/x", "data"):
        raise UserError("first")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    url = f"{tmp_path}/none.model"
    with (
        pytest.raises(UserError, match=r"data\.tokenizer: .*/none\.model does not exist"),
        user_errors(url, "data.tokenizer"),
    ):
        read(url)


# ---- S3, against a real server


@pytest.fixture
def s3(minio) -> str:
    """URL of an empty bucket of a real S3 server, for which the environment has the keys."""
    return str(minio.bucket())


def test_s3_takes_its_endpoint_and_keys_from_the_environment(s3: str) -> None:
    with write_whole(join(s3, "folder", "x")) as file:
        file.write(b"text")
    assert read(join(s3, "folder", "x")) == b"text"


def test_s3_needs_no_region(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION", raising=False)
    fs, _ = open_fs(s3)
    fs.clear_instance_cache()
    with write_whole(join(s3, "x")) as file:
        file.write(b"text")
    assert read(join(s3, "x")) == b"text"


def test_a_listing_shows_what_another_process_wrote(s3: str) -> None:
    fs, path = open_fs(s3)
    assert fs.ls(path) == []
    script = "import sys, internlm_trainer.storage as s\nwith s.write_whole(sys.argv[1]) as f: f.write(b'x')"
    subprocess.run([sys.executable, "-c", script, join(s3, "new")], check=True)
    assert [Path(name).name for name in fs.ls(path, detail=False)] == ["new"]


S3_MISTAKES = {
    "a key that the server does not know": (
        {"AWS_ACCESS_KEY_ID": "nobody"},
        ["AWS_ACCESS_KEY_ID", "credentials"],
    ),
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, ["AWS_SECRET_ACCESS_KEY", "credentials"]),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": "true"},
        ["no credentials", "AWS_ACCESS_KEY_ID"],
    ),
    "an endpoint that is no URL": ({"AWS_ENDPOINT_URL": "localhost:9000"}, ["AWS_ENDPOINT_URL", "http://"]),
}


@pytest.mark.parametrize("mistake", S3_MISTAKES)
@pytest.mark.parametrize("operation", ["list", "read", "write"])
def test_wrong_s3_settings_are_said(
    s3: str, mistake: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, words = S3_MISTAKES[mistake]
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(UserError) as caught:
        use_s3(join(s3, "x"), operation)
    assert str(caught.value).startswith("checkpoint.path: ")
    if operation == "read":
        words = words[-1:]  # the answer to HEAD has no body, so the store cannot say which part is wrong
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("operation", ["list", "read", "write"])
def test_a_bucket_that_does_not_exist_is_said_with_the_endpoint(minio, operation: str) -> None:
    with pytest.raises(UserError) as caught:
        use_s3(f"s3://no-{secrets.token_hex(4)}/x", operation)
    for word in ["the bucket of s3://no-", "does not exist", minio.endpoint, "create it"]:
        assert word in str(caught.value)


def test_a_name_that_no_bucket_can_have_is_said(minio) -> None:  # noqa: ARG001
    with pytest.raises(UserError, match="names no valid bucket"):
        use_s3("s3://B!/x", "list")


def test_an_object_that_does_not_exist_is_said(s3: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.path: s3://.*/none does not exist"):
        use_s3(join(s3, "none"), "read")


def test_a_store_that_cannot_be_reached_is_told_apart_since_a_retry_may_help(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        StorageUnreachableError, match=r"cannot be reached at http://127\.0\.0\.1:.*AWS_ENDPOINT"
    ):
        use_s3(join(s3, "x"), "list")


@pytest.mark.parametrize("fault", [500, 503, CUT, HANG])
def test_who_tries_again_by_himself_has_each_request_sent_once(
    fault_proxy: FaultProxy, s3: str, fault: int
) -> None:
    sent: list[str] = []

    def count(method: str, path: str) -> int:
        sent.append(f"{method} {path}")
        return fault

    fs, path = open_fs(s3, retries=False)
    fault_proxy.fault = count
    for request in (
        lambda: fs.cat_file(f"{path}/x", start=0, end=9),
        lambda: fs.call_s3("upload_part", Bucket=path, Key="x", UploadId="y", PartNumber=1, Body=b"x"),
        lambda: fs.ls(path),
    ):
        sent.clear()
        with suppress(Exception):
            request()
        # A connection that is used again and found closed is made anew by aiohttp, once.
        assert 1 <= len(sent) <= (2 if fault in (CUT, HANG) else 1)
    if fault == 503:
        sent.clear()
        with suppress(OSError):
            open_fs(s3)[0].cat_file(f"{path}/x")  # all others leave it to the driver
        assert len(sent) > 1


def test_what_the_user_tells_the_driver_is_kept(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = {"total_max_attempts": 1}
    assert open_fs(s3, retries=False)[0].config_kwargs == {"retries": once}
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 3}, "max_concurrency": 2})
    fs, _ = open_fs(s3, retries=False)
    assert fs.config_kwargs == {"retries": once, "read_timeout": 3}
    assert fs.max_concurrency == 2


def use_s3(url: str, operation: str) -> None:
    fs, _ = open_fs(url)
    fs.clear_instance_cache()
    with user_errors(url, "checkpoint.path"):
        fs, path = open_fs(url)
        if operation == "list":
            fs.find(path)
        elif operation == "read":
            fs.cat_file(path)
        else:
            with write_whole(url) as file:
                file.write(b"x")


# ---- writing whole files


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(4)}"


@pytest.mark.parametrize("size", [0, 10, 12 << 20])
def test_a_file_is_there_once_it_is_whole(folder: str, size: int) -> None:
    url, content = join(folder, "x"), os.urandom(size)
    with write_whole(url) as file:
        for start in range(0, size, 1 << 20):
            file.write(content[start : start + (1 << 20)])
        fs, path = open_fs(url)
        assert not fs.exists(path)
    assert read(url) == content


@pytest.mark.parametrize("size", [0, 10, 12 << 20])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(folder: str, size: int) -> None:
    url = join(folder, "x")
    with write_whole(url) as file:
        file.write(b"old")
    with suppress(KeyError), write_whole(url) as file:
        file.write(os.urandom(size))
        raise KeyError
    assert read(url) == b"old"
    fs, path = open_fs(folder)
    assert [Path(name).name for name in fs.ls(path, detail=False)] == ["x"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    with write_whole(url) as file:
        file.write(b"old")
    script = (
        "import os, signal, sys, internlm_trainer.storage as s\n"
        "with s.write_whole(sys.argv[1]) as f:\n"
        "    f.write(b'new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, url]).returncode == -signal.SIGKILL
    assert read(url) == b"old"


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "with [brackets]"
    folder.mkdir()
    for name in ("x.0a1b2c3d.tmp", "x.e4f5a6b7.tmp", "x", "x.tmp", "y.0a1b2c3d.tmp", "x.notes.tmp"):
        (folder / name).write_text("")
    remove_leftovers(str(folder / "x"))
    assert sorted(p.name for p in folder.iterdir()) == ["x", "x.notes.tmp", "x.tmp", "y.0a1b2c3d.tmp"]
    remove_leftovers(str(tmp_path / "no such folder" / "x"))
