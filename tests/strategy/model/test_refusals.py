"""Parameters and modules that cannot be sharded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

from lightning_memopt.sharding.wrapping import find_units
from lightning_memopt.strategy.model.refusals import refuse_fsdp1, refuse_parameters
from tests.strategy._holder import Holder, Layer, Tower


def test_scalars_are_refused_in_units_only():
    model = Holder(net=Tower())
    model.temperature = nn.Parameter(torch.tensor(1.0))
    refuse_parameters(model, find_units(model))
    model.net.layers[0].gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"Scalar parameters .*: 'net.layers.0.gain'. Give them the shape \(1,\)"):
        refuse_parameters(model, find_units(model))


def test_parameters_without_a_shape_are_refused():
    model = Holder(net=nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="no shape yet .*: 'net.0.weight', 'net.0.bias'. Call the lazy modules"):
        refuse_parameters(model, find_units(model))


def test_parameters_with_hooks_are_refused():
    model = Holder(net=Tower())
    model.net.last.weight.register_hook(lambda grad: grad)
    model.net.last.bias.register_post_accumulate_grad_hook(lambda param: None)
    with pytest.raises(ValueError, match="Hooks .* would be lost, .*: 'net.last.weight', 'net.last.bias'. Register"):
        refuse_parameters(model, find_units(model))


def test_modules_of_the_older_fsdp_are_refused(monkeypatch):
    monkeypatch.setattr("lightning_memopt.strategy.model.refusals.FullyShardedDataParallel", Layer)
    with pytest.raises(TypeError, match="Found modules that are wrapped with .*: 'net.layers.0', .* only supports"):
        refuse_fsdp1(Holder(net=Tower()))
