"""Kinds that average squares inside of a projection, in an optimizer: where they start, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.callbacks.allocation import adaptable
from lightning_memopt.kinds.batch import Batch
from lightning_memopt.kinds.momentum import ApolloMomentum, FiraMomentum, GaLoreMomentum
from lightning_memopt.kinds.momentum.apollo import projection
from lightning_memopt.kinds.second_moment import Denominator
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.bounds import Rates
from lightning_memopt.optim.fused import for_kernel
from lightning_memopt.optim.weights import Weights
from tests._compare import assert_equal, relative_error
from tests._models import tiny_llama
from tests.kinds.contract.cases import gradient, layout_of, tick_at
from tests.kinds.contract.running import step

NAME, SHAPE = "mlp.up_proj.weight", (20, 12)
RECIPES = ("galore", "fira", "apollo", "apollo_mini")
KINDS = (GaLoreMomentum(rank=2, gap=3), FiraMomentum(rank=2, gap=3), ApolloMomentum(rank=2, gap=3))


def trained(recipe, steps=10, **options):
    """Return an optimizer of one matrix of zeros after some steps, and the matrix."""
    param = nn.Parameter(torch.zeros(SHAPE))
    optimizer = lm.MemOpt([(NAME, param)], recipe, lr=1.0, **options)
    for number in range(1, steps + 1):
        param.grad = gradient(SHAPE, number)
        optimizer.step()
    return optimizer, param


def moved(optimizer, param, number):
    """Return the root mean square of the next update."""
    before = param.detach().clone()
    param.grad = gradient(SHAPE, number)
    optimizer.step()
    return float((param.detach() - before).square().mean().sqrt())


# --- where they start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_go_on_from_adamw_in_steps_of_their_usual_size(recipe):
    """Started from zero squares late in a run, the first steps would be 3 to 7 times as large."""
    fresh, param = trained(recipe, 40)
    usual = moved(fresh, param, 41)
    model = nn.Parameter(torch.zeros(SHAPE))
    adamw = torch.optim.AdamW([model], lr=1.0, betas=(0.9, 0.95))
    for number in range(1, 61):
        model.grad = gradient(SHAPE, number)
        adamw.step()
    adamw.state[model]["step"].fill_(2000)
    optimizer, param = trained(recipe, 0)
    optimizer.load_state_dict(adamw.state_dict())
    found = [moved(optimizer, param, number) for number in range(8)]
    assert max(found) <= 2 * usual
    assert min(found) > 0


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (3, 12, 20)])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_squares_of_a_subspace_come_from_those_of_the_elements(kind, shape):
    """Independent elements of variance σ² have R of variance Σ σ² P²."""
    layout = layout_of(shape)
    variance = gradient(shape, 1).square()
    state = kind.from_moments(
        gradient(shape, 2), gradient(shape, 2).square() + variance, layout, tick_at(5), (1.0, 1.0)
    )
    tall = shape[-2] >= shape[-1]
    basis, found = state[kind.keys[0]], state[kind.averages[1]]
    draws = torch.randn((4000, *shape), generator=torch.Generator().manual_seed(0)) * variance.sqrt() + gradient(
        shape, 2
    )
    expected = ((draws if tall else draws.mT) @ basis).square().mean(0)
    assert relative_error(found, expected) < 0.05
    factors = kind.factors(state, layout)
    u, s, vt = torch.linalg.svd(gradient(shape, 2))
    assert relative_error(factors[0] @ factors[1], u[..., :2] * s[..., None, :2] @ vt[..., :2, :]) < 1e-5


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_a_sketch_starts_from_the_next_projection_of_both_averages(shape):
    kind, layout, tick = ApolloMomentum(rank=3, gap=5), layout_of(shape), tick_at(10)
    mean, variance = gradient(shape, 2), gradient(shape, 1).square()
    state = kind.from_moments(0.5 * mean, 0.25 * (mean.square() + variance), layout, tick, (0.5, 0.25))
    basis = projection(layout, -1 if shape[0] > shape[1] else -2, 3, tick.of_period(5))
    draws = torch.randn((4000, *shape), generator=torch.Generator().manual_seed(0)) * variance.sqrt() + mean
    sketches = (draws if shape[0] > shape[1] else draws.mT) @ basis
    assert relative_error(state["apollo_v"], 0.25 * sketches.square().mean(0)) < 0.05
    assert relative_error(state["apollo_m"], 0.5 * (mean if shape[0] > shape[1] else mean.mT) @ basis) < 1e-5


@pytest.mark.parametrize("steps", [20, 100, 300])
@pytest.mark.parametrize("recipe", RECIPES)
def test_they_take_steps_of_their_usual_size_after_adamw_where_gradients_agree(recipe, steps):
    """The limiter lets norms grow by 1% per step, so a first update that is too small would last."""
    fresh, param = trained(recipe, 0)
    model = nn.Parameter(torch.zeros(SHAPE))
    adamw = torch.optim.AdamW([model], lr=1.0)
    for number in range(steps):
        for each in (param, model):
            each.grad = gradient(SHAPE, number) + 2 * gradient(SHAPE, 1000)
        fresh.step()
        adamw.step()
    optimizer, other = trained(recipe, 0)
    optimizer.load_state_dict(adamw.state_dict())
    for number in range(5):
        sizes = []
        for one, weight in ((optimizer, other), (fresh, param)):
            before = weight.detach().clone()
            weight.grad = gradient(SHAPE, steps + number) + 2 * gradient(SHAPE, 1000)
            one.step()
            sizes.append(float((weight.detach() - before).norm()))
        assert 0.6 < sizes[0] / sizes[1] < 1.6


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_low_rank_with_factored_squares_can_become_one(recipe):
    optimizer, param = trained("adapm_lean")
    optimizer.reformat({NAME: lm.load_plan(recipe).roles["mlp"]})
    assert moved(optimizer, param, 11) > 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_else_goes_on_from_them(recipe):
    optimizer, param = trained(recipe, 2)
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    name = "apollo" if recipe == "apollo_mini" else recipe
    for change in ({"momentum": "dense", "second_moment": "dense"}, {"momentum": "low_rank"}, {"rank": 7}):
        with pytest.raises(
            ValueError, match=f"'{name}', which keeps no state that .* could continue from; create a new"
        ):
            optimizer.reformat({NAME: change})
    assert_equal(optimizer.state[param], before)


def test_squares_to_start_from_are_required():
    optimizer, _ = trained("adamw", 2, overrides={"*": {"second_moment": "none"}})
    with pytest.raises(ValueError, match=f"{NAME!r} has no second moment that the momentum 'galore' could start from"):
        optimizer.reformat({NAME: {"momentum": "galore"}})


def test_a_second_moment_beside_them_is_refused():
    match = f"The momentum 'fira' divides by a second moment of its own, but '{NAME}' has 'factored' as well: choose 'n"
    with pytest.raises(ValueError, match=match):
        trained("adapm_lean", 0, overrides={"mlp": {"momentum": "fira"}})
    with pytest.raises(ValueError, match="divides by a second moment of its own"):
        trained("adapm_lean", 1)[0].reformat({NAME: {"momentum": "galore"}})
    lm.Fira(tiny_llama().named_parameters(), overrides={"embedding": {"second_moment": "factored"}})  # not beside it


@pytest.mark.parametrize("recipe", RECIPES)
def test_their_rank_is_not_adapted(recipe):
    optimizer = lm.MemOpt(tiny_llama().named_parameters(), recipe)
    with pytest.raises(
        ValueError, match=r"nothing to adapt \(optimizer 0: the momentum '.*' of '.*q_proj.weight' holds a"
    ):
        adaptable([optimizer], None)


# --- gradients that are hard on ratios -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_almost_vanishes_after_large_ones(kind):
    """‖N‖ / ‖R‖ exceeds float32 there, and would be NaN where it meets a 0."""
    layout = layout_of((6, 5))
    state = kind.init(layout)
    for number in range(1, 5):
        step(kind, gradient((6, 5), number), state, layout, tick_at(number))
    for scale in (1e-30, 1e-42, 0.0, 1e12):
        grad = gradient((6, 5), 9) * scale
        grad[:, 0] = 0
        assert step(kind, grad, state, layout, tick_at(5)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_step_without_a_gradient_leaves_the_limiter_as_it_is(kind):
    layout = layout_of(SHAPE)
    state = kind.init(layout)
    assert limited(kind, state, layout, 0.0) == (1, 0)
    assert limited(kind, state, layout, 5.0) == (1, 5)  # nothing to compare with
    assert limited(kind, state, layout, 0.0) == (1, 5)
    assert limited(kind, state, layout, 50.0) == pytest.approx((0.101, 5.05))
    assert limited(kind, state, layout, 5.0) == (1, 5)


def limited(kind, state, layout, norm):
    """Return the factor on an update of this norm, and the norm that is remembered."""
    square = torch.full((1, 1), norm**2, dtype=torch.float64)
    factor = kind.limited_(state, square, layout, growth=kind.growth, tick=tick_at(4))
    return float(factor), float(state[kind.norm_key])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_block_without_a_first_gradient_does_not_wait_for_its_next_subspace(kind):
    """As for an expert that no token reaches in the first step."""
    layout = layout_of(SHAPE)
    state = kind.init(layout)
    for number, grad in enumerate((torch.zeros(SHAPE), gradient(SHAPE, 1)), start=1):
        direction = step(kind, grad, state, layout, tick_at(number, index=0))
    assert direction.any()
    step(kind, gradient(SHAPE, 2), state, layout, tick_at(3))  # a new subspace
    before = state[kind.keys[0]].clone()
    step(kind, torch.zeros(SHAPE), state, layout, tick_at(6))  # another is due
    assert_equal(state[kind.keys[0]], before)


# --- random projections ----------------------------------------------------------------------------------------------


def test_a_projection_lasts_until_the_next_is_due():
    layout = layout_of(SHAPE)
    for index in (0, 1, 5, 6, 7):
        before, changed = None, []
        for number in range(1, 20):
            tick = Tick(number, 3, index)
            drawn = projection(layout, -1, 2, tick.of_period(7))
            if before is None or not torch.equal(before, drawn):
                changed.append(number)
            assert (changed[-1] == number) == tick.due(7)
            before = drawn


def test_projections_of_successive_periods_are_independent():
    """Two subspaces of k in n dimensions share k/n of their directions on average."""
    layout, shares = layout_of((400, 64)), []
    for number in range(12):
        one, other = (projection(layout, -1, 16, Tick(each, 5, 0)).double() for each in (number, number + 1))
        shares.append(float((torch.linalg.qr(one)[0].mT @ torch.linalg.qr(other)[0]).square().sum()) / 16)
    assert max(shares) < 0.35
    assert sum(shares) / len(shares) == pytest.approx(1 / 4, abs=0.03)


def test_blocks_of_a_batch_have_projections_of_their_own_and_stacks_share_one():
    layout = layout_of((2, *SHAPE))
    single = projection(layout, -1, 4, Tick(1, 5, 0))
    assert_equal(single[0], single[1])
    both = projection(layout.batched(2), -1, 4, Tick(1, (5, 6), 0))
    assert_equal(both[0], single)
    assert relative_error(both[1], single) > 1
    large = projection(layout_of((400, 4000)), -2, 3, Tick(1, 5, 0))
    assert float(large.square().mean()) == pytest.approx(1 / 3, rel=0.3)


def test_blocks_with_different_positions_are_updated_together():
    """The steps at which a projection was drawn differ, its number hardly does."""
    kind = ApolloMomentum(gap=200)
    assert {kind.phase(Tick(1100, 0, index)) for index in range(400)} == {5, 6}


# --- the update of weights -------------------------------------------------------------------------------------------


def test_they_are_bounded():
    for recipe in RECIPES:
        optimizer, param = trained(recipe, 3, max_update=0.01)
        assert optimizer.snapshot().blocks[0].max_update == 0.01
        before = param.detach().clone()
        param.grad = gradient(SHAPE, 4)
        optimizer.step()
        assert float((param.detach() - before).abs().max()) <= 0.01 * (1 + 1e-4)


def test_kernels_leave_gains_and_bounds_without_a_denominator_alone():
    batch = Batch([torch.zeros(4, 4)] * 2, fused=True)
    rates = Rates(0.1, max_update=1.0)
    kind, layout = KINDS[1], layout_of((4, 4)).batched(2)
    state = {key: torch.zeros(2, *value.shape) for key, value in kind.init(layout_of((4, 4))).items()}
    task = kind.update(torch.ones(2, 4, 4), state, layout, beta1=0.9, beta2=0.99, eps=1e-8, tick=Tick(1, (1, 2), 0))
    with pytest.raises(StopIteration) as stop:
        next(task)
    direction = stop.value.value
    assert for_kernel(Weights(batch), direction, Denominator(), Rates(0.1), torch.float32) is None
    plain = type(direction)(batch)
    assert for_kernel(Weights(batch), plain, Denominator(), rates, torch.float32) is None


def test_apollo_mini_is_the_papers():
    kind = lm.load_plan("apollo_mini").roles["mlp"].momentum
    assert (kind.rank, kind.scaling, kind.scale) == (1, "tensor", math.sqrt(128))
    assert lm.load_plan("apollo_mini").roles["head"] == lm.load_plan("adamw").roles["head"]
