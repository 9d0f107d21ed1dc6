"""Every structure trains with every recipe."""

from __future__ import annotations

import pytest
import torch

import lightning_memopt as lm
from tests.roles._cases import forward, loss_of
from tests.roles._models import CASES

STEPS = 3
# Below this, a gradient may be lost beside a weight of one.
VISIBLE = 1e-6

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", [case for case in CASES if case.train], ids=repr)
def test_every_recipe_trains(case):
    model, inputs = case.build(), case.inputs()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    for recipe in lm.recipe_names():
        model.load_state_dict(start, strict=False)
        optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=1e-2)
        optimizer.bind(model)
        trained = set()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(forward(model, inputs))
            loss.backward()
            assert torch.isfinite(loss), recipe
            trained |= {name for name, param in model.named_parameters() if has_gradient(param)}
            optimizer.step()
        assert trained
        still = [
            name for name, param in model.named_parameters() if name in trained and bool((param == start[name]).all())
        ]
        assert not still, f"{recipe} leaves {still}"


def has_gradient(param: torch.Tensor) -> bool:
    return param.grad is not None and float(param.grad.abs().max()) > VISIBLE
