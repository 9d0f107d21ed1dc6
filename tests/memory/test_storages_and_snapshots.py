"""What a snapshot counts is what the process holds, whoever's optimizer it is: checked against torch's allocator."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lightning_memopt as lm
from lightning_memopt.memory.storages import Storages
from lightning_memopt.metrics import OptimizerStateBytes
from lightning_memopt.optim.measuring import peak_bytes
from tests._models import fill_grads


class TwoParts(torch.Tensor):
    """A wrapper subclass that keeps its values in two tensors, as quantised optimizer state does."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> TwoParts:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> TwoParts:
        return TwoParts(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} looks at the values")


class Network(nn.Module):
    """One of everything: an embedding, fused attention, vectors, a convolution, a number, a head."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(40, 24)
        self.layer = nn.TransformerEncoderLayer(24, 2, 56)
        self.conv = nn.Conv2d(3, 10, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(24, 40, bias=False)
        self.register_buffer("positions", torch.zeros(7))
        self.to(dtype)


@pytest.fixture
def model() -> Network:
    return Network()


def stepped(model: nn.Module, make: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    optimizer = make(model.parameters(), **options)
    fill_grads([param for param in model.parameters() if param.requires_grad], seed=0)
    optimizer.step()
    return optimizer


def numel(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def by_name(snapshot: lm.Snapshot) -> dict[str, lm.BlockFacts]:
    found = {block.name: block for block in snapshot.blocks}
    assert len(found) == len(snapshot.blocks), "names are unique"
    return found


# --- storages --------------------------------------------------------------------------------------------------------


def test_a_view_counts_all_of_its_storage_once():
    whole = torch.zeros(1000)
    storages = Storages()
    assert storages.count([whole[10:20]]) == 4000
    assert storages.count([whole, whole[:500].view(50, 10), whole.detach(), whole.view(torch.int32)]) == 0
    assert Storages().count([whole, whole]) == 4000


def test_two_tensors_of_one_buffer_count_once():
    buffer = bytearray(64)
    first = torch.frombuffer(buffer, dtype=torch.uint8)
    assert Storages().count([first, first[32:].view(torch.float32)]) == 64
    flat = torch.zeros(12)
    assert Storages().count(flat.split(5)) == 48


def test_an_expanded_tensor_counts_what_is_there():
    assert Storages().count([torch.zeros(1).expand(1000)]) == 4
    assert Storages().count([torch.zeros(0), torch.zeros(3, 0)]) == 0
    assert Storages().count([]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.complex64, torch.bool])
def test_every_dtype_counts_its_bytes(dtype):
    assert Storages().count([torch.zeros(10, dtype=dtype)]) == 10 * torch.zeros(1, dtype=dtype).element_size()


def test_what_was_freed_is_not_taken_for_what_is_new():
    """Storages are told apart by address, and the same address may come back: but not while the tensors live."""
    kept = [torch.zeros(100) for _ in range(50)]
    assert Storages().count(kept) == 50 * 400


def test_a_tensor_of_two_tensors_counts_both():
    codes, scale = torch.zeros(100, dtype=torch.uint8), torch.zeros(7)
    storages = Storages()
    assert storages.count([TwoParts(codes, scale)]) == 128
    assert storages.count([codes, scale, TwoParts(codes, torch.zeros(2))]) == 8, "the codes were counted before"
    nested = TwoParts(TwoParts(torch.zeros(10), torch.zeros(1)), torch.zeros(3))
    assert Storages().count([nested]) == 56


def test_a_sparse_tensor_counts_its_indices_and_values():
    """As the gradient of `nn.Embedding(sparse=True)`, which SparseAdam takes."""
    layer = nn.Embedding(50, 6, sparse=True)
    layer(torch.tensor([3, 7, 9, 11])).sum().backward()
    assert Storages().count([layer.weight.grad]) == 4 * 8 + 4 * 6 * 4
    assert lm.take_snapshot([], layer).memory.gradients == 4 * 8 + 4 * 6 * 4


def test_meta_tensors_count_what_they_would_take():
    first = torch.zeros(100, device="meta")
    storages = Storages()
    assert storages.count([first, first[:3]]) == 400
    assert storages.count([torch.zeros(10, device="meta")]) == 40


# --- what the allocator saw ------------------------------------------------------------------------------------------


def held_by(action: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that torch's CPU allocator has given out and not got back during an action, and its result.

    Read off the profiler's records of allocations: as many bytes as were asked for, without rounding.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = action()
        gc.collect()
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


# --- kinds and parts of other optimizers -----------------------------------------------------------------------------


def test_adamw_is_dense_and_counts_two_numbers_per_element(model):
    snapshot = lm.take_snapshot(stepped(model, torch.optim.AdamW), model)
    assert snapshot.state_bytes == snapshot.local_bytes == snapshot.adamw_bytes == 8 * numel(model)
    assert snapshot.momentum_bytes == snapshot.second_moment_bytes == 4 * numel(model)
    assert {(block.momentum, block.second_moment, block.rank) for block in snapshot.blocks} == {
        ("dense", "dense", None)
    }
    assert snapshot.counter_bytes == 4 * len(list(model.parameters()))
    assert (snapshot.step, snapshot.skipped, snapshot.world_size, snapshot.saved) == (1, 0, 1, 0.0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_before_the_first_step_there_is_no_state(model, make):
    snapshot = lm.take_snapshot(make(model.parameters()), model)
    assert (snapshot.state_bytes, snapshot.local_bytes, snapshot.counter_bytes, snapshot.step) == (0, 0, 0, 0)
    assert {(block.momentum, block.second_moment) for block in snapshot.blocks} == {("none", "none")}
    assert snapshot.adamw_bytes == 8 * numel(model)
    assert all(block.pending == (make is torch.optim.AdamW) for block in snapshot.blocks)
    assert snapshot.saved == (make is torch.optim.SGD), "SGD without momentum never has state, AdamW has none yet"


def test_what_has_no_state_yet_is_not_saved(model):
    optimizer = torch.optim.AdamW(model.parameters())
    first, *_ = model.parameters()
    first.grad = torch.ones_like(first)
    optimizer.step()
    snapshot = lm.take_snapshot(optimizer, model)
    assert 0 < sum(not block.pending for block in snapshot.blocks) < len(snapshot.blocks)
    assert snapshot.saved == 0
    assert lm.metrics.memory_savings(snapshot)["saved"] == 0


def test_a_parameter_in_two_optimizers_has_one_adamw_to_compare_with():
    weight = nn.Parameter(torch.zeros(5, 8))
    weight.grad = torch.ones_like(weight)
    optimizers = [torch.optim.AdamW([weight]), torch.optim.SGD([weight], lr=0.1, momentum=0.9)]
    for optimizer in optimizers:
        optimizer.step()
    module = nn.Module()
    module.weight = weight
    assert lm.take_snapshot(optimizers, module).saved == -0.5


def test_state_of_no_parameter_and_of_a_wrapped_optimizer_counts(model):
    optimizer = stepped(model, torch.optim.AdamW)
    before = lm.take_snapshot(optimizer, model).local_bytes
    optimizer.state["global"] = {"buffer": torch.zeros(25)}
    assert lm.take_snapshot(optimizer, model).local_bytes == before + 100

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.optim = inner

    assert lm.take_snapshot(Wrapper(optimizer), model).local_bytes == before + 100


@pytest.mark.parametrize("given", [3, None, "adamw", [None], [torch.zeros(2)]])
def test_what_is_no_optimizer_is_refused(given, model):
    with pytest.raises(TypeError, match="`optimizers` must be an optimizer or a list of them, got"):
        lm.take_snapshot(given, model)


def test_the_peak_where_the_system_does_not_list_it(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "Name: python\n")
    assert peak_bytes(torch.device("cpu")) > 1 << 20


def test_amsgrad_keeps_a_third_number_which_counts_as_second_moment(model):
    snapshot = lm.take_snapshot(stepped(model, torch.optim.AdamW, amsgrad=True), model)
    assert snapshot.second_moment_bytes == 8 * numel(model) == 2 * snapshot.momentum_bytes
    assert snapshot.saved == -0.5


def test_bf16_parameters_have_an_adamw_of_bf16():
    model = Network(torch.bfloat16)
    snapshot = lm.take_snapshot(stepped(model, torch.optim.AdamW), model)
    assert snapshot.state_bytes == snapshot.adamw_bytes == 4 * numel(model)
    assert snapshot.memory.parameters == snapshot.memory.gradients == 2 * numel(model)
    ours = lm.take_snapshot(lm.MemOpt(model.named_parameters(), "adamw"), model)
    assert ours.state_bytes == 8 * numel(model), "our state is float32 by default"
    assert ours.saved == -1


def test_sgd_has_momentum_or_nothing(model):
    snapshot = lm.take_snapshot(stepped(model, torch.optim.SGD, momentum=0.9), model)
    assert (snapshot.momentum_bytes, snapshot.state_bytes) == (4 * numel(model),) * 2
    assert {(block.momentum, block.second_moment) for block in snapshot.blocks} == {("dense", "none")}
    snapshot = lm.take_snapshot(stepped(model, torch.optim.SGD), model)
    assert snapshot.local_bytes == 0
    assert {block.momentum for block in snapshot.blocks} == {"none"}


def test_torchs_adafactor_is_factored(model):
    blocks = by_name(lm.take_snapshot(stepped(model, torch.optim.Adafactor), model))
    block = blocks["lm_head.weight"]
    assert (block.momentum, block.second_moment, block.role) == ("none", "factored", "head")
    assert block.state.second_moment == block.local_bytes == 4 * (40 + 24)
    assert blocks["layer.linear1.bias"].second_moment == "dense"
    assert blocks["layer.linear1.bias"].local_bytes == 4 * 56


def test_rmsprops_average_of_gradients_is_neither(model):
    optimizer = stepped(model, torch.optim.RMSprop, momentum=0.9, centered=True)
    blocks = by_name(lm.take_snapshot(optimizer, model))
    assert {(b.momentum, b.second_moment) for b in blocks.values()} == {("dense", "dense")}
    blocks.pop("temperature")  # a number that is no known statistic counts as a counter
    for block in blocks.values():
        assert block.state.momentum == block.state.second_moment == block.state.other > 0, block.name


def test_a_parameter_that_is_a_number_has_statistics_not_counters(model):
    block = by_name(lm.take_snapshot(stepped(model, torch.optim.AdamW), model))["temperature"]
    assert (block.role, block.shape, block.full_rank) == ("vector", (), 1)
    assert (block.state.momentum, block.state.second_moment, block.adamw_bytes) == (4, 4, 8)


# --- fused parameters ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """GPT-2's: inputs × outputs, three in one."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.c_attn = nn.Module()
        self.c_attn.weight = nn.Parameter(torch.ones(width, 3 * width))
        self.c_attn.bias = nn.Parameter(torch.ones(3 * width))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Module()])
        self.h[0].attn = Attention()


