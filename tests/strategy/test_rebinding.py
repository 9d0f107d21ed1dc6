"""Optimizers whose parameters were replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

import lightning_memopt as lm
from lightning_memopt.strategy import finetuning
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


def test_a_parameter_that_got_another_shape_is_refused():
    model, known = replaced_model()
    optimizer = torch.optim.AdamW(model.parameters())
    replace(model, known)
    model.net.last.bias = nn.Parameter(torch.zeros(9))
    with pytest.raises(
        ValueError, match=r"'net.last.bias' had the shape \(\d,\) when the optimizer AdamW was created, and"
    ):
        rebind(optimizer, known.replaced(model), model, known)


def test_parameters_that_are_unfrozen_twice_are_named_by_number(monkeypatch):
    monkeypatch.setattr(finetuning, "DTensor", nn.Parameter)
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="1 of the unfrozen parameters are in the optimizer already, and stay in"):
        assert finetuning._not_in(torch.optim.AdamW([first]), [first, second]) == [second]
