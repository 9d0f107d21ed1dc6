"""Gradient release on one process: the same updates as a step, and at most two layers' gradients."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.memory.temporaries import Temporaries
from lightning_memopt.optim.signals import Probe
from tests._compare import assert_equal, relative_error
from tests._models import tiny_llama


def ids(step):
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return tiny_llama().to(dtype)


def backward(model, step):
    model(input_ids=ids(step), labels=ids(step)).loss.backward()


def trained(recipe, *, release, steps=4, dtype=torch.float32, **options):
    model = llama(dtype)
    optimizer = lm.MemOpt(model.named_parameters(), recipe, lr=1e-2, weight_decay=0.1, **options)
    if release:
        optimizer.release_gradients(model)
    for step in range(steps):
        backward(model, step)
        assert not release or all(param.grad is None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_the_same_updates_as_a_step(recipe):
    """To the bit where the same blocks are updated together; batches of other sizes differ in the order of sums."""
    model, optimizer = trained(recipe, release=True)
    expected, reference = trained(recipe, release=False)
    for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert relative_error(param.detach(), other.detach()) < 2e-5, name
        assert float(optimizer.state[param]["step"]) == float(reference.state[other]["step"]) == 4


@pytest.mark.parametrize("options", [{"master_weight_bits": 24}, {}])
def test_bfloat16_rounds_alike(options):
    model, _ = trained("adamw", release=True, dtype=torch.bfloat16, **options)
    expected, _ = trained("adamw", release=False, dtype=torch.bfloat16, **options)
    assert_equal(list(model.parameters()), list(expected.parameters()))


def test_at_most_two_layers_have_gradients():
    model = llama()
    layers = [set(layer.parameters()) for layer in model.model.layers]
    assert len(layers) >= 2
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    handle = optimizer.release_gradients(model)
    largest = sorted(sum(param.numel() for param in unit) for unit in [*layers, {model.lm_head.weight}])[-2:]
    held = []

    def count(param):
        held.append(sum(each.grad.numel() for each in model.parameters() if each.grad is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    backward(model, 0)
    assert 0 < max(held) <= sum(largest)
    assert 4 * max(held) <= handle.peak_bytes <= 4 * sum(largest)
    assert lm.take_snapshot(optimizer, model).memory.gradients == handle.peak_bytes


def test_a_tracer_of_allocations_finds_two_layers():
    """With what the step of a layer takes."""
    peaks, layers, size = {}, 12, 4 * 256 * 256
    for release in (True, False):
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(layers)))
        optimizer = lm.Adafactor(model.named_parameters(), lr=1e-2)
        if release:
            optimizer.release_gradients(nn.ModuleList([model]))
        loss = model(torch.ones(1, 256)).sum()
        with Temporaries() as traced:
            loss.backward()
        peaks[release] = traced.peak
    assert peaks[False] > layers * size
    assert peaks[True] < 2 * size + 4 * size  # update, divisor and squares of a chunk, and the state of a first step


def test_what_has_no_gradient_is_left_to_the_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    params = dict(model.named_parameters())
    whole = nn.ModuleDict({"layers": model})
    optimizer = lm.MemOpt(list(params.items()), "adamw", lr=1e-2)
    optimizer.release_gradients(whole)
    before = {name: param.detach().clone() for name, param in params.items()}
    (model[0](torch.ones(2, 4)).sum() + model[1].weight.sum()).backward()
    moved = [name for name, param in params.items() if not torch.equal(param, before[name])]
    assert moved == ["0.weight", "0.bias"]
    assert model[1].weight.grad is not None
    optimizer.step()
    moved = [name for name, param in params.items() if not torch.equal(param, before[name])]
    assert moved == ["0.weight", "0.bias", "1.weight"]
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    assert all(param.grad is None for param in params.values())


def test_two_backward_passes_are_refused_and_nothing_hangs_on():
    model = llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    optimizer.release_gradients(model)
    backward(model, 0)
    before = [param.detach().clone() for param in model.parameters()]
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"second backward pass .* call `optimizer.step\(\)` after every backward"):
        optimizer.step()
    assert_equal([param.detach() for param in model.parameters()], before)
    assert all(param.grad is None for param in model.parameters())
    backward(model, 2)
    optimizer.step()
    backward(model, 3)
    optimizer.zero_grad()  # an iteration without a step
    backward(model, 4)
    optimizer.step()


def test_after_a_gradient_that_is_not_finite_nothing_more_is_updated():
    model = llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    optimizer.release_gradients(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    handle = model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * float("nan"))
    backward(model, 0)
    assert all(param.grad is None for param in model.parameters())
    with pytest.raises(
        FloatingPointError, match=r"layers.1.mlp.up_proj.weight. Their layer is unchanged; those before"
    ):
        optimizer.step()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {"lm_head.weight", "model.norm.weight"}
    handle.remove()
    backward(model, 1)
    optimizer.step()
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_hooks_do_not_keep_an_optimizer_alive():
    model = llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    handle = optimizer.release_gradients(model)
    with pytest.raises(ValueError, match=r"Another optimizer releases gradients .* call `remove\(\)`"):
        lm.AdaPM(model.named_parameters()).release_gradients(model)
    del optimizer
    gc.collect()
    before = [param.detach().clone() for param in model.parameters()]
    backward(model, 0)
    assert_equal([param.detach() for param in model.parameters()], before)
    assert all(param.grad is not None for param in model.parameters())
    assert not handle.active
    lm.AdaPM(model.named_parameters()).release_gradients(model)


def test_parameters_that_are_frozen_and_unfrozen():
    model = llama()
    frozen = list(model.model.layers[0].parameters())[:2]
    for param in frozen:
        param.requires_grad_(False)
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    optimizer.release_gradients(model)
    for step, change in enumerate((False, True, True, False, False)):
        for param in frozen:
            param.requires_grad_(change)
        backward(model, step)
        optimizer.step()  # which sees the change
        optimizer.zero_grad()
        backward(model, 10 + step)
        assert all(param.grad is None for param in model.parameters()), step
        optimizer.step()


def test_skipped_layers_are_counted():
    model = llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2, nonfinite="skip")
    optimizer.release_gradients(model)
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    backward(model, 0)
    optimizer.step()
    assert optimizer.skipped == 1
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight.grad is None


def test_signals_are_those_of_ordinary_steps():
    found = []
    for release in (True, False):
        model = llama()
        optimizer = lm.AdaPMLean(model.named_parameters(), lr=0.0)
        if release:
            optimizer.release_gradients(model)
        probe = Probe(optimizer)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert probe.steps == 3
        found.append(probe.read())
    assert found[0].keys() == found[1].keys()
    for name, signals in found[0].items():
        assert signals.oscillation == pytest.approx(found[1][name].oscillation, abs=1e-5)
        assert signals.gradient_energy == pytest.approx(found[1][name].gradient_energy, rel=1e-5)
        assert signals.lost == pytest.approx(found[1][name].lost, abs=1e-8)


def test_it_ends():
    model = llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    handle = optimizer.release_gradients(model)
    again = optimizer.release_gradients(model)
    assert optimizer.releases_gradients
    assert not handle.active
    backward(model, 0)
    optimizer.step()
    again.remove()
    again.remove()
    handle.remove()
    backward(model, 1)
    assert all(param.grad is not None for param in model.parameters())
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_schedulers_closures_and_copies_keep_working():
    model = llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), lr=1e-2)
    optimizer.release_gradients(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)

    def closure():
        optimizer.zero_grad()
        backward(model, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    schedule.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not again.releases_gradients


def test_wrong_arguments():
    model, other = llama(), llama()
    optimizer = lm.AdaPMLean(model.named_parameters())
    with pytest.raises(TypeError, match="must be the module that the optimizer trains, got list"):
        optimizer.release_gradients(list(model.parameters()))
    with pytest.raises(ValueError, match="No parameter of LlamaForCausalLM trains with this optimizer"):
        optimizer.release_gradients(other)
    optimizer.release_gradients(model)
    weight = model.lm_head.weight
    with pytest.raises(RuntimeError, match="cannot be replaced after `release_gradients`: call `rebind` first"):
        optimizer.rebind({weight: nn.Parameter(weight.detach().clone())})
