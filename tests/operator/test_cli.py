"""The operator's command line: what it needs, and what it says when it lacks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from internlm_operator import __version__
from ports import free_port

COMMAND = [sys.executable, "-c", "from internlm_operator.cli import main; main()"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("KUBE")}
    return subprocess.run(
        [*COMMAND, *arguments], env=own | environment, capture_output=True, text=True, timeout=60
    )


def test_the_operator_runs_without_torch() -> None:
    check = "import sys, internlm_operator.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_the_version_is_printed() -> None:
    assert run("--version").stdout.strip() == __version__


def test_the_trainer_image_must_be_given() -> None:
    done = run("run")
    assert done.returncode == 2
    assert "--trainer-image" in done.stderr


def test_without_a_cluster_the_operator_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = run("run", "--trainer-image=x", "--log-format=text", HOME=str(tmp_path))
    assert done.returncode == 1
    assert "found no service account and no kubeconfig" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_api_server_that_cannot_be_reached_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text(
        "{apiVersion: v1, kind: Config, current-context: c, users: [{name: u, user: {token: t}}],"
        " clusters: [{name: k, cluster: {server: 'https://127.0.0.1:9'}}],"
        " contexts: [{name: c, context: {cluster: k, user: u}}]}"
    )
    done = run(
        "run", "--trainer-image=x", "--log-format=text", f"--liveness={free_port()}",
        KUBECONFIG=str(tmp_path / "kubeconfig"), HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    assert "the API server cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_rules_that_are_no_network_policy_are_refused() -> None:
    for text, sentence in (
        ("{", "is no JSON"),
        ('{"from": []}', "must be an object with ingress and egress"),
    ):
        done = run("run", "--trainer-image=x", f"--network-policy={text}")
        assert done.returncode == 2
        assert sentence in " ".join(done.stderr.replace("│", "").split())
