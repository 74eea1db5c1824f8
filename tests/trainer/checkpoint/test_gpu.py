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


def test_copies_run_beside_training_whose_update_waits_for_them_on_the_gpu():
    values = {kind: torch.randn(1 << 28, device="cuda").to(dtype) for kind, dtype in DTYPES.items()}
    expected = {kind: tensor.cpu() for kind, tensor in values.items()}
    snapshot = Snapshot()
    snapshot.prepare(pieces(values))
    factor = torch.randn(8192, 8192, device="cuda")
    factor @ factor  # loads what it needs
    torch.cuda.synchronize()
    began = time.monotonic()
    snapshot.begin(pieces(values))
    factor @ factor  # the next step
    held = snapshot.hold()
    for tensor in values.values():
        tensor.zero_()
    seconds = time.monotonic() - began
    snapshot.finish()
    torch.cuda.synchronize()
    assert held
    waits_from, waits_to = held
    assert seconds < waits_from.elapsed_time(waits_to) / 1000  # the host went on while the GPU waited
    image = torch.frombuffer(bytearray(b"".join(snapshot.chunks())), dtype=torch.uint8)
    for entry in snapshot.pieces:
        copied = image[entry.offset : entry.offset + expected[entry.kind].nbytes]
        assert torch.equal(copied.view(DTYPES[entry.kind]), expected[entry.kind])
    assert not any(tensor.any() for tensor in values.values())
    snapshot.release()


DTYPES = {"master": torch.float32, "exp_avg": torch.bfloat16}


def pieces(values: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(kind, "w", 0, len(tensor), tensor) for kind, tensor in values.items()]
