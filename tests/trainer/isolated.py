"""Whether code that a model writes can be kept apart on this machine."""

from __future__ import annotations

from internlm_trainer import sandbox
from internlm_trainer.errors import UserError


def can_isolate() -> bool:
    try:
        return bool(sandbox.isolation())
    except UserError:
        return False
