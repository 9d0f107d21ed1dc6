"""Optimizers whose parameters were replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

import lightning_memopt as lm
from lightning_memopt.strategy.rebinding import KnownParameters, rebind
from tests.strategy._holder import Holder, Tower


def replaced_model():
    """A model whose parameters were replaced after an optimizer was made, as sharding does."""
    model, known = Holder(net=Tower()), KnownParameters()
    known.learn(model)
    return model, known


def replace(model, known):
    for module in model.modules():
        for key in list(module._parameters):
            module._parameters[key] = nn.Parameter(module._parameters[key].detach().clone())
    return known.replaced(model)


def test_groups_and_state_survive_rebinding():
    model, known = replaced_model()
    weights, biases = (
        [param for name, param in model.named_parameters() if name.endswith(end)] for end in ("weight", "bias")
    )
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.5}, {"params": biases, "weight_decay": 0.25}])
    model.net.last(torch.ones(4)).sum().backward()
    optimizer.step()
    before = optimizer.state[model.net.last.weight]["exp_avg"]
    rebind(optimizer, replace(model, known), model, known)
    names = {param: name for name, param in model.named_parameters()}
    assert {names[param].split(".")[-1] for param in optimizer.param_groups[0]["params"]} == {"weight"}
    assert {names[param].split(".")[-1] for param in optimizer.param_groups[1]["params"]} == {"bias"}
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["weight_decay"]) == (0.5, 0.25)
    assert torch.equal(optimizer.state[model.net.last.weight]["exp_avg"], before)
    assert set(optimizer.state) == {model.net.last.weight, model.net.last.bias}


def test_known_parameters_are_not_kept_alive():
    model, known = replaced_model()
    assert set(known.names().values()) == {name for name, _ in model.named_parameters()}
    assert not replace(model, known)  # nobody holds the old ones
    assert not known.names()


def test_own_optimizers_learn_names():
    model, known = replaced_model()
    optimizer = lm.AdaPMLean(model.parameters())
    rebind(optimizer, replace(model, known), model, known)
    assert {block.name for block in optimizer.snapshot().blocks} == {name for name, _ in model.named_parameters()}
