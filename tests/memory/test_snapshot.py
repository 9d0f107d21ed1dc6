"""A snapshot: frozen facts about the blocks of an optimizer, and their table."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.memory.snapshot import BlockFacts
from tests._models import tiny_gpt2
from tests.optim._measured import Network, by_name, numel, stepped


@pytest.fixture
def model() -> Network:
    return Network()


def test_adamw_is_dense_and_counts_two_numbers_per_element(model):
    snapshot = lm.take_snapshot(stepped(model, torch.optim.AdamW), model)
    assert snapshot.state_bytes == snapshot.local_bytes == snapshot.adamw_bytes == 8 * numel(model)
    assert snapshot.momentum_bytes == snapshot.second_moment_bytes == 4 * numel(model)
    assert {(block.momentum, block.second_moment, block.rank) for block in snapshot.blocks} == {
        ("dense", "dense", None)
    }
    assert snapshot.counter_bytes == 4 * len(list(model.parameters()))
    assert (snapshot.step, snapshot.skipped, snapshot.world_size, snapshot.saved) == (1, 0, 1, 0.0)


def test_a_subspace_is_split_into_momentum_and_projections():
    weight = nn.Parameter(torch.zeros(48, 30))
    optimizer = lm.AdamSNSM([("self_attn.q_proj.weight", weight)], rank=5)
    (block,) = optimizer.snapshot().blocks
    sizes = {key: value.numel() * 4 for key, value in optimizer.state[weight].items() if key != "step"}
    assert block.state.projections in sizes.values()
    assert block.state.projections == 4 * 5 * 30, "a basis of the short side"
    assert block.state.momentum == 4 * 5 * 48
    assert sum(sizes.values()) == block.state.total
    assert (block.rank, block.full_rank, block.momentum) == (5, 30, "subspace")


def test_a_reformat_shows_in_the_next_snapshot(model):
    optimizer = lm.AdaPMLean(model.named_parameters(), rank=4)
    before = optimizer.snapshot()
    optimizer.reformat({"lm_head.weight": {"rank": 2}, "embed_tokens.weight": {"momentum": "none"}})
    after = by_name(optimizer.snapshot())
    assert (after["lm_head.weight"].rank, after["embed_tokens.weight"].rank) == (2, None)
    assert by_name(before)["lm_head.weight"].rank == 4, "the first one is as it was"
    with pytest.raises(FrozenInstanceError):
        before.blocks = ()


def test_the_table_of_a_foreign_optimizer_adds_up(model):
    snapshot = lm.take_snapshot(stepped(model, torch.optim.AdamW), model)
    *lines, rule, last = str(snapshot).splitlines()
    assert len(lines) == 2 + len(snapshot.blocks)
    assert set(rule) == {"─"}
    assert f"{8 * numel(model):,}" in last
    assert "saved 0.0%" in last


def test_the_table_shows_what_is_known_of_roles():
    module = tiny_gpt2()
    optimizer = lm.AdaPM(module.named_parameters())
    header = optimizer.plan_table().splitlines()[0]
    assert "part" in header
    assert "head size" not in header, "names do not tell it"
    optimizer.bind(module)
    header, _, *lines = optimizer.plan_table().splitlines()
    line = next(line for line in lines if line.startswith("transformer.h.0.attn.c_attn.weight:key"))
    start = header.index("head size")
    assert line[start : start + len("head size")].strip() == "8"
    start = header.index("part")
    assert line[start:].startswith("columns 32–63")


def test_blocks_as_facts_have_what_the_metrics_read():
    (block,) = lm.AdaPMLean([("q_proj.weight", nn.Parameter(torch.zeros(30, 20)))], rank=4).snapshot().blocks
    assert isinstance(block, BlockFacts)
    assert block.local_bytes == block.local.total == block.momentum_bytes + block.second_moment_bytes
