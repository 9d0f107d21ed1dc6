"""Snapshots of any optimizer, ours or others', and of the memory of the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.optim.measuring import peak_bytes
from tests._models import fill_grads
from tests.optim._measured import Network, by_name, numel, stepped

pytestmark = pytest.mark.slow


@pytest.fixture
def model() -> Network:
    return Network()


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
        assert (block.state.projections > 0) == (block.momentum in ("subspace", "galore", "fira")), block.name
        assert (block.state.momentum > 0) == (block.momentum != "none"), block.name
        assert block.state.other == 0


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
    optimizer = lm.AdaPMLean(list(model.parameters()))
    with pytest.raises(ValueError, match=r"bind\(model\)"):
        lm.take_snapshot(optimizer, model)
    optimizer.bind(model)
    assert lm.take_snapshot(optimizer, model).state_bytes > 0


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
