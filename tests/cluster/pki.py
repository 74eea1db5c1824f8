"""Certificates and kubeconfigs of a test cluster: one authority, and an identity for each component.

Every component has its own name, so that RBAC and the node authorizer decide as they do in production.
"""

from __future__ import annotations

import base64
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DAYS = "30"


def openssl(*arguments: str | Path, stdin: str = "") -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr.strip()[-500:]}")


class Authority:
    """A certificate authority in a folder: ca.crt, ca.key, and NAME.crt, NAME.key of each identity."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / "ca.crt"

    def create(self, address: str, service_address: str) -> None:
        """Make the authority, the API server's certificate and the key that signs service account tokens."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl(
            *("req", "-x509", *curve, "-days", DAYS, "-subj", "/CN=internlm-test"),
            *("-keyout", self.folder / "ca.key", "-out", self.certificate),
        )
        with ThreadPoolExecutor() as pool:
            key = ("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
            tokens = pool.submit(openssl, *key, "-out", self.folder / "tokens.key")
            names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            names += ["kubernetes.default.svc.cluster.local", "localhost"]
            hosts = [f"DNS:{name}" for name in names] + [f"IP:{address}", f"IP:{service_address}"]
            self._sign("apiserver", "/CN=kube-apiserver", f"subjectAltName={','.join(hosts)}")
            tokens.result()

    def identity(self, name: str, user: str, group: str = "") -> tuple[Path, Path]:
        """A client certificate for this user; made once. Returns (certificate, key)."""
        certificate = self.folder / f"{name}.crt"
        if not certificate.exists():
            self._sign(name, (f"/O={group}" if group else "") + f"/CN={user}", "extendedKeyUsage=clientAuth")
        return certificate, self.folder / f"{name}.key"

    def _sign(self, name: str, subject: str, extension: str) -> None:
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(extension + "\n")
        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", subject),
            *("-keyout", self.folder / f"{name}.key", "-out", request),
        )
        openssl(
            *("x509", "-req", "-in", request, "-days", DAYS, "-extfile", extensions, "-CA", self.certificate),
            *(
                "-CAkey",
                self.folder / "ca.key",
                "-set_serial",
                str(int.from_bytes(name.encode()[-15:], "big")),
            ),
            *("-out", self.folder / f"{name}.crt"),
        )
        request.unlink()
        extensions.unlink()

    def kubeconfig(self, path: Path, server: str, name: str, user: str, group: str = "") -> Path:
        """A kubeconfig (JSON, which is YAML) that holds everything, so that it can be copied anywhere."""
        certificate, key = self.identity(name, user, group)

        def inline(file: Path) -> str:
            return base64.b64encode(file.read_bytes()).decode()

        cluster = {"server": server, "certificate-authority-data": inline(self.certificate)}
        credentials = {"client-certificate-data": inline(certificate), "client-key-data": inline(key)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": credentials}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": name, "namespace": "default"}}
            ],
            "current-context": "test",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return path
