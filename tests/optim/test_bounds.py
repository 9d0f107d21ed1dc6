"""The bound on |U / D|, what it is counted for, and weights that stay finite."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.optim import bounds
from lightning_memopt.plans.rates import BlockRates
from lightning_memopt.plans.recipe import Recipe
from tests._compare import assert_equal, relative_error
from tests._models import fill_grads, tiny_llama, train
from tests.kinds.contract.against_reference import gradients, reference_of
from tests.kinds.contract.cases import all_pairs, is_basic, label, layout_of, tick_at
from tests.kinds.reference.update import update as REFERENCE

pytestmark = pytest.mark.slow

NAME = "mlp.up_proj.weight"
BETAS, EPS = (0.9, 0.95), 1e-8
# Of the change: what rounding the weights themselves leaves of it.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
PAIRS = all_pairs(is_basic)


def made(recipe: Any, shape: tuple[int, ...] = (12, 20), dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return an optimizer of one matrix of zeros, and the matrix."""
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    overrides = {NAME: recipe} if isinstance(recipe, Recipe) else None
    recipe = "adamw" if isinstance(recipe, Recipe) else recipe
    options = {"lr": 1e-2, "betas": BETAS, "eps": EPS, "overrides": overrides, **options}
    return lm.MemOpt([(NAME, param)], recipe, **options), param


def block_of(optimizer: lm.MemOpt) -> Any:
    ((_, _, block),) = optimizer.blocks()
    return block


def mostly_zero(seed: int, shape: tuple[int, ...] = (12, 20)) -> torch.Tensor:
    """Return a gradient of which one element in twenty is not zero, as behind a ReLU: U / D reaches millions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.05)


# ----------------------------------------------------------------------------------------------------- the bound itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize(("momentum", "second"), PAIRS, ids=label)
def test_weights_equal_the_reference(momentum, second, bound, dtype):
    """Every pair of kinds in every dtype; the reference gets the weights of before each step, and float64."""
    if dtype in (torch.bfloat16, torch.float16) and (bound is None or second.name == "none" or second.of_direction):
        return  # rounding is all that would be compared
    shape = (12, 20)
    optimizer, param = made(Recipe(momentum, second), shape, dtype, max_update=bound, weight_decay=0.1)
    block = block_of(optimizer)
    layout = layout_of(shape)
    directions, denominators = reference_of(momentum, layout), reference_of(second, layout)
    applies = second.name not in ("none", "normalized", "orthogonal")
    applies &= second.name != "dense" or momentum.name not in ("none", "dense")
    applies |= momentum.averages_squares
    betas = {"beta1": BETAS[0], **({"beta2": BETAS[1], "eps": EPS} if momentum.averages_squares else {})}
    reached = 0
    for number, grad in enumerate(gradients("drifting", shape)[:8], start=1):
        param.grad, before = grad.to(dtype), param.detach().double().clone()
        optimizer.step()
        tick, state = tick_at(number), optimizer.state[param]
        exact = param.grad.double()
        gap = getattr(momentum, "gap", 1)
        like = {key: value for key, value in state.items() if key in momentum.keys}
        draw = type(tick)(number, block.key, block.index)
        direction = directions.momentum(exact, tick=draw, gap=gap, like=like, **betas)
        divisor = denominators.second_moment(
            direction if second.of_direction else exact, beta2=BETAS[1], eps=EPS, tick=tick
        )
        if second.of_direction:  # that is U / D
            direction, divisor = divisor, 1.0
        limit = bound if applies else None
        expected = REFERENCE(before, direction, divisor, lr=1e-2, weight_decay=0.1, max_update=limit)
        assert relative_error(param.detach().double() - before, expected - before) <= TOLERANCES[dtype]
        reached += (
            int(((direction / divisor).abs() > 0.7).sum()) if applies and getattr(momentum, "scale", 1) == 1 else 1
        )
    assert reached > 0


def test_a_bound_that_is_not_reached_changes_rounding_only():
    found = []
    for bound in (None, 1e6):
        model = tiny_llama()
        train(model, lm.AdaPMLean(model.named_parameters(), lr=1e-3, max_update=bound), 5)
        found.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert relative_error(found[0], found[1]) < 1e-6


@pytest.mark.parametrize("recipe", [name for name in lm.recipe_names() if name != "adamw"])
@pytest.mark.parametrize("bound", [10.0, 1.0])
def test_no_step_moves_a_bounded_block_further(recipe, bound):
    """Gradients that are mostly zero, a spike of a million, thousands of zeros (here: a second moment that is gone)."""
    optimizer, param = made(recipe, max_update=bound, betas=None)
    if not block_of(optimizer).recipe.bounded:
        return
    for step in range(40):
        before = param.detach().clone()
        param.grad = mostly_zero(step) * (1e6 if step == 20 else 1e-6 if step > 30 else 1.0)
        optimizer.step()
        assert float((param.detach() - before).abs().max()) <= 1e-2 * bound * (1 + 1e-3)


def test_without_a_bound_the_same_gradients_move_weights_by_thousands():
    optimizer, param = made("adapm", max_update=None)
    largest = 0.0
    for step in range(40):
        before = param.detach().clone()
        param.grad = mostly_zero(step)
        optimizer.step()
        largest = max(largest, float((param.detach() - before).abs().max()) / 1e-2)
    assert largest > 1e3


@pytest.mark.parametrize("shape", [(12, 20), (20,)], ids=label)
def test_adamw_has_no_bound(shape):
    """Torch's AdamW bit for bit, vectors and sparse gradients too, whatever `max_update` is."""
    mine, theirs = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    optimizer = lm.MemOpt([(NAME, mine)], "adamw", lr=1e-2, max_update=1e-3)
    control = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(20):
        mine.grad = mostly_zero(step, shape)
        theirs.grad = mine.grad.clone()
        optimizer.step()
        control.step()
    assert_equal(mine.detach(), theirs.detach())


