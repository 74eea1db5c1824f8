"""Sharded checkpoints in any store that fsspec knows: committed by a manifest, loaded into any layout."""

from internlm_trainer.checkpoint.errors import BadCheckpoint, SaveFailed, StorageUnavailable
from internlm_trainer.checkpoint.format import ShardEntry, step_name
from internlm_trainer.checkpoint.load import Checkpoint, CommittedCheckpoint, open_checkpoint
from internlm_trainer.checkpoint.resume import Alone, Collective, check_store, claim_store, newest_good
from internlm_trainer.checkpoint.saver import Failed, Saved, Saver
from internlm_trainer.checkpoint.snapshot import Snapshot
from internlm_trainer.checkpoint.store import CheckpointStore
from internlm_trainer.checkpoint.tensors import Piece, Want

__all__ = [
    "Alone",
    "BadCheckpoint",
    "Checkpoint",
    "CheckpointStore",
    "Collective",
    "CommittedCheckpoint",
    "Failed",
    "Piece",
    "SaveFailed",
    "Saved",
    "Saver",
    "ShardEntry",
    "Snapshot",
    "StorageUnavailable",
    "Want",
    "check_store",
    "claim_store",
    "newest_good",
    "open_checkpoint",
    "step_name",
]
