"""Write manifests/install.yaml, for kubectl, from the helm chart: `python manifests/install.py [HELM]`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

MANIFESTS = Path(__file__).resolve().parent
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


def install_manifest(helm: str) -> str:
    """The chart with its default values, as one YAML file that kubectl applies."""
    command = [helm, "template", "internlm-operator", str(MANIFESTS.parent / "charts" / "internlm-operator")]
    # Nothing of helm's own: kubectl neither knows releases nor keeps what it is told to delete.
    command += [f"--namespace={NAMESPACE}", "--set=crds.keep=false"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("# ") and "helm.sh/chart:" not in line]
    return HEADER + "\n".join(lines).replace("managed-by: Helm", "managed-by: kubectl") + "\n"


if __name__ == "__main__":
    helm = sys.argv[1] if len(sys.argv) > 1 else shutil.which("helm")
    if helm is None:
        sys.exit("manifests/install.py: helm is not on the PATH; give it: python manifests/install.py HELM")
    (MANIFESTS / "install.yaml").write_text(install_manifest(helm))
    print(MANIFESTS / "install.yaml")