def test_the_denominator_none_has_a_unit_and_no_bound():
    optimizer, param = made(Recipe("low_rank", "none"), max_update=1e-3)
    param.grad = torch.full_like(param, 5.0)
    optimizer.step()
    assert float(param.detach().abs().max()) > 1e-2
    assert optimizer.snapshot().blocks[0].max_update is None


@pytest.mark.parametrize("bound", [None, 10.0, 1.0])
@pytest.mark.parametrize("momentum", ["dense", "low_rank"])
def test_a_release_is_bounded_as_a_step(momentum, bound):
    """Whatever momentum the block had: what is lost mixes elements."""
    optimizer, param = made(Recipe(momentum, "dense"), max_update=bound)
    for step in range(5):
        param.grad = mostly_zero(step)
        optimizer.step()
    before = param.detach().clone()
    optimizer.reformat({NAME: {"momentum": "low_rank", "rank": 1}})
    moved = float((param.detach() - before).abs().max()) / 1e-2
    assert moved > 0
    assert moved <= bound * (1 + 1e-3) if bound else moved > 1


@pytest.mark.parametrize("momentum", ["low_rank", "subspace"])
@pytest.mark.parametrize("bound", [None, 10.0, 1.0])
def test_momentum_that_becomes_dense_is_bounded_too(momentum, bound):
    """Dense × dense has no bound of its own, and needs none where its momentum is an average of each element's own."""
    optimizer, param = made(Recipe(momentum, "dense"), max_update=bound)
    for step in range(5):
        param.grad = mostly_zero(step)
        optimizer.step()
    optimizer.reformat({NAME: {"momentum": "dense"}})
    largest = 0.0
    for step in range(5, 10):
        before = param.detach().clone()
        param.grad = mostly_zero(step)
        optimizer.step()
        largest = max(largest, float((param.detach() - before).abs().max()) / 1e-2)
    assert largest <= max(bound, 1.2) * 1.01 if bound else largest > 100


def test_the_table_reports_the_bound():
    model = tiny_llama()
    optimizer = lm.AdaPM(model.named_parameters(), max_update=2.5)
    found = {block.name: block.max_update for block in optimizer.snapshot().blocks}
    assert found["model.layers.0.self_attn.q_proj.weight"] == 2.5
    assert found["model.embed_tokens.weight"] is None  # none × dense: at most 1/√(1−β₂)
    assert found["model.norm.weight"] is None
    header, _, *lines = optimizer.plan_table().splitlines()
    assert "bound" in header
    assert any("q_proj" in line and " 2.5 " in line for line in lines)
    assert "max_update=2.5" in repr(optimizer)


