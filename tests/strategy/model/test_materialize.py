"""How modules on the meta device get their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

from lightning_memopt.sharding.wrapping import find_units, own_modules
from lightning_memopt.strategy.model.materialize import convert, move, pretrained_owners, refuse_uninitializable
from tests._models import tiny_gpt2, tiny_llama
from tests.strategy._holder import Holder


def materialize(model, policy=None):
    """As the strategy does, unit after unit."""
    units = [unit.module for unit in find_units(model, policy)]
    owners, replaced = pretrained_owners(model), {}
    for unit in (*units, model):
        own = [(name, module) for name, module in own_modules(unit, set(units))]
        replaced |= move(own, torch.device("cpu"), owners)
    return replaced


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_transformers_are_born_as_without_the_meta_device(make):
    with torch.device("meta"):
        model = Holder(model=make())
    materialize(model)
    expected = Holder(model=make())
    for (name, value), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert value.std().item() == pytest.approx(other.std().item(), rel=0.15, abs=1e-6), name
        assert value.mean().item() == pytest.approx(other.mean().item(), abs=0.01), name
        assert value.is_contiguous()
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
    assert (make is tiny_gpt2) == (model.model.lm_head.weight is model.model.get_input_embeddings().weight)


def test_scaled_initialisation_of_gpt2():
    with torch.device("meta"):
        model = Holder(model=tiny_gpt2())
    materialize(model)
    layer = model.model.transformer.h[0].mlp
    assert layer.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert layer.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_modules_of_torch_are_born_by_themselves():
    with torch.device("meta"):
        children = {"attention": nn.MultiheadAttention(8, 2), "norm": nn.BatchNorm1d(8), "conv": nn.Conv1d(3, 4, 5)}
        model = Holder(lstm=nn.LSTM(4, 5), layer=nn.TransformerEncoderLayer(8, 2, 16), **children)
    replaced = materialize(model)
    assert not any(tensor.is_meta or tensor.isnan().any() for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model.norm.running_var, torch.ones(8))
    assert model.norm.num_batches_tracked == 0
    assert model.attention.in_proj_weight.std() > 0.1
    assert set(replaced.values()) == {*model.parameters(), *model.buffers()}
    assert all(tensor.is_meta for tensor in replaced)


def test_what_nobody_initialises_is_named():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(3))
            self.register_buffer("positions", torch.arange(3), persistent=False)
            self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

        def forward(self, value):
            return value

    class Half(Table):
        def reset_parameters(self):
            nn.init.zeros_(self.codes)

    with torch.device("meta"):
        model = Holder(net=nn.Sequential(Table(), nn.Linear(2, 2), Half()))
    with pytest.raises(
        ValueError, match=r"net.0 \(Table\): codes, positions; net.2 \(Half\): positions. Give them a `reset_param"
    ):
        move([(f"net.{n}", m) for n, m in own_modules(model.net, set())], torch.device("cpu"), {})


def test_what_has_no_initialiser_is_refused_before_anything_changes():
    with torch.device("meta"):
        model = Holder(net=nn.Sequential(nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(2))])))
    with pytest.raises(ValueError, match=r"on the meta device .*: net.1 \(ParameterList\): 0. Give them"):
        refuse_uninitializable(own_modules(model, set()), {})
    refuse_uninitializable(own_modules(Holder(net=tiny_llama()), set()), {})


def test_values_that_exist_are_kept():
    layer = nn.BatchNorm1d(4)
    layer.running_mean.fill_(3)
    layer.weight = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)
    mean = layer.running_mean
    replaced = move([("", layer)], torch.device("cpu"), {})
    assert layer.running_mean is mean
    assert torch.equal(mean, torch.full((4,), 3.0))
    assert torch.equal(layer.weight, torch.ones(4))
    assert not layer.weight.requires_grad
    assert list(replaced.values()) == [layer.weight]


def test_conversion_leaves_the_old_parameters_alone():
    layer = nn.BatchNorm1d(4)
    old = layer.weight
    replaced = convert([("", layer)], torch.bfloat16)
    assert old.dtype == torch.float32
    assert layer.weight is replaced[old]
    assert layer.weight.dtype == layer.running_mean.dtype == torch.bfloat16
    assert layer.num_batches_tracked.dtype == torch.int64


def test_parameters_become_contiguous():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.randn(3, 4).t())
    value = layer.weight.detach().clone()
    move([("", layer)], torch.device("cpu"), {})
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, value)
