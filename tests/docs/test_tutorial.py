"""The tutorials do what they say: every file in them is written, and every command run, in the order of the pages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ports import free_port

PAGES = Path(__file__).parents[2] / "docs" / "tutorial"
ORDER = ("pretrain", "export", "evaluate", "continue", "finetune", "chat", "serve")
_BLOCK = re.compile(r"^```(?P<kind>\w+)(?: (?P<file>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(name: str, folder: Path) -> str:
    """What the commands of a page print."""
    printed, port = "", str(free_port())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    for block in _BLOCK.finditer((PAGES / f"{name}.md").read_text().replace("8000", port)):
        if block["file"]:
            file = folder / block["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"])
            continue
        assert block["kind"] == "bash", f"{name}.md: a block that is neither a file nor run: {block[0]}"
        command = ["bash", "-euo", "pipefail", "-c", block["text"]]
        with subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as shell:
            try:
                out, error = shell.communicate()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)  # what a page that failed has left
        assert shell.returncode == 0, f"{name}.md: {block['text']}\n{out}\n{error}"
        printed += out
    return printed


def test_every_page_runs(tmp_path: Path) -> None:
    assert sorted(ORDER) == sorted(page.stem for page in PAGES.glob("*.md"))
    printed = {name: run_page(name, tmp_path) for name in ORDER}
    assert "saved run/checkpoints/step-00000040" in printed["pretrain"]
    assert "model.safetensors" in printed["export"]
    assert "byte_perplexity" in printed["evaluate"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert "saved continued/step-00000010" in printed["continue"]
    assert "2 samples" in printed["finetune"]
    assert printed["finetune"].rstrip().endswith("A parser."), "it was taught to say so"
    assert printed["chat"].count("A parser.") >= 2
    assert "2 questions" in printed["chat"]
    assert printed["serve"] == "A parser.\n"
