"""Snapshots of optimizers that keep their state in unusual places: objects, containers, views, codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from tests.memory._tensors import TwoParts
from tests.optim._measured import Network, numel, stepped


@pytest.fixture
def model() -> Network:
    return Network()


class Keeps(torch.optim.Optimizer):
    """Keeps whatever it is told to."""

    def __init__(self, params: Any, make: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__(params, {})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = make(param)


class Projector:
    """As GaLore's: a plain object with a tensor, or a list of two, or nothing yet."""

    def __init__(self, basis: Any) -> None:
        self.rank, self.basis, self.kind = 4, basis, "std"


@dataclass
class Quantised:
    codes: Tensor
    scales: list[Tensor]


def kept(make: Callable[[Tensor], dict[str, Any]], *shapes: tuple[int, ...]) -> lm.Snapshot:
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes or ((10, 6),)]
    return lm.take_snapshot(Keeps(params, make))


def test_tensors_in_an_object_count():
    for basis, size in ((torch.zeros(6, 4), 96), ([torch.zeros(6, 4), torch.zeros(4, 10)], 256), (None, 0)):
        snapshot = kept(
            lambda p, basis=basis: {"step": 7, "exp_avg": torch.zeros(10, 4), "projector": Projector(basis)}
        )
        (block,) = snapshot.blocks
        assert (block.state.momentum, block.state.projections, block.local.projections) == (160, size, size)
        assert (snapshot.step, snapshot.counter_bytes) == (7, 0)
        assert block.momentum == "other", "neither dense nor a kind of ours"


def test_tensors_in_containers_count():
    def make(param: Tensor) -> dict[str, Any]:
        history = [torch.zeros(3), (torch.zeros(2), {"deep": torch.zeros(5)})]
        return {"old": history, "quantised": Quantised(torch.zeros(60, dtype=torch.uint8), [torch.zeros(2)])}

    (block,) = kept(make).blocks
    assert block.local.other == 40 + 60 + 8
    assert block.local_bytes == block.state.total == 108


class Nested:
    def __init__(self) -> None:
        self.inner = Projector(torch.zeros(6, 4))


class Rotation(nn.Module):
    """An object that can be called, unlike the function that it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(6, 4))


class Slots:
    __slots__ = ("basis",)

    def __init__(self) -> None:
        self.basis = torch.zeros(6, 4)


@pytest.mark.parametrize("hidden", [Nested, Rotation, Slots])
def test_tensors_in_objects_of_other_sorts_count(hidden):
    (block,) = kept(lambda param: {"projector": hidden()}).blocks
    assert block.local_bytes == block.local.projections == 96


def test_things_that_are_no_tensors_count_nothing():
    snapshot = kept(
        lambda p: {"step": 3, "name": "x", "factor": 0.5, "function": print, "flag": None, "kind": Projector}
    )
    assert (snapshot.local_bytes, snapshot.counter_bytes, snapshot.step) == (0, 0, 3)


def test_state_that_is_views_of_one_flat_buffer_counts_the_buffer_once():
    flat = torch.zeros(1000)
    places = iter(flat.split(60))
    snapshot = kept(lambda p: {"exp_avg": next(places).view(10, 6)}, *[(10, 6)] * 3)
    assert snapshot.local_bytes == 4000, "all of it is kept alive"
    assert {block.momentum for block in snapshot.blocks} == {"dense"}


def test_state_that_lies_in_the_weights_takes_nothing_more():
    model = nn.Linear(6, 10, bias=False)
    optimizer = Keeps(model.parameters(), lambda p: {"exp_avg": p.detach(), "exp_avg_sq": torch.zeros(10, 6)})
    snapshot = lm.take_snapshot(optimizer, model)
    assert (snapshot.memory.parameters, snapshot.local_bytes) == (240, 240)


def test_quantised_state_counts_what_it_is_stored_in():
    def make(param: Tensor) -> dict[str, Any]:
        codes = torch.zeros(param.shape, dtype=torch.uint8)
        return {"exp_avg": TwoParts(codes, torch.zeros(3)), "step": torch.zeros(())}

    snapshot = kept(make)
    (block,) = snapshot.blocks
    assert (block.local.momentum, block.state.momentum, block.momentum) == (72, 72, "dense")
    assert snapshot.counter_bytes == 4
    assert snapshot.saved == 1 - 72 / 480


def test_meta_parameters_tell_what_they_would_take(model):
    snapshot = lm.take_snapshot(lm.MemOpt(model.to("meta").named_parameters(), "adamw"), model)
    assert snapshot.local_bytes == snapshot.state_bytes == snapshot.adamw_bytes == 8 * numel(model)
    assert (snapshot.memory.device, snapshot.memory.parameters) == ("meta", 4 * numel(model))
    assert snapshot.memory.peak > 0


def test_a_snapshot_changes_nothing_and_draws_no_random_number(model):
    optimizer = stepped(model, torch.optim.AdamW)
    state = {param: {key: value.clone() for key, value in entry.items()} for param, entry in optimizer.state.items()}
    keys, random = list(optimizer.state), torch.get_rng_state()
    idle = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        lm.take_snapshot([optimizer, idle], model)
    assert list(optimizer.state) == keys
    assert not idle.state, "a look does not make entries"
    assert torch.equal(random, torch.get_rng_state())
    for param, entry in optimizer.state.items():
        for key, value in entry.items():
            assert torch.equal(value, state[param][key])
