"""Muon: what an update is, the same in every layout, and what PyTorch's own makes of the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, hidden_matrices, initialise, parameter_generator
from internlm_trainer.optim.muon import orthogonalised
from trainer.parallel.matrix import apart
from trainer.parallel.ranks import LENGTHS, ROWS, SHAPE, STEPS, run

LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 2, 4), (2, 2, 4), (4, 4, 4)]
SPEC = OptimizerSpec.model_validate({"name": "muon", "weightDecay": 0.1})


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (1, 8)])
def test_an_orthogonalised_matrix_keeps_its_directions_and_loses_its_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(s.clamp(min=0.05 * float(s.max()))) @ vh  # the iteration lifts no tiny ones to 1
    found = u.T @ orthogonalised(matrix) @ vh.T
    assert found.diagonal() == pytest.approx(torch.ones(len(s)), abs=0.35)
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-4
    assert orthogonalised(1e-6 * matrix) == pytest.approx(orthogonalised(matrix), abs=1e-3)
    assert not orthogonalised(torch.zeros(shape)).any()


def test_muon_takes_the_blocks_matrices_and_nothing_else() -> None:
    with torch.device("meta"):
        parameters = dict(InternLM(SHAPE).named_parameters())
    taken = {name: hidden_matrices(name, SHAPE) for name in parameters}
    assert all(sum(rows) == parameters[name].shape[0] for name, rows in taken.items() if rows)
    assert {
        name.split(".", 2)[2]: rows for name, rows in taken.items() if name.startswith("blocks.1.") and rows
    } == {
        "mixer.Wqkv.weight": (64, 32, 32),  # queries, keys and values are matrices of their own
        "mixer.out_proj.weight": (64,),
        "mlp.w1.weight": (128,),
        "mlp.w2.weight": (128,),
        "mlp.w3.weight": (64,),
    }
    assert {name for name, rows in taken.items() if rows} == {
        name for name in parameters if "blocks" in name and decays(name)
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.cuda.is_available():
        pytest.skip("on a machine with GPUs only the reference on a CPU would be comparable")
    folder = tmp_path_factory.mktemp("muon")
    run(folder, 1, ["fp32"], [(1, 1, 1)], SPEC.model_dump_json(by_alias=True))
    run(folder, 4, ["fp32"], LAYOUTS, SPEC.model_dump_json(by_alias=True))
    return folder


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_four_processes_in_any_layout_train_as_one_process_does(
    trained: Path, degrees: tuple[int, int, int]
) -> None:
    reference = torch.load(trained / "1-fp32-1-1-1.pt", weights_only=True)
    ours = torch.load(trained / f"4-fp32-{'-'.join(map(str, degrees))}.pt", weights_only=True)
    # The iteration enlarges the last bit's difference wherever a singular value is small.
    assert all(value <= 1e-5 for value in apart(ours, reference))


def test_the_weights_are_those_of_pytorchs_muon_and_adamw(trained: Path) -> None:
    ours = torch.load(trained / "1-fp32-1-1-1.pt", weights_only=True)
    first, reference = _reference()
    names = sorted(reference)
    assert sorted(ours["weights"]) == names
    for kind in (True, False):
        moved, error = 0.0, 0.0
        for name in names:
            if bool(hidden_matrices(name, SHAPE)) == kind:
                moved += float((reference[name] - first[name]).square().sum())
                error += float((ours["weights"][name] - reference[name]).square().sum())
        # PyTorch's iterates in bf16, which has 8 bits, and every step sees the difference of those before.
        assert error < 0.03**2 * moved, f"{json.dumps(kind)}: {error} of {moved}"


def _reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, of the training that ranks.py does, by PyTorch's optimizers in one process."""
    model = InternLM(SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter, SHAPE.layers, parameter_generator(name, 0, parameter))
    first = {name: parameter.detach().clone().flatten() for name, parameter in model.named_parameters()}
    # Matrices as parameters of their own that share the model's memory; their gradients are cut the same way.
    cuts = {name: hidden_matrices(name, SHAPE) for name in first}
    matrices = {
        name: [torch.nn.Parameter(part) for part in parameter.detach().split(cuts[name])]
        for name, parameter in model.named_parameters()
        if cuts[name]
    }
    others = [(name, parameter) for name, parameter in model.named_parameters() if not cuts[name]]
    muon = torch.optim.Muon(
        [part for parts in matrices.values() for part in parts],
        lr=1e-3,
        weight_decay=SPEC.weight_decay,
        momentum=SPEC.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in others if decays(n)], "weight_decay": SPEC.weight_decay},
            {"params": [p for n, p in others if not decays(n)], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(SPEC.betas[0], SPEC.betas[1]),
        eps=SPEC.eps,
    )
    documents, tokens = Documents.of(LENGTHS, torch.device("cpu")), sum(LENGTHS)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        model.zero_grad()
        for row in torch.randint(0, SHAPE.vocab_size, (ROWS, tokens), generator=generator):
            logits = model(row, documents)[:-1]
            (F.cross_entropy(logits, row[1:], reduction="sum") / (ROWS * (tokens - 1))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, parameter in model.named_parameters():
            if cuts[name]:
                assert parameter.grad is not None
                for part, gradient in zip(matrices[name], parameter.grad.split(cuts[name]), strict=True):
                    part.grad = gradient
        muon.step()
        adamw.step()
    return first, {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