# ------------------------------------------------------------------------------------------------------ hyperparameter


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, r"`max_update` must be above 0, got 0: nothing would train; None means no bound"),
        (-1.0, ValueError, r"`max_update` must be finite, at least 0, got -1\.0"),
        (math.inf, ValueError, r"`max_update` must be finite, at least 0, got inf"),
        (math.nan, ValueError, r"`max_update` must be finite, at least 0, got nan"),
        ("3", TypeError, r"`max_update` must be a number, got '3'"),
    ],
)
def test_bad_values(value, error, message):
    with pytest.raises(error, match=message):
        made("adapm", max_update=value)


def test_groups_have_bounds_of_their_own_and_keep_them():
    model = tiny_llama()
    named = list(model.named_parameters())
    groups = [{"params": named[:4], "max_update": 2.0}, {"params": named[4:], "max_update": None}]
    optimizer = lm.AdaPMLean(groups)
    assert [group["max_update"] for group in optimizer.param_groups] == [2.0, None]
    train(model, optimizer, 2)
    fresh = lm.AdaPMLean([{"params": named[:4]}, {"params": named[4:]}])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["max_update"] for group in fresh.param_groups] == [2.0, None]


def test_a_checkpoint_from_before_gets_what_is_configured():
    model = tiny_llama()
    saved = lm.AdaPMLean(model.named_parameters()).state_dict()
    for group in saved["param_groups"]:
        del group["max_update"]
    optimizer = lm.AdaPMLean(model.named_parameters(), max_update=2.0)
    optimizer.load_state_dict(saved)
    assert [group["max_update"] for group in optimizer.param_groups] == [2.0]


# ------------------------------------------------------------------------------------------------------------- warning


def test_a_bound_that_becomes_the_method_is_said_once():
    optimizer, param = made("adapm_lean", max_update=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 500):
            fill_grads([param], step)
            optimizer.step()
            if step == bounds.FIRST + bounds.EVERY * (bounds.COUNTED - 1):
                assert not caught
    (warning,) = caught
    text = r"`max_update` limited \d+\.\d% of all update elements in the last 30 steps, which changes the method"
    assert re.match(text, str(warning.message))


def test_a_bound_that_is_hardly_reached_says_nothing():
    optimizer, param = made("adapm_lean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 260):
            fill_grads([param], step, scale=1e6 if step == 110 else 1.0)  # one counted step
            optimizer.step()


def test_counting_reads_nothing_in_its_own_step(monkeypatch):
    """A number is read one step later, when the verdict on the gradients has waited for the device anyway."""
    optimizer, param = made("adapm_lean")
    item, reads = torch.Tensor.item, []
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(self) or item(self))
    counts = []
    for step in range(1, bounds.FIRST + 3):
        reads.clear()
        fill_grads([param], step)
        optimizer.step()
        counts.append(len(reads))
    *before, counted, after, last = counts
    assert {*before, counted, last} == {before[0]}  # the counter of steps, which is on the CPU
    assert after == before[0] + 1


# ------------------------------------------------------------------------------------------------------- finite weights


def test_elements_of_all_magnitudes_in_float16():
    """Without a bound these weights would become infinite; with one they cannot."""
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** (torch.rand(12, 20, generator=generator) * 16 - 12)
    for bound in (10.0, None):
        optimizer, param = made("adapm", dtype=torch.float16, max_update=bound)
        with contextlib.nullcontext() if bound else pytest.raises(FloatingPointError) as caught:
            for step in range(40):
                noise = torch.randn(12, 20, generator=torch.Generator().manual_seed(step))
                param.grad, before = (noise * size).half(), param.detach().clone()
                optimizer.step()
        assert bool(param.isfinite().all())
    assert f"Weights would have become infinite or NaN in: {NAME}. They keep their previous values" in str(caught.value)
    assert 0 < int((param == before).sum()) < param.numel()