FUSED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "MultiheadAttention": (lambda: nn.MultiheadAttention(20, 2), "in_proj_weight", (20, 20)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(22, 2, 30), "self_attn.in_proj_weight", (22, 22)),
    "GPT-2": (GPT, "h.0.attn.c_attn.weight", (20, 20)),
}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_a_fused_parameter_add_up_to_its_state(name, make):
    build, weight, shape = FUSED[name]
    model = build()
    optimizer = stepped(model, make, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    state = optimizer.state[model.get_parameter(weight)]
    kept = sum(value.untyped_storage().nbytes() for key, value in state.items() if key != "step")
    blocks = by_name(lm.take_snapshot(optimizer, model))
    parts = [blocks.pop(f"{weight}:{role}") for role in ("query", "key", "value")]
    assert [part.role for part in parts] == ["query", "key", "value"]
    assert [part.shape for part in parts] == [shape] * 3
    assert sum(part.local_bytes for part in parts) == sum(part.state.total for part in parts) == kept > 0
    sizes = [part.local_bytes for part in parts]
    assert max(sizes) - min(sizes) <= len(state), "divided evenly"
    adamw = sum(part.adamw_bytes for part in parts)
    assert adamw == sum(part.local_adamw_bytes for part in parts) == 8 * model.get_parameter(weight).numel()
    assert weight not in blocks


@pytest.mark.parametrize("recipe", lm.recipe_names())
@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_a_fused_parameter_of_ours_add_up_to_its_state(name, recipe):
    build, weight, shape = FUSED[name]
    model = build()
    optimizer = lm.MemOpt(model.named_parameters(), recipe)
    state = optimizer.state[model.get_parameter(weight)]
    kept = sum(value.untyped_storage().nbytes() for key, value in state.items() if key != "step")
    blocks = by_name(lm.take_snapshot(optimizer, model))
    parts = [blocks[f"{weight}:{role}"] for role in ("query", "key", "value")]
    assert [part.shape for part in parts] == [shape] * 3
    assert sum(part.local_bytes for part in parts) == sum(part.state.total for part in parts) == kept
    assert sum(part.adamw_bytes for part in parts) == 8 * model.get_parameter(weight).numel()


def test_both_columns_of_a_comparison_have_the_same_blocks(model):
    """The names, roles, shapes and what AdamW would keep do not depend on whose optimizer it is."""
    ours = lm.take_snapshot(lm.AdaPMLean(model.named_parameters()), model)
    theirs = lm.take_snapshot(torch.optim.AdamW(model.parameters()), model)
    described = [
        [(b.name, b.role, b.shape, b.full_rank, b.adamw_bytes, b.local_adamw_bytes) for b in snapshot.blocks]
        for snapshot in (ours, theirs)
    ]
    assert described[0] == described[1]


# --- our optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_take_snapshot_says_of_ours_what_they_say_themselves(model, recipe):
    optimizer = lm.MemOpt(model.named_parameters(), recipe)
    fill_grads(list(model.parameters()), seed=0)
    optimizer.step()
    own, taken = optimizer.snapshot(), lm.take_snapshot(optimizer, model)
    assert taken.blocks == own.blocks
    assert (taken.step, taken.counter_bytes, taken.world_size) == (1, own.counter_bytes, 1)
    assert own.memory is None
    for block in taken.blocks:
        assert block.local == block.state, block.name
        assert block.local_adamw_bytes == block.adamw_bytes
        assert (block.state.projections > 0) == (block.momentum == "subspace"), block.name
        assert (block.state.momentum > 0) == (block.momentum != "none"), block.name
        assert block.state.other == 0


def test_a_subspace_is_split_into_momentum_and_projections():
    weight = nn.Parameter(torch.zeros(48, 30))
    optimizer = lm.AdamSNSM([("self_attn.q_proj.weight", weight)], rank=5)
    (block,) = optimizer.snapshot().blocks
    sizes = {key: value.numel() * 4 for key, value in optimizer.state[weight].items() if key != "step"}
    assert block.state.projections in sizes.values()
    assert block.state.projections == 4 * 5 * 30, "a basis of the short side"
    assert block.state.momentum == 4 * 5 * 48
    assert sum(sizes.values()) == block.state.total
    assert (block.rank, block.full_rank, block.momentum) == (5, 30, "subspace")


def test_a_reformat_shows_in_the_next_snapshot(model):
    optimizer = lm.AdaPMLean(model.named_parameters(), rank=4)
    before = optimizer.snapshot()
    optimizer.reformat({"lm_head.weight": {"rank": 2}, "embed_tokens.weight": {"momentum": "none"}})
    after = by_name(optimizer.snapshot())
    assert (after["lm_head.weight"].rank, after["embed_tokens.weight"].rank) == (2, None)
    assert by_name(before)["lm_head.weight"].rank == 4, "the first one is as it was"
    with pytest.raises(FrozenInstanceError):
        before.blocks = ()


def test_frozen_parameters_have_no_block_until_they_train(model):
    model.embed_tokens.weight.requires_grad_(False)
    for optimizer in (lm.AdaPMLean(model.named_parameters()), stepped(model, torch.optim.AdamW)):
        snapshot = lm.take_snapshot(optimizer, model)
        assert "embed_tokens.weight" not in by_name(snapshot)
        assert snapshot.adamw_bytes == 8 * (numel(model) - 40 * 24)
        assert snapshot.memory.parameters == 4 * numel(model), "they take memory all the same"
    optimizer = stepped(Network(), torch.optim.AdamW)
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    assert lm.take_snapshot(optimizer).state_bytes == 8 * numel(model), "state that is there counts"


def test_state_that_one_parameter_lacks_is_not_made_up(model):
    """As under a model of which one part has had no gradient yet."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    optimizer.step()
    snapshot = lm.take_snapshot(optimizer, model)
    assert snapshot.state_bytes == 8 * 40 * 24
    assert by_name(snapshot)["embed_tokens.weight"].local_bytes == 0


def test_ours_without_names_say_what_to_do(model):
    optimizer = lm.AdaPMLean(model.parameters())
    with pytest.raises(ValueError, match=r"bind\(model\)"):
        lm.take_snapshot(optimizer, model)
    optimizer.bind(model)
    assert lm.take_snapshot(optimizer, model).state_bytes > 0


# --- several optimizers ----------------------------------------------------------------------------------------------


def test_several_optimizers_are_one_snapshot(model):
    named = list(model.named_parameters())
    ours = lm.AdaPMLean(named[:5])
    theirs = torch.optim.AdamW([param for _, param in named[5:]])
    for count in range(3):
        fill_grads([param for _, param in named], seed=count)
        theirs.step()
    ours.step()
    snapshot = lm.take_snapshot([ours, theirs], model)
    alone = [lm.take_snapshot(optimizer, model) for optimizer in (ours, theirs)]
    assert snapshot.blocks == alone[0].blocks + alone[1].blocks
    assert snapshot.adamw_bytes == 8 * numel(model)
    assert snapshot.counter_bytes == 4 * len(named)
    assert snapshot.step == 3
    assert len(by_name(lm.take_snapshot((theirs, ours)))) == len(snapshot.blocks)
    assert lm.take_snapshot([], model).blocks == ()


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda params: lm.MemOpt([("w", *params)], "adamw")])
def test_a_parameter_in_two_optimizers_has_the_state_of_both(make):
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(6, 5))
    optimizers = [make([model.w]), make([model.w]), torch.optim.SGD([model.w], momentum=0.9)]
    model.w.grad = torch.ones(6, 5)
    for optimizer in optimizers:
        optimizer.step()
    snapshot = lm.take_snapshot(optimizers, model)
    assert list(by_name(snapshot)) == ["w", "w@1", "w@2"]
    assert [block.local_bytes for block in snapshot.blocks] == [240, 240, 120]


def test_two_optimizers_of_unnamed_parameters_have_names_apart():
    optimizers = [torch.optim.AdamW([nn.Parameter(torch.ones(3))]) for _ in range(2)]
    assert list(by_name(lm.take_snapshot(optimizers))) == ["param_groups.0.0", "param_groups.0.0@1"]


def test_parameters_that_are_not_the_modules_count_too(model):
    mine, other = model.lm_head.weight, nn.Parameter(torch.ones(8, 9))
    optimizer = torch.optim.AdamW([{"params": [mine]}, {"params": [nn.Parameter(torch.ones(4)), other]}])
    mine.grad, other.grad = torch.ones_like(mine), torch.ones_like(other)
    optimizer.step()
    snapshot = lm.take_snapshot(optimizer, model)
    blocks = by_name(snapshot)
    assert list(blocks) == ["lm_head.weight", "param_groups.1.0", "param_groups.1.1"]
    assert [block.role for block in blocks.values()] == ["head", "vector", "other"]
    assert blocks["param_groups.1.1"].local_bytes == 8 * 72
    assert snapshot.memory.parameters == 4 * numel(model)


def test_names_do_not_depend_on_wrappers(model):
    for wrapped in (torch.compile(model), nn.ModuleDict({"module": model})):
        snapshot = lm.take_snapshot(torch.optim.AdamW(wrapped.parameters()), wrapped)
        plain = lm.take_snapshot(torch.optim.AdamW(model.parameters()), model)
        assert [(block.name, block.role) for block in snapshot.blocks] == [(b.name, b.role) for b in plain.blocks]


def test_a_part_called_module_below_a_wrapper_keeps_its_role(model):
    """As under DDP: names from which the wrapper's part was taken away are not taken for others the next time."""
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"module": model})})
    for optimizer in (torch.optim.AdamW(wrapped.parameters()), lm.AdaPMLean(wrapped.named_parameters())):
        blocks = by_name(lm.take_snapshot(optimizer, wrapped))
        assert blocks["lm_head.weight"].role == "head", type(optimizer).__name__


