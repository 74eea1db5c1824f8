"""Weights go from a checkpoint to InternLM's format, to Hugging Face's and back, and every number stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internlm_trainer.checkpoint import Piece
from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.config import ModelShape
from internlm_trainer.errors import UserError
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights import export as exporting
from internlm_trainer.weights import source
from internlm_trainer.weights.export import export_internlm, export_llama
from internlm_trainer.weights.imported import import_weights
from internlm_trainer.weights.layout import parameters, stages
from internlm_trainer.weights.recognise import open_weights
from internlm_trainer.weights.source import CheckpointWeights, fill
from trainer.weights.models import SHAPES, assert_equal, content, random_weights, save


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors are read and written in several parts."""
    monkeypatch.setattr(source, "BLOCK", 5000)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_parameters_are_those_of_the_model(shape: ModelShape) -> None:
    with torch.device("meta"):
        model = InternLM(shape)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameters(shape) == expected


@pytest.mark.parametrize(
    ("tensor", "pipeline", "dtype"),
    [
        (1, 1, "bf16"),
        (2, 1, "fp32"),
        (4, 1, "bf16"),
        (1, 2, "bf16"),
        (2, 2, "bf16"),
        (4, 2, "fp32"),
        (4, 3, "bf16"),
    ],
)
@pytest.mark.parametrize("family", SHAPES)
def test_a_chain_through_all_formats_changes_no_bit(
    tmp_path: Path, family: str, tensor: int, pipeline: int, dtype: str
) -> None:
    shape = SHAPES[family]
    expected = random_weights(shape)
    checkpoint = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, expected)))
    export_internlm(checkpoint, str(tmp_path / "internlm"), dtype, tensor, pipeline)
    files = sorted(path.name for path in (tmp_path / "internlm").glob("model_tp*"))
    assert len(files) == tensor * pipeline
    split = open_weights(str(tmp_path / "internlm"), "SOURCE")
    assert split.shape == shape
    assert_equal(content(split), expected)
    import_weights(split, str(tmp_path / "imported"), None, 128)
    imported = open_weights(str(tmp_path / "imported"), "SOURCE")
    assert_equal(content(imported), expected)
    export_llama(imported, str(tmp_path / "hf"), dtype, None, 128)
    whole = open_weights(str(tmp_path / "hf"), "SOURCE")
    assert (whole.shape, whole.context) == (shape, 128)
    assert_equal(content(whole), expected)
    import_weights(whole, str(tmp_path / "last"), None, 128)
    last = open_weights(str(tmp_path / "last"), "SOURCE")
    assert (last.shape, last.context) == (shape, 128)
    assert_equal(content(last), expected)
    export_internlm(last, str(tmp_path / "again"), dtype, tensor, pipeline)
    for file in files:
        one, other = (torch.load(tmp_path / name / file, weights_only=True) for name in ("internlm", "again"))
        assert_equal(one, other)


