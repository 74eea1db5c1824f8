"""Write what is made from the helm chart: `python manifests/install.py [HELM]`.

That is manifests/install.yaml for kubectl, the chart's README.md, and the renders in tests/charts/golden.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "internlm-operator"
GOLDEN = ROOT / "tests" / "charts" / "golden"
NAMESPACE = "internlm-system"
HEADER = f"""\
# The InternLM operator and all that it needs, in the namespace {NAMESPACE}.
# Made by `make install-manifest` from charts/internlm-operator: change the chart, not this file.
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/warn: restricted
"""
README = """\
# internlm-operator

Installs the operator that runs `InternLMJob`s. How to build the images, install, upgrade and remove it, and what it may
do: [docs/install.md](../../docs/install.md).

```
helm install internlm-operator charts/internlm-operator --namespace internlm-system --create-namespace \\
  --set image.repository=REGISTRY/internlm-operator \\
  --set trainer.image.repository=REGISTRY/internlm-trainer
helm test internlm-operator --namespace internlm-system
```

Needs Kubernetes {kubernetes}. A value that is misspelt or of the wrong type is refused.

| value | default | |
|---|---|---|
{rows}
This file is made from the comments of values.yaml by `make install-manifest`.
"""
KEY = re.compile(r"^( *)([A-Za-z]+):")


def template(helm: str, *arguments: str) -> str:
    """The objects of the chart, as helm would make them."""
    command = [helm, "template", "internlm-operator", str(CHART), f"--namespace={NAMESPACE}", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def install_manifest(helm: str) -> str:
    """The chart with its default values, as one YAML file that kubectl applies."""
    # Nothing of helm's own: kubectl neither knows releases nor tests nor keeps what it is told to delete.
    lines = [line.rstrip() for line in template(helm, "--set=crds.keep=false", "--skip-tests").splitlines()]
    lines = [line for line in lines if line and not line.startswith("# ") and "helm.sh/chart:" not in line]
    return HEADER + "\n".join(lines).replace("managed-by: Helm", "managed-by: kubectl") + "\n"


def commented_values(text: str) -> Iterator[tuple[str, Any, str]]:
    """(path, default, comment) of each value that has a comment of its own above it."""
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        key = KEY.match(line)
        if line.lstrip().startswith("# "):
            comment.append(line.strip(" #"))
            continue
        if key:
            path[len(key[1]) // 2 :] = [key[2]]
            if comment:
                value = yaml.safe_load(text)
                for part in path:
                    value = value[part]
                yield ".".join(path), value, " ".join(comment)
        comment = []


def readme() -> str:
    """The chart's README.md."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    rows = "".join(
        f"| `{path}` | `{json.dumps(default)}` | {comment} |\n"
        for path, default, comment in commented_values((CHART / "values.yaml").read_text())
    )
    return README.format(kubernetes=chart["kubeVersion"].removesuffix("-0"), rows=rows)


def golden(helm: str) -> dict[Path, str]:
    """The chart with each of the values of tests/charts/golden, without the definition, which has its own test."""
    return {
        values.with_name(values.name.replace(".values.", ".")): template(
            helm, "--set=crds.enabled=false", f"--values={values}"
        )
        for values in sorted(GOLDEN.glob("*.values.yaml"))
    }


def outputs(helm: str) -> dict[Path, str]:
    """The text of every file that is made from the chart."""
    made = {ROOT / "manifests" / "install.yaml": install_manifest(helm), CHART / "README.md": readme()}
    return made | golden(helm)


if __name__ == "__main__":
    helm = sys.argv[1] if len(sys.argv) > 1 else shutil.which("helm")
    if helm is None:
        sys.exit("manifests/install.py: helm is not on the PATH; give it: python manifests/install.py HELM")
    for file, text in outputs(helm).items():
        file.write_text(text)
        print(file)
