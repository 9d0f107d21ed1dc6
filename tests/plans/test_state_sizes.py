"""State sizes of real architectures on the meta device, and that what is predicted is what is allocated."""

from __future__ import annotations

import pytest
import torch

import lightning_memopt as lm
from tests._models import LLAMA_SHAPES, big_gpt2, big_llama, fill_grads, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.slow

MODELS = [*LLAMA_SHAPES, "gpt2-1.5B"]


@pytest.fixture(scope="module")
def models():
    return {name: big_gpt2() if name.startswith("gpt2") else big_llama(name) for name in MODELS}


def shares(model, recipe, **options):
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, **options)
    optimizer.bind(model)
    snapshot = optimizer.snapshot()
    return snapshot.momentum_bytes / (snapshot.adamw_bytes / 2), snapshot.state_bytes / snapshot.adamw_bytes


@pytest.mark.parametrize("name", MODELS)
def test_adapm_keeps_at_most_a_tenth_of_the_momentum(models, name):
    assert shares(models[name], "adapm")[0] <= 0.10


@pytest.mark.parametrize("name", MODELS)
def test_adapm_mini_keeps_at_most_5_5_percent(models, name):
    assert shares(models[name], "adapm_mini")[1] <= 0.055


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["adapm_lean", "muon_lean"])
def test_lean_recipes_keep_at_most_3_5_percent(models, name, recipe):
    assert shares(models[name], recipe)[1] <= 0.035


@pytest.mark.parametrize("name", MODELS)
def test_snsm_lean_keeps_at_most_11_percent(models, name):
    assert shares(models[name], "snsm_lean")[1] <= 0.11


@pytest.mark.parametrize("name", ["1B", "7B"])
def test_adam_snsm_at_a_quarter_keeps_at_most_25_percent(models, name):
    assert shares(models[name], "adam_snsm", rank=1 / 4)[1] <= 0.25


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_predicted_bytes_are_the_allocated_ones(recipe, make, state_dtype):
    model = make()
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, state_dtype=state_dtype)
    optimizer.bind(model)
    with torch.device("meta"):
        ghost = make()
    predicted = lm.MemOpt(ghost.named_parameters(), recipe=recipe, state_dtype=state_dtype)
    predicted.bind(ghost)
    for _ in range(3):
        fill_grads(list(model.parameters()), seed=0)
        optimizer.step()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if value.numel()
    }
    snapshot = predicted.snapshot()
    assert sum(storages.values()) == snapshot.state_bytes + snapshot.counter_bytes
    assert optimizer.snapshot().local_bytes == snapshot.state_bytes


def test_adamw_bytes_are_those_of_torchs_adamw():
    model = tiny_gpt2()
    reference = torch.optim.AdamW(model.parameters())
    fill_grads(list(model.parameters()), seed=0)
    reference.step()
    kept = sum(
        value.untyped_storage().nbytes()
        for state in reference.state.values()
        for key, value in state.items()
        if key != "step"
    )
    assert lm.MemOpt(model.named_parameters(), recipe="adapm").snapshot().adamw_bytes == kept
