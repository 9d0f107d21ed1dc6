"""Gradients that cannot be used: an error or a skipped step, and nothing has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from tests._compare import assert_equal
from tests._models import fill_grads, tiny_llama, train


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("recipe", ["adapm_lean", "adam_snsm", "adamw"])
def test_nonfinite_raises_and_changes_nothing(recipe, value):
    model = tiny_llama()
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe)
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    fill_grads(list(model.parameters()), 0)
    model.lm_head.weight.grad[3, 2] = value
    with pytest.raises(FloatingPointError, match=r"elements in: lm_head\.weight\. Weights and state are unchanged"):
        optimizer.step()
    assert_unchanged(before, model, optimizer)


def test_nonfinite_skip_counts_and_changes_nothing():
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), nonfinite="skip")
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    fill_grads(list(model.parameters()), 0)
    model.model.norm.weight.grad[0] = float("nan")
    optimizer.step()
    assert_unchanged(before, model, optimizer)
    assert optimizer.snapshot().skipped == 1
    train(model, optimizer, 1)
    assert (optimizer.snapshot().skipped, optimizer.snapshot().step) == (1, 3)


def assert_unchanged(before, model, optimizer):
    weights, states = before
    for name, value in model.state_dict().items():
        assert_equal(value, weights[name])
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert_equal(value, states[index][key])


def test_sparse_and_complex_gradients_are_refused_before_anything_changes():
    embedding = nn.Embedding(8, 4, sparse=True)
    linear = nn.Linear(4, 4)
    optimizer = lm.MemOpt([*linear.named_parameters(), ("embedding.weight", embedding.weight)])
    embedding(torch.tensor([1])).sum().backward()
    linear(torch.ones(4)).sum().backward()
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'embedding\.weight' is sparse.*sparse=False"):
        optimizer.step()
    assert_equal(linear.weight.detach(), before)
    with pytest.raises(ValueError, match="Complex parameters are not supported"):
        lm.MemOpt([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])
