"""Precisions and their plugins."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.strategy.model.precision import sharded_plugin, sharding_policy

pytestmark = pytest.mark.slow

GIVEN = pytest.mark.parametrize("strategy", ["memopt_fsdp", "memopt_fsdp_offload", MemOptFSDPStrategy])


def make_trainer(strategy, **options):
    strategy = strategy() if callable(strategy) else strategy
    return Trainer(strategy=strategy, **{"accelerator": "cpu", "devices": 1, "logger": False, **options})


@GIVEN
@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_precisions_that_are_refused(strategy, precision):
    """Lightning checks instances of its own class itself, with an error of the same type."""
    with pytest.raises(ValueError, match=f"{precision}.*(bf16-mixed|Choose a different precision)"):
        make_trainer(strategy, precision=precision)


@GIVEN
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_precisions_that_are_supported(strategy, precision):
    trainer = make_trainer(strategy, precision=precision)
    assert trainer.precision == precision
    assert trainer.precision_plugin is trainer.strategy.precision_plugin


class OwnPlugin(Precision):
    """One that a user has written."""


@GIVEN
@pytest.mark.parametrize(
    "plugin", [DoublePrecision(), HalfPrecision("16-true"), MixedPrecision("16-mixed", "cpu"), OwnPlugin()]
)
def test_plugins_that_are_refused(strategy, plugin):
    with pytest.raises(ValueError, match=f"32-true, bf16-true, bf16-mixed .* got .* \\({type(plugin).__name__}\\)"):
        make_trainer(strategy, plugins=[plugin])


def test_plugins_stay_what_they_are():
    assert sharded_plugin(None) is None
    for plugin in (Precision(), HalfPrecision("bf16-true"), MixedPrecision("bf16-mixed", "cpu")):
        sharded = sharded_plugin(plugin)
        assert isinstance(sharded, type(plugin))
        assert sharded.precision == plugin.precision
        assert sharded_plugin(sharded) is sharded  # a strategy that is given to a second Trainer


def test_policy_of_mixed_precision():
    inner, outer = (sharding_policy("bf16-mixed", outermost=outermost) for outermost in (False, True))
    assert (inner.param_dtype, inner.reduce_dtype, inner.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert (outer.param_dtype, outer.reduce_dtype, outer.output_dtype) == (torch.bfloat16, torch.float32, torch.float32)
    plain = sharding_policy("bf16-true", outermost=True)
    assert (plain.param_dtype, plain.reduce_dtype, plain.output_dtype) == (None, None, None)
