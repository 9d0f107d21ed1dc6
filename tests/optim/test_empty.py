"""Parameters without elements: every kind trains, saves, loads and converts beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import Momentum
from tests._compare import assert_equal
from tests.kinds.contract.cases import all_momenta, all_second_moments, gradient, label

pytestmark = pytest.mark.slow

SHAPES = [(0, 8), (8, 0), (2, 0, 4)]
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")


def parameters(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    named = zip(NAMES[: len(shapes)], shapes, strict=True)
    return [(name, nn.Parameter(gradient(shape, number))) for number, (name, shape) in enumerate(named)]


def optimizer(named: list[tuple[str, nn.Parameter]], kind: Kind) -> lm.MemOpt:
    if isinstance(kind, Momentum):
        recipe = lm.Recipe(kind, "none" if kind.averages_squares else "dense")
    else:
        recipe = lm.Recipe("dense", kind)
    return lm.MemOpt(named, recipe="adamw", lr=1e-2, overrides={"*": recipe})


def train(made: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        for param in made.param_groups[0]["params"]:
            param.grad = gradient(tuple(param.shape), step)
        made.step()


@pytest.mark.parametrize("kind", [*all_momenta(), *all_second_moments()], ids=label)
def test_every_kind_works_beside_parameters_without_elements(kind, tmp_path):
    alone = parameters((12, 8))
    made = optimizer(alone, kind)
    train(made, 3)
    train(made, 2)
    for shape in SHAPES:
        named = parameters((12, 8), shape)
        made = optimizer(named, kind)
        train(made, 3)
        assert "nan" not in repr(made)
        assert all(value.isfinite().all() for state in made.state.values() for value in state.values())
        torch.save(made.state_dict(), tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed = optimizer(named, kind)
        resumed.load_state_dict(saved)
        assert_equal(resumed.state_dict()["state"], saved["state"])
        train(resumed, 2)
        assert_equal(named[0][1], alone[0][1])


@pytest.mark.parametrize("kind", [*all_momenta(), *all_second_moments()], ids=label)
def test_state_of_parameters_without_elements_converts(kind):
    for shape in SHAPES:
        named = parameters((12, 8), shape)
        dense = torch.optim.AdamW([param for _, param in named])
        train(dense, 2)
        made = optimizer(named, kind)
        made.load_state_dict(dense.state_dict())
        train(made, 2)
        for momentum, second_moment in (("low_rank", "blockwise"), ("dense", "dense")):
            if kind.restorable:
                made.reformat({NAMES[1]: {"momentum": momentum, "second_moment": second_moment}})
                train(made, 1)
                again = optimizer(named, kind)
                again.load_state_dict(made.state_dict())
        assert all(value.isfinite().all() for state in made.state.values() for value in state.values())
