"""MemorySavings: what is saved of AdamW's state."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import lightning_memopt as lm
from lightning_memopt.metrics import (
    MemorySavings,
)
from tests.metrics._measured import MODEL, Network, adamw, computed, other, ours, snapshot, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw_saves_nothing(dtype):
    model = Network(dtype=dtype)
    nothing = {"saved": 0.0, "saved_momentum": 0.0, "saved_second_moment": 0.0}
    assert computed(MemorySavings, lm.take_snapshot(adamw(model), model)) == nothing
    state_dtype = "bfloat16" if dtype == torch.bfloat16 else None
    assert computed(MemorySavings, ours("adamw", model, state_dtype=state_dtype).snapshot()) == nothing


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_saved_is_what_the_snapshot_says_and_what_both_optimizers_hold(recipe):
    optimizer = ours(recipe)
    mine, theirs = tensors(optimizer), tensors(adamw())
    mine.pop("step"), theirs.pop("step")
    expected = 1 - sum(mine.values()) / sum(theirs.values())
    found = computed(MemorySavings, optimizer.snapshot())
    assert found["saved"] == pytest.approx(expected, abs=1e-6)
    assert found["saved"] == pytest.approx(optimizer.snapshot().saved, abs=1e-6)
    assert found["saved"] == pytest.approx((found["saved_momentum"] + found["saved_second_moment"]) / 2, abs=1e-6)


def test_savings_of_momentum_and_second_moment():
    found = computed(MemorySavings, snapshot("adafactor"))
    vectors = sum(p.numel() for p in MODEL.parameters() if p.ndim < 2)
    assert 0.9 < found["saved_momentum"] <= 1
    assert 0.5 < found["saved_second_moment"] < 1
    found = computed(MemorySavings, lm.take_snapshot(adamw(MODEL, amsgrad=True), MODEL))
    assert found == {"saved": -0.5, "saved_momentum": 0.0, "saved_second_moment": -1.0}
    found = computed(MemorySavings, lm.take_snapshot(other(torch.optim.SGD, momentum=0.9), MODEL))
    assert found == {"saved": 0.5, "saved_momentum": 0.0, "saved_second_moment": 1.0}
    assert vectors > 0