# --- state in unusual places -----------------------------------------------------------------------------------------


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


# --- memory of the process -------------------------------------------------------------------------------------------


def test_memory_beside_the_state(model):
    """Tied weights are there once, gradients while they are alive, a view as all of its storage."""
    model.lm_head.weight = model.embed_tokens.weight
    memory = lm.take_snapshot([], model).memory
    assert (memory.parameters, memory.gradients, memory.buffers) == (4 * numel(model), 0, 28)
    fill_grads(list(model.parameters())[:2], seed=0)
    assert lm.take_snapshot([], model).memory.gradients == 4 * sum(p.numel() for p in list(model.parameters())[:2])
    model.zero_grad()
    model.lm_head.weight.grad = torch.zeros(80, 24)[:40]
    assert lm.take_snapshot([], model).memory.gradients == 4 * 80 * 24
    model.register_buffer("shared", model.positions[2:])
    assert lm.take_snapshot([], model).memory.buffers == 28
    assert lm.take_snapshot([], nn.Identity()).memory.device == "cpu"
    assert lm.take_snapshot([]).memory is None


PEAK = """
import resource, sys, torch
sys.modules["lightning"] = None  # takes seconds to import, and is not needed
from lightning_memopt.optim.measuring import peak_bytes
device = torch.device("cpu")
before = peak_bytes(device)
untouched = torch.empty(200_000_000, dtype=torch.uint8)
between = peak_bytes(device)
torch.ones(200_000_000, dtype=torch.uint8)
after = peak_bytes(device)
print(before, between, after, peak_bytes(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_the_peak_grows_with_memory_that_is_touched_and_stays():
    """In a process of its own. What one inherits of another is not its peak: this one holds 300 MB meanwhile."""
    ballast = torch.ones(300_000_000, dtype=torch.uint8)
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    del ballast
    before, between, after, later, system = map(int, out.split())
    assert between - before < 20e6, "memory that nobody has written to is not resident"
    assert 190e6 < after - between < 220e6
    assert abs(later - after) < 1e6, "a peak does not go back when memory does"
    assert after <= system * 1.01
    assert before < system - 150e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_the_peak_is_at_least_what_is_resident_now():
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * __import__("resource").getpagesize()
    assert resident <= peak_bytes(torch.device("cpu")) < 100 * resident


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_a_foreign_optimizer_adds_up(model):
    snapshot = lm.take_snapshot(stepped(model, torch.optim.AdamW), model)
    *lines, rule, last = snapshot.table().splitlines()
    assert len(lines) == 2 + len(snapshot.blocks)
    assert set(rule) == {"─"}
    assert f"{8 * numel(model):,}" in last
    assert "saved 0.0%" in last
