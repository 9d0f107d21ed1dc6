"""What a snapshot counts is what the process holds, whoever's optimizer it is: checked against torch's allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lightning_memopt as lm
from lightning_memopt.metrics import OptimizerStateBytes
from tests._models import fill_grads
from tests.optim._measured import Network, stepped

pytestmark = pytest.mark.slow


@pytest.fixture
def model() -> Network:
    return Network()


def held_by(action: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that torch's CPU allocator has given out and not got back during an action, and its result.

    Read off the profiler's records of allocations: as many bytes as were asked for, without rounding.
    """
    gc.freeze()  # what was there before is not looked at: collecting all of it takes longer than the tests
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = action()
            gc.collect()
    finally:
        gc.unfreeze()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert all(event.device_type() == torch.autograd.DeviceType.CPU for event in events)
    return sum(event.nbytes() for event in events), result


def test_the_allocator_sees_what_stays():
    def action() -> list[Tensor]:
        torch.zeros(5000)  # goes
        return [torch.zeros(1000), torch.zeros(3)]

    kept, _ = held_by(action)
    assert kept == 4012


def total(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> int:
    metric = OptimizerStateBytes()
    metric.update(lm.take_snapshot(optimizer, model))
    return int(metric.compute()["total"])


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_total_is_what_building_our_optimizer_allocated(model, recipe):
    held, optimizer = held_by(lambda: lm.MemOpt(model.named_parameters(), recipe))
    assert total(optimizer) == total(optimizer, model) == held > 0


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_total_is_what_our_optimizer_holds_after_steps(model, recipe):
    """In bfloat16, with a change of subspace at every step: nothing else stays."""
    options = {"gap": 1} if "snsm" in recipe else {}
    warm = lm.MemOpt(model.named_parameters(), recipe, state_dtype="bfloat16", **options)
    fill_grads(list(model.parameters()), seed=0)
    warm.step()  # what torch makes once

    def act() -> lm.MemOpt:
        optimizer = lm.MemOpt(model.named_parameters(), recipe, state_dtype="bfloat16", **options)
        for _ in range(3):
            optimizer.step()
        return optimizer

    held, optimizer = held_by(act)
    assert total(optimizer, model) == held > 0


def test_a_reformat_gives_back_what_it_no_longer_needs(model):
    before = total(lm.MemOpt(model.named_parameters(), "adamw"))
    fill_grads(list(model.parameters()), seed=0)

    def act() -> lm.MemOpt:  # frees of what was there before would not be seen
        optimizer = lm.MemOpt(model.named_parameters(), "adamw")
        optimizer.step()
        optimizer.reformat(
            {"lm_head.weight": {"momentum": "none"}, "embed_tokens.weight": {"momentum": "low_rank", "rank": 2}}
        )
        return optimizer

    held, optimizer = held_by(act)
    assert total(optimizer) == held < before - 2 * 4 * 960 + 2 * 4 * 64 + 1


OTHERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW, one by one": (torch.optim.AdamW, {"foreach": False}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam, foreach": (torch.optim.Adam, {"foreach": True}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop, all": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
}
BF16 = ("AdamW", "AdamW, amsgrad", "Adafactor")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in OTHERS), *((name, torch.bfloat16) for name in BF16)]
)
def test_total_is_what_torchs_optimizer_allocated(name, dtype):
    make, options = OTHERS[name]
    stepped(Network(dtype), make, **options)  # what torch makes once
    model = Network(dtype)
    fill_grads(list(model.parameters()), seed=0)

    def act() -> torch.optim.Optimizer:
        optimizer = make(model.parameters(), **options)
        optimizer.step()
        return optimizer

    held, optimizer = held_by(act)
    assert total(optimizer, model) == total(optimizer) == held > 0
    assert model.temperature.ndim == 0, "the statistics of a parameter that is a number are none of the counters"


def test_total_is_what_lbfgs_allocated(model):
    parameters = [model.lm_head.weight, model.embed_tokens.weight]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((param.sin() ** 2).sum() for param in parameters)
        loss.backward()
        return loss

    closure_grads = [torch.zeros_like(param) for param in parameters]
    for param, grad in zip(parameters, closure_grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.LBFGS(parameters, history_size=3, max_iter=4)
    optimizer.zero_grad(set_to_none=False)
    original = optimizer.zero_grad
    optimizer.zero_grad = lambda: original(set_to_none=False)
    held, _ = held_by(lambda: optimizer.step(closure) and None)
    counted = lm.take_snapshot(optimizer, model)
    assert counted.local_bytes + counted.counter_bytes == held > 0
