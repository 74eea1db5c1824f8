"""What goes into a bundle for support, and what is taken out of it: secrets.  Pure.

Secrets are never read.  What may hold one all the same is removed: values of environment variables that are not
known to be harmless, wherever else their text occurs, and text that looks like a credential.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from internlm_operator.objects import Object

REMOVED = "(removed)"
# A shorter value would blank half of the log when it is looked for elsewhere.
SHORTEST_SECRET = 6
HARMLESS = re.compile(
    r"^(INTERNLM|NCCL|TORCH|TORCHELASTIC|PYTHON|CUDA|OMP|UCX|GLOO)_?[A-Z0-9_]*$"
    r"|^(HOME|AWS_ENDPOINT_URL|AWS_DEFAULT_REGION|AWS_REGION)$"
)
SECRET_NAME = re.compile(r"TOKEN$|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
CREDENTIALS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@ of a URL
    r"|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+"  # a JSON web token
    r"|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|(?<=Bearer )[\w.~+/-]{8,}=*"
    r"|(?i:(?<=secret_access_key)|(?<=password)|(?<=api_key))[\"']?\s*[=:]\s*[\"']?[^\s\"',}]+",
    re.DOTALL,
)


def clean(resource: Object) -> tuple[Object, set[str]]:
    """The object without values of environment variables, and what was taken out."""
    removed: set[str] = set()
    return _clean(resource, removed), removed


def _clean(value: Any, removed: set[str]) -> Any:
    if isinstance(value, list):
        return [_clean(item, removed) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("name"), str) and isinstance(value.get("value"), str):
        name = value["name"]
        if not HARMLESS.match(name) or SECRET_NAME.search(name):
            removed.add(value["value"])
            return {**value, "value": REMOVED}
    # The last applied configuration is the whole object again, as one text.
    hidden = ("managedFields", "kubectl.kubernetes.io/last-applied-configuration")
    return {key: _clean(item, removed) for key, item in value.items() if key not in hidden}


def scrub(text: str, secrets: Iterable[str]) -> str:
    """The text without these values, and without what looks like a credential."""
    for secret in sorted((s for s in secrets if len(s) >= SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    return CREDENTIALS.sub(REMOVED, text)


def files(objects: Mapping[str, list[Object]], texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(name, text) of each file: objects as YAML, by file name, and logs and other texts."""
    cleaned: dict[str, list[Object]] = {}
    secrets: set[str] = set()
    for name, items in objects.items():
        cleaned[name] = []
        for item in items:
            kept, removed = clean(item)
            cleaned[name].append(kept)
            secrets |= removed
    for name, items in cleaned.items():
        yield name, scrub(yaml.safe_dump_all(items, sort_keys=False), secrets)
    for name, text in texts.items():
        yield name, scrub(text, secrets)


def archive(folder: str, contents: Iterable[tuple[str, str]], time: float) -> bytes:
    """A tar.gz with these files in one folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in contents:
            data = text.encode()
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time), 0o600
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
