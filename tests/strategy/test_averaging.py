"""The averages of modules, without ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

pytest.importorskip("lightning.pytorch")

from lightning_memopt.strategy.averaging import ShardedAverage, tensor_dtypes


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    model.again = model[0]
    return model


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"avg_fn": get_ema_avg_fn(0.5)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}],
    ids=["mean", "ema", "multi"],
)
def test_updates_are_those_of_torch(use_buffers, options):
    model = network()
    ours = ShardedAverage(model, {}, None, use_buffers=use_buffers, **options)
    theirs = AveragedModel(model, use_buffers=use_buffers, **options)
    for _ in range(3):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param))
        model(torch.randn(5, 3))
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=0)
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    assert ours.module.again is ours.module.get_submodule("0")


def test_names_are_those_of_checkpoints():
    model = nn.ModuleDict({"net": torch.compile(network())})
    average = ShardedAverage(model, {}, None, use_buffers=True)
    expected = [f"module.net.{name}" for name in network().state_dict()]
    assert [name for name in average.state_dict() if name != "n_averaged"] == expected


def test_the_dtype_is_that_of_the_model_before_it_was_converted():
    model = network()
    dtypes = tensor_dtypes(model)
    made = partial(ShardedAverage, model.to(torch.bfloat16), device=None, use_buffers=True)
    floating = {value.dtype for value in made(dtypes).module.state_dict().values() if value.is_floating_point()}
    assert floating == {torch.float32}
    assert made({}).module.get_parameter("0.weight").dtype == torch.bfloat16