@pytest.mark.parametrize("recipe", ["adamw", "adapm_lean", "adam_snsm", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_absurd_rates_raise_and_weights_stay_finite(recipe, dtype, start):
    """Whatever makes them large: the error comes in the step in which a weight would have left the range."""
    top = torch.finfo(dtype).max
    for rates in ({"lr": top / 32}, {"lr": 4.0, "weight_decay": top / 16}):
        optimizer, param = made(recipe, dtype=dtype, **rates)
        param.detach().fill_(start * top)
        with pytest.raises(FloatingPointError, match=rf"become infinite or NaN in: {NAME}"):  # noqa: PT012
            for _ in range(40):
                fill_grads([param], 0)
                optimizer.step()
                assert bool(param.isfinite().all())
        assert bool(param.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_weights_stay_finite_without_a_check(dtype):
    """What is added is less than half of their last bit."""
    optimizer, param = made("adapm_lean", dtype=dtype, lr=1e-1)
    param.detach().fill_(torch.finfo(dtype).max)
    group = optimizer.param_groups[0]
    arithmetic = block_of(optimizer).layout.dtype
    assert not bounds.Rates.of(group, BlockRates(), weights=dtype, arithmetic=arithmetic, bounded=True).checked
    for _ in range(5):
        param.grad = torch.full_like(param, -1.0)
        optimizer.step()
        assert bool(param.isfinite().all())


def test_an_eps_that_underflows_is_noticed():
    optimizer, param = made("adamw", eps=1e-60)
    param.grad = torch.zeros_like(param)
    with pytest.raises(FloatingPointError, match="become infinite or NaN"):
        optimizer.step()
    assert bool(param.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_weights_that_are_not_finite_at_the_start(value, nonfinite):
    model = tiny_llama()
    optimizer = lm.AdaPMLean(model.named_parameters(), nonfinite=nonfinite)
    model.lm_head.weight.data[3, 2] = value
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [param.detach().clone() for param in model.parameters()]
    fill_grads(list(model.parameters()), 0)
    with pytest.raises(FloatingPointError, match=r"non-finite elements before the first step in: lm_head\.weight\."):
        optimizer.step()
    for param, old in zip(model.parameters(), weights, strict=True):
        assert torch.equal(param.detach().nan_to_num(), old.nan_to_num())
    for index, entry in optimizer.state_dict()["state"].items():
        for key, tensor in entry.items():
            assert_equal(tensor, before[index][key])
    model.lm_head.weight.data[3, 2] = 0.0
    optimizer.step()


# -------------------------------------------------------------------------------------------- gradients that overflow


@pytest.mark.parametrize("recipe", ["adamw", "adapm_lean", "adapm_mini", "adam_snsm", "adagrad_snsm", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
def test_whatever_passes_the_guard_leaves_state_and_weights_finite(recipe, dtype, state_dtype):
    """Gradients a little below the limit, for several steps; the limit is that of the smaller range."""
    optimizer, param = made(recipe, dtype=dtype, state_dtype=state_dtype, betas=None)
    for scale in (1e25, 1e18, 1.8e16):
        param.grad = torch.full_like(param, scale)
        if scale > 1e17 and (dtype != torch.float64 or state_dtype is not None):
            with pytest.raises(FloatingPointError, match=f"non-finite or overflowing elements in: {NAME}"):
                optimizer.step()
            continue
        for _ in range(5):
            optimizer.step()
        for tensor in (param.detach(), *optimizer.state[param].values()):
            assert bool(tensor.isfinite().all())


def test_sums_over_many_elements_stay_in_range():
    """A row of four million elements just below the limit."""
    optimizer, param = made("adafactor", shape=(2, 1 << 22))
    limit = (torch.finfo(torch.float32).max / param.numel()) ** 0.5
    param.grad = torch.full_like(param, limit * 1.01)
    with pytest.raises(FloatingPointError, match="overflowing"):
        optimizer.step()
    param.grad = torch.full_like(param, limit * 0.99)
    optimizer.step()
    for tensor in (param.detach(), *optimizer.state[param].values()):
        assert bool(tensor.isfinite().all())
