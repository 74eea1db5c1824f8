"""Models on Hugging Face's hub: downloaded when one is asked for, into the cache that the hub's own tools share.

The processes of a machine have one cache, of which the hub's library lets one write a file while the others wait; so a
machine downloads a model once, and what was interrupted goes on from there.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from internlm_trainer.checkpoint import StorageUnavailable
from internlm_trainer.errors import UserError
from internlm_trainer.storage import StorageUnreachableError, explain

HUB = "hf://"
_ADDRESS = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+?))?/?")
_KNOWN = (
    "config.json",
    "*.index.json",
    "tokenizer.model",
    "*.safetensors",
    "model_config.pt",
    "model_tp*.pt",
)
_OLD = ("pytorch_model*.bin",)  # which many repositories have beside safetensors, of the same numbers
_COPY = "give a folder or bucket that it was copied to"
log = logging.getLogger(__name__)


def download(url: str, what: str) -> str:
    """The folder that has the model at `hf://OWNER/NAME[@REVISION][/FOLDER]`, once all its files are there.

    what: with which sentences begin.  Shows bars on a terminal.  Raises UserError, StorageUnavailable.
    """
    found = _ADDRESS.fullmatch(url)
    if not found:
        raise UserError(
            f"{what}: {url} names no model; write hf://OWNER/NAME, then @REVISION and /FOLDER if it has them"
        )
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise UserError(
            f"{what}: {url} is read with huggingface_hub, which is not installed; install it, or {_COPY}"
        ) from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    log.info("downloading %s to %s, unless it is there", url, constants.HF_HUB_CACHE)
    repository, revision, folder = found.groups()
    try:
        for files in (_KNOWN, _OLD):
            path = _fetch(repository, revision, f"{folder}/" if folder else "", files)
            if any((*path.glob("*.safetensors"), *path.glob("model_tp*.pt"))):
                break
    except Exception as error:
        raise _told(error, url, what, repository) from error
    return str(path)


def _fetch(repository: str, revision: str | None, below: str, files: tuple[str, ...]) -> Path:
    """The folder `below` with those of its files whose names match."""
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=[below + name for name in files],
        ignore_patterns=f"{below}*/*",
    )
    return Path(snapshot, below)


def _told(error: Exception, url: str, what: str, repository: str) -> Exception:
    """What went wrong, as an error with a sentence."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{what}: {url} is for those who accepted its conditions; accept them at {hub}/{repository}, and set "
            "HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{what}: {url} is no model at {hub}, or a private one; correct the name, or set HF_TOKEN to a token that "
            "may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{what}: {url} is no revision of {hub}/{repository}; correct it, or leave it out")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{what}: {url} names no model: {reason}")
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return UserError(
            f"{what}: {url} is not in {cache}, and HF_HUB_OFFLINE forbids a download; unset that, or {_COPY}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return StorageUnreachableError(
            f"{what}: {url} is not in {cache}, and {hub} does not answer as it should: {reason}; check the network, "
            f"set HF_ENDPOINT to a mirror, or {_COPY}"
        )
    sentence, kind = explain(error, cache)  # of a disk
    return (
        kind(f"{what}: {sentence}") if sentence else StorageUnavailable(f"downloading {url} failed: {reason}")
    )
