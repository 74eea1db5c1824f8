"""The chart as helm renders it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "internlm-operator"
NAMESPACE = "chart-test"


def render(helm: str, *arguments: str, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """The chart's objects; RuntimeError with helm's words if it refuses."""
    done = subprocess.run(
        [helm, "template", "internlm-operator", str(CHART), f"--namespace={namespace}", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def pod_template(objects: list[dict[str, Any]]) -> dict[str, Any]:
    [deployment] = [o for o in objects if o["kind"] == "Deployment"]
    template: dict[str, Any] = deployment["spec"]["template"]
    return template
