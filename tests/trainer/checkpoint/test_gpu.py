"""On a GPU: the copy that a save is written from."""

from __future__ import annotations

import time

import pytest
import torch

from internlm_trainer.checkpoint import CheckpointStore, Piece, Snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_copy_is_page_locked_whole_and_what_is_loaded_gets_back_to_the_gpu(tmp_path):
    size = 3 * (1 << 28) // 4 + 1  # no power of two
    values = {kind: torch.randn(size, device="cuda").to(dtype) for kind, dtype in DTYPES.items()}
    snapshot = Snapshot()
    for turn in range(3):
        began = time.monotonic()
        snapshot.take(pieces(values))
        seconds = time.monotonic() - began
        print(f"copy {turn}: {snapshot.bytes / 1e9:.2f} GB in {seconds:.3f} s")
    assert snapshot._image.is_pinned()
    expected = {kind: tensor.clone() for kind, tensor in values.items()}
    for tensor in values.values():
        tensor.zero_()  # training goes on
    store = CheckpointStore(str(tmp_path), {}, 1, "job")
    store.commit(1, [store.write_shard(1, 0, snapshot)], {}, {"w": (size,)})
    snapshot.restore(store.open(1), pieces(values))
    assert all(torch.equal(values[kind], expected[kind]) for kind in DTYPES)
    snapshot.release()


DTYPES = {"master": torch.float32, "exp_avg": torch.bfloat16}


def pieces(values: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(kind, "w", 0, len(tensor), tensor) for kind, tensor in values.items()]