def test_the_files_of_internlm_are_what_its_description_says(tmp_path: Path) -> None:
    """Merged as InternLM's tensor-parallel modules use them: heads beside heads within each of q, k and v."""
    shape = SHAPES["InternLM-7B"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_internlm(weights, str(tmp_path / "out"), "fp32", 2, 2)
    ranks = [
        [
            torch.load(tmp_path / "out" / f"model_tp{t}_pp{p}.pt", mmap=True, weights_only=True)
            for p in range(2)
        ]
        for t in range(2)
    ]
    head_dim, heads = 8, 8
    for layer in range(4):
        stage, number = divmod(layer, 2)
        first, second = (f[stage] for f in ranks)
        prefix = f"model.blocks.{number}"
        for kind, width in (("weight", (64,)), ("bias", ())):
            parts = [
                f[f"{prefix}.mixer.Wqkv.{kind}"].view(3, heads // 2, head_dim, *width)
                for f in (first, second)
            ]
            merged = torch.cat(parts, dim=1).flatten(0, 2)
            assert torch.equal(merged, ours[f"blocks.{layer}.mixer.Wqkv.{kind}"])
        assert f"{prefix}.mixer.out_proj.bias" in first
        assert f"{prefix}.mixer.out_proj.bias" not in second
        for part, dim in (("mixer.out_proj", 1), ("mlp.w1", 0), ("mlp.w2", 0), ("mlp.w3", 1)):
            merged = torch.cat([f[f"{prefix}.{part}.weight"] for f in (first, second)], dim=dim)
            assert torch.equal(merged, ours[f"blocks.{layer}.{part}.weight"])
    merged = torch.cat([f[0]["model.embedding.weight"] for f in ranks], dim=1)
    assert torch.equal(merged, ours["embedding.weight"])
    merged = torch.cat([f[1]["model.head.weight"] for f in ranks], dim=0)
    assert torch.equal(merged, ours["head.weight"])
    assert "model.norm.weight" not in ranks[0][0]
    config = torch.load(tmp_path / "out" / "model_config.pt", weights_only=True)
    assert (config["num_layers"], config["num_attention_heads"], config["layer_norm_epsilon"]) == (4, 8, 1e-6)


def test_internlm2_keeps_the_queries_of_a_key_beside_it(tmp_path: Path) -> None:
    shape = SHAPES["InternLM2"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_internlm(weights, str(tmp_path / "out"), "fp32", 2, 1)
    ranks = [torch.load(tmp_path / "out" / f"model_tp{t}_pp0.pt", weights_only=True) for t in range(2)]
    name = "layers.3.attention.wqkv.weight"
    groups = torch.cat([f[f"model.{name}"] for f in ranks]).view(4, 2 + 2, 8, 64)
    merged = torch.cat([groups[:, :2].flatten(0, 2), groups[:, 2].flatten(0, 1), groups[:, 3].flatten(0, 1)])
    assert torch.equal(merged, ours["blocks.3.mixer.Wqkv.weight"])
    up = torch.cat([f["model.layers.3.feed_forward.w3.weight"] for f in ranks])
    assert torch.equal(up, ours["blocks.3.mlp.w2.weight"])


def test_old_names_are_read_too(tmp_path: Path) -> None:
    """Without `model.`, with the embedding split by words, and with what is computed anew."""
    shape = SHAPES["InternLM-7B"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_internlm(weights, str(tmp_path / "out"), "bf16", 2, 1)
    for rank in range(2):
        file = tmp_path / "out" / f"model_tp{rank}_pp0.pt"
        state = {name.removeprefix("model."): values for name, values in torch.load(file).items()}
        del state["embedding.weight"]
        state["embedding.word_embeddings.weight"] = ours["embedding.weight"].bfloat16()[
            rank * 256 : rank * 256 + 256
        ]
        state["blocks.0.mixer.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(state, file)
    (tmp_path / "out" / "model_config.pt").unlink()
    found = open_weights(str(tmp_path / "out"), "model.init.from", shape)
    assert_equal(content(found), ours)


def test_internlm2_as_released_on_hugging_face_is_read(tmp_path: Path) -> None:
    """Under names of its own, in pickles with an index, and the queries beside their key."""
    shape = SHAPES["InternLM2"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_internlm(weights, str(tmp_path / "files"), "bf16", 1, 1)
    state = torch.load(tmp_path / "files" / "model_tp0_pp0.pt", weights_only=True)
    state["output.weight"] = state.pop("model.output.weight")
    export_llama(weights, str(tmp_path / "out"), "bf16", None, 64)
    (tmp_path / "out" / "model.safetensors").unlink()
    _rewrite_config(tmp_path / "out", model_type="internlm2", bias=False)
    names = sorted(state)
    parts = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, tmp_path / "out" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "out" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open_weights(str(tmp_path / "out"), "SOURCE")
    assert found.shape == shape
    assert_equal(content(found), ours)


def _rewrite_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4])
def test_stages_share_the_blocks_and_the_last_have_more(pipeline: int) -> None:
    bounds = stages(5, pipeline)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == 5
    sizes = [stop - start for start, stop in bounds]
    assert sizes == sorted(sizes)
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_takes_any_elements_of_a_parameter(tmp_path: Path) -> None:
    shape = SHAPES["InternLM2"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_internlm(weights, str(tmp_path / "out"), "bf16", 2, 2)
    found = open_weights(str(tmp_path / "out"), "SOURCE")
    name = "blocks.4.mixer.Wqkv.weight"
    for start, stop in ((0, 1), (63, 65), (1234, 5678), (8191, 8192)):
        out = torch.zeros(stop - start)
        fill(found, [Piece("master", name, start, stop, out)])
        assert torch.equal(out, ours[name].flatten()[start:stop])


def test_large_models_are_cut_into_files_with_an_index(tmp_path: Path) -> None:
    shape = SHAPES["InternLM-7B"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    names = export_llama(weights, str(tmp_path / "out"), "fp32", None, 64, largest_file=200_000)
    parts = [name for name in names if name.endswith(".safetensors")]
    assert len(parts) > 3
    assert names[-2:] == ["generation_config.json", "config.json"]
    assert all((tmp_path / "out" / part).stat().st_size < 210_000 for part in parts)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = {part: load_file(tmp_path / "out" / part) for part in parts}
    assert index["weight_map"] == {name: part for part, held in theirs.items() for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in theirs.values() for t in held.values())
    assert_equal(content(open_weights(str(tmp_path / "out"), "SOURCE")), ours)
    assert exporting.LARGEST_FILE == 5_000_000_000


def test_every_store_takes_and_gives_weights(tmp_path: Path, url: str) -> None:
    """An object store's files are written without going back in them, and read in ranges."""
    shape = SHAPES["InternLM2"]
    ours = random_weights(shape)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), shape, ours)))
    export_internlm(weights, f"{url}/internlm", "bf16", 2, 1)
    split = open_weights(f"{url}/internlm", "SOURCE")
    assert_equal(content(split), ours)
    export_llama(split, f"{url}/hf", "bf16", None, 64, largest_file=300_000)
    assert_equal(content(open_weights(f"{url}/hf", "SOURCE")), ours)
    with pytest.raises(UserError, match="holds weights already"):
        export_llama(split, f"{url}/hf", "bf16", None, 64)
