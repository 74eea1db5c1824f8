"""Models are read from Hugging Face's hub: here a small server on the loopback that answers what its library asks."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.weights.export import export_llama
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import CheckpointWeights
from ports import free_port
from trainer.weights.models import SHAPES, assert_equal, content, random_weights, save

SHAPE, COMMIT = SHAPES["InternLM2"], "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL; it has the model `some/model`, the conditions of `some/gated` are not accepted."""
    folder = tmp_path_factory.mktemp("hub")
    made = CheckpointWeights(open_one(save(str(folder / "first"), SHAPE, random_weights(SHAPE))))
    export_llama(made, str(folder / "hf"), "bf16", None, 64, largest_file=300_000)
    files = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            known = path.startswith(("/api/models/some/model", "/api/models/some/gated"))
            if known and "/tree/" in path:
                self._answer(200, json.dumps([entry(name, data) for name, data in files.items()]).encode())
            elif known:
                self._answer(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith(f"/some/model/resolve/{COMMIT}/"):
                self._answer(200, files[path.rsplit("/", 1)[1]])
            elif path.startswith("/some/gated/resolve/"):
                self._answer(403, b"", "GatedRepo")
            else:
                self._answer(404, b"", "RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, data: bytes, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:08x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": f"{hash(data) & 0xFFFFFFFF:040x}"}


def imported(hub: str, url: str, folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code of `internlm import`, and what it prints on a terminal."""
    ours, theirs = pty.openpty()
    own = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "internlm_trainer.cli", "import", url, str(folder / "out")]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | own | environment)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 1 << 16):
            said += part
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    return process.wait(), said.decode()


def test_a_model_is_downloaded_with_a_bar_and_imported(hub: str, tmp_path: Path) -> None:
    code, said = imported(hub, "hf://some/model", tmp_path)
    assert code == 0, said
    assert "100%" in said
    assert "hf://some/model: " in said
    assert_equal(content(open_weights(str(tmp_path / "out"), "SOURCE")), random_weights(SHAPE))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("hf://some", "hf://some names no model; write hf://OWNER/NAME"),
        ("hf://some/modle", "hf://some/modle is no model at"),
        ("hf://some/gated", "hf://some/gated is for those who accepted its conditions"),
    ],
)
def test_what_the_hub_does_not_give_is_told(hub: str, tmp_path: Path, url: str, sentence: str) -> None:
    code, said = imported(hub, url, tmp_path)
    assert (code, sentence in said) == (65, True), said
    assert not (tmp_path / "out").exists()


def test_without_a_network_or_a_download_that_is_told(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    code, said = imported(nobody, "hf://some/model", tmp_path)
    assert (code, "does not answer as it should" in said) == (65, True), said
    code, said = imported(nobody, "hf://some/model", tmp_path, HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE forbids a download" in said) == (65, True), said


def test_without_its_library_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from internlm_trainer.errors import UserError

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="is read with huggingface_hub, which is not installed"):
        open_weights("hf://some/model", "SOURCE")
