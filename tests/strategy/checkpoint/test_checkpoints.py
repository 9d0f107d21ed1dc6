"""Checkpoints of sharded models: saved on any number of ranks, loaded on any other, in both formats, or refused.

One process group of four runs everything but Trainers, which take the whole group and have one of two ranks; the first
one, two and three ranks of the four also serve as smaller worlds.
"""

from __future__ import annotations

import itertools
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_memopt import MemOpt
from tests._ranks import run_ranks
from tests.strategy.checkpoint import (  # noqa: F401  (they register themselves)
    _compatibility_cases,
    _content_cases,
    _refused_cases,
    _resuming_cases,
)
from tests.strategy.checkpoint._checkpoint_trainers import RANKS, TRAINERS
from tests.strategy.checkpoint._checkpoints import (
    CASES,
    FAMILIES,
    FORMATS,
    World,
    difference,
    grouped,
    load,
    save,
    shard,
    step,
    towers,
    whole_params,
    worlds,
)

pytestmark = pytest.mark.slow

SIZES = (1, 2, 3, 4)
CELLS = list(itertools.product(SIZES, SIZES, FORMATS))


# --- every number of ranks to every other, every recipe --------------------------------------------------------------


def distinct(model: nn.ModuleDict) -> nn.ModuleDict:
    """Leave out vectors and embeddings whose kinds of state AdamW's vector or a matrix of their family has."""
    for family, tower in model.items():
        if family != "adamw":
            del tower.layers[0]["input_layernorm"]
        if family not in ("adamw", "adapm", "adapm_mini"):
            del tower.embed_tokens
    return model


def reformatted(optimizer: MemOpt) -> None:
    """Change rank or momentum of one block of every family; its other blocks stay as they are."""
    optimizer.reformat(
        {
            f"{family}.layers.0.self_attn.q_proj.weight": {"rank": 2}
            if family.startswith("adapm") or family == "adam_snsm"
            else {"momentum": "low_rank", "rank": 2}
            for family in FAMILIES
        }
    )


def interrupted(world: World, folder: Path) -> dict[str, Tensor]:
    """Save after two of three steps; return the parameters after all three."""
    model = shard(distinct(towers(*FAMILIES)), world)
    optimizer = grouped(model)
    step(model, optimizer, 0)
    reformatted(optimizer)
    step(model, optimizer, 1)
    for format in FORMATS:
        save(folder / f"{world.size}-{format}", model, optimizer, format=format, world=world, global_step=2)
    step(model, optimizer, 2)
    return whole_params(model)


def resumed(world: World, folder: Path, expected: dict[int, dict[str, Tensor]]) -> dict[Any, str]:
    """Load everything that was saved and take the last step."""
    model = shard(distinct(towers(*FAMILIES, seed=1)), world)
    optimizer, outcomes = grouped(model), {}
    for size, format in itertools.product(SIZES, FORMATS):
        rest = load(folder / f"{size}-{format}", model, optimizer, world=world)
        assert rest == {"global_step": 2}
        step(model, optimizer, 2)
        outcomes[size, world.size, format] = difference(model, expected[size], exact=size == world.size)
    return outcomes


def matrix(all_worlds: dict[int, World], folder: Path) -> dict[Any, str]:
    expected = [{size: interrupted(world, folder) for size, world in all_worlds.items() if world.mine}]
    dist.broadcast_object_list(expected, src=0)  # the first rank is in all worlds
    outcomes = {}
    for world in all_worlds.values():
        if world.mine:
            outcomes |= resumed(world, folder, expected[0])
    return outcomes


# --- running ---------------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, world: int, folder: str, names: tuple[str, ...] | None) -> dict[Any, str]:
    """Return what went wrong, by cell of the matrix and by name of the case; names select cases."""
    torch.manual_seed(rank)
    all_worlds, cases = (worlds(), CASES) if world == max(SIZES) else ({}, TRAINERS)
    outcomes = {}
    if names is None and all_worlds:
        outcomes = matrix(all_worlds, Path(folder))
    for function in cases if names is None else [case for case in cases if case.__name__ in names]:
        place = Path(folder) / function.__name__
        try:
            function(all_worlds, place)
            outcomes[function.__name__] = ""
        except Exception:
            outcomes[function.__name__] = traceback.format_exc()
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(on_a_rank, max(SIZES), str(tmp_path_factory.mktemp("checkpoints")), None, timeout=290)


@pytest.fixture(scope="module")
def outcomes_of_trainers(tmp_path_factory):
    return run_ranks(on_a_rank, RANKS, str(tmp_path_factory.mktemp("trainers")), None, timeout=290)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_resumed_equals_uninterrupted(outcomes, cell):
    _, loaded, _ = cell
    assert [outcomes[rank].get(cell) for rank in range(4)] == [""] * loaded + [None] * (4 - loaded)


@pytest.mark.parametrize("name", [function.__name__ for function in (*CASES, *TRAINERS)])
def test_case(request, name):
    of_trainers = name in {function.__name__ for function in TRAINERS}
    found = request.getfixturevalue("outcomes_of_trainers" if of_trainers else "outcomes")
    assert not any(text := "".join(outcome[name] for outcome in found)), text
