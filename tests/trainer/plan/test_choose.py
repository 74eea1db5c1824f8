"""What a layout sends, which layouts there are, and which one is taken."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from internlm_trainer.cli import app
from internlm_trainer.parallel.layout import ZeroLayout
from internlm_trainer.plan.choose import legal_degrees, make_plan, out_of_memory_advice
from internlm_trainer.plan.memory import MARGIN, Work
from internlm_trainer.plan.traffic import Sent, nodes_of_a_group, traffic
from trainer.plan.jobs import seven_b, small

GIB = 2**30


@given(st.integers(1, 64))
def test_legal_degrees_are_all_that_divide_one_another(world: int) -> None:
    numbers = range(1, world + 1)
    expected = {
        (p, g, o)
        for o in numbers
        if world % o == 0
        for g in numbers
        if o % g == 0
        for p in numbers
        if g % p == 0
    }
    found = list(legal_degrees(world))
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=4, max_size=4), st.sampled_from([1, 2, 3, 4, 8]))
def test_the_nodes_of_a_group_are_those_that_its_ranks_are_on(sizes: list[int], nodes: int) -> None:
    p, g, o, world = (prod(sizes[: i + 1]) for i in range(4))
    if world % nodes:
        nodes = 1
    layout = ZeroLayout(world, p, g, o, world // nodes)
    for level in layout.levels:
        most = max(len({rank // layout.ranks_per_node for rank in group}) for group in layout.groups(level))
        assert most <= nodes_of_a_group(layout.ranks_per_node, level.size, level.stride) <= level.size
        if layout.ranks_per_node % (level.size * level.stride) == 0:
            assert most == nodes_of_a_group(layout.ranks_per_node, level.size, level.stride) == 1


def test_traffic_of_two_nodes_by_hand() -> None:
    """4 micro-batches in fp32 on 2 nodes of 2; n is the number of parameters, padded for o."""
    work = Work.of(small(4, (1, 1, 4), micro_batches=4), 4)

    def of(p: int, g: int, o: int) -> tuple[list[Sent], int]:
        return list(traffic(work, ZeroLayout(4, p, g, o, 2))), padded(o)

    def padded(o: int, *names: str) -> int:
        return sum(unit.padded(o) * unit.copies for unit in work.units if not names or unit.name in names)

    # Replicas on both nodes: an all-reduce sends 2 (4 - 1) / 4 of 4 bytes, by a ring half of whose hops cross.
    sent, n = of(1, 1, 1)
    assert sent == [Sent(3 * n, 3 * n), Sent(), Sent()]
    # Inside: half. Across: half of the half that is left. And the same back.
    sent, n = of(1, 1, 4)
    assert sent == [Sent(2 * n, n), Sent(2 * n, n), Sent()]
    # Gradients inside the node after every micro-batch, their all-reduce across once.
    sent, n = of(1, 2, 2)
    assert sent == [Sent(4 * 2 * n, 2 * n), Sent(2 * n, 0), Sent()]
    # Parameters too, twice a micro-batch, but for embedding and head; nothing to do after the update.
    sent, n = of(2, 2, 2)
    gathered = 2 * padded(2, "block", "norm") + padded(2, "embedding", "head")
    assert sent == [Sent(4 * 2 * n, 2 * n), Sent(), Sent(4 * 2 * gathered, 0)]


def test_one_rank_sends_nothing() -> None:
    assert traffic(Work.of(small(1, (1, 1, 1)), 1), ZeroLayout(1, 1, 1, 1)).total == Sent()


@pytest.mark.parametrize("world", [1, 8, 16, 64, 720])
@pytest.mark.parametrize("memory", [24 * GIB, 80 * GIB])
def test_what_is_taken_fits_and_nothing_that_fits_sends_less_across(world: int, memory: int) -> None:
    spec = seven_b().model_copy(
        update={"training": seven_b().training.model_copy(update={"global_batch_tokens": None})}
    )
    found = make_plan(spec, world, min(world, 8), memory)
    fitting = [option for option in found.options if option.memory.total <= memory * (1 - MARGIN)]
    assert {option.degrees for option in found.options} == set(legal_degrees(world))
    assert found.own
    assert found.own.degrees == (1, 1, world)
    if not fitting:
        assert found.best is None
        assert "nothing fits" in found.reason
        return
    assert found.best in fitting
    sent = found.best.traffic.total
    assert sent.across == min(option.traffic.total.across for option in fitting)
    again = [option for option in fitting if option.traffic.total.across == sent.across]
    if any(option.recompute == "none" for option in again):
        assert found.best.recompute == "none"
    assert found.best in found.shortlist
    assert found.own in found.shortlist
    assert len(found.shortlist) <= 13


def test_7b_keeps_its_parameters_where_they_fit_and_shards_them_where_they_do_not() -> None:
    eight = make_plan(seven_b(), 8, 8, 80 * GIB)
    assert eight.best
    assert eight.best.degrees == (1, 1, 8)  # InternLM's zero1
    little = make_plan(seven_b(), 8, 8, 40 * GIB)
    assert little.best
    assert little.best.degrees != (1, 1, 8)


@pytest.mark.parametrize(
    ("micro_batch_size", "zero", "change"),
    [
        (4, {}, "set parallel.recompute to 75%, which needs 67.6 GiB"),
        (1, {}, "set parallel.zero to {parameters: 1, gradients: 2, optimizer: 8}, which needs 53.5 GiB"),
        (64, {}, "no layout leaves 10% free"),
        (
            1,
            {"optimizer": 1},
            "set parallel.zero to {parameters: 1, gradients: 1, optimizer: 8}, which needs 65.2 GiB",
        ),
    ],
)
def test_advice_after_out_of_memory_says_what_to_change(
    micro_batch_size: int, zero: dict[str, int], change: str
) -> None:
    advice = out_of_memory_advice(seven_b(micro_batch_size, **zero), 8, 8, 80 * GIB)
    assert advice.startswith("the planner counts ")
    assert change in advice


def test_who_has_few_gpus_is_told_of_offload() -> None:
    """7.3 billion parameters on one GPU: 18 bytes each do not fit, 2 and what a step needs do."""
    advice = out_of_memory_advice(seven_b(), 1, 1, 80 * GIB)
    found = re.search(r"set parallel.zero.offload to optimizer, with which .* needs ([\d.]+) GiB and", advice)
    assert found
    assert float(found[1]) < 72
    assert "set parallel.zero.offload to optimizer" in make_plan(seven_b(), 1, 1, 80 * GIB).reason
    assert "offload" not in make_plan(seven_b(), 1, 1, 16 * GIB).reason  # it would not do


@pytest.fixture
def file(tmp_path: Path) -> Path:
    job = {
        "apiVersion": "training.internlm.io/v1alpha1",
        "kind": "InternLMJob",
        "metadata": {"name": "seven"},
        "spec": {"nodes": 2, "gpusPerNode": 8} | seven_b().model_dump(by_alias=True, exclude_unset=True),
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def test_the_command_prints_a_table_that_marks_the_one_to_take(file: Path) -> None:
    result = CliRunner(env={"COLUMNS": "40"}).invoke(app, ["plan", str(file), "--memory", "80GiB"])
    assert result.exit_code == 0, result.output
    (taken,) = [line for line in result.output.splitlines() if "take this" in line]
    assert taken.split()[:4] == ["*", "1,", "1,", "16"]
    assert "16 ranks, 8 a node, 80.0 GiB each. Take zero (1, 1, 16), recompute none: " in result.output


def test_the_command_writes_every_layout_as_json(file: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(file), "--gpus", "32", "--memory", "40GB", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["deviceMemory"] == 40 * 10**9
    layouts = {tuple(option["zero"].values()) for option in found["options"]}
    assert layouts == set(legal_degrees(32))
    assert sum(option["best"] for option in found["options"]) == 1
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    for option in found["options"]:
        assert sum(option["memory"][part] for part in parts) == option["memory"]["total"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--memory", "80"], "--memory 80: must be a number of GB or GiB"),
        (["--gpus", "12"], "spec.training.globalBatchTokens: must be a multiple"),
        (["--gpus-per-node", "3"], "is no multiple of the 3 GPUs of a node"),
    ],
)
def test_the_command_says_what_is_wrong(file: Path, options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(file), *options])
    assert result.exit_code == 65
    assert sentence in result.output
