"""Every kind against its float64 reference, and the identities that the formulas promise."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import MOMENTA, DenseMomentum, LowRankMomentum, SubspaceMomentum
from lightning_memopt.kinds.momentum.projections import HANDOVERS, PROJECTIONS
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS, BlockwiseSecondMoment, SubsetNormSecondMoment
from tests._compare import assert_equal, assert_same_projector, relative_error
from tests.kinds.contract.against_reference import SEQUENCES, errors, gradients, reference_of
from tests.kinds.contract.cases import (
    BETAS,
    FEW_SHAPES,
    all_momenta,
    all_second_moments,
    changes_a_switch,
    gradient,
    is_basic,
    label,
    layout_of,
    shapes_for,
    tick_at,
)
from tests.kinds.contract.running import cloned, step, steps

pytestmark = pytest.mark.slow

KINDS = all_momenta() + all_second_moments()

# Of the result's norm; measured worst: low_rank 3e-6, subspace 2e-6, all others 3e-7. No bound
# for every input: on random gradients without a common part the basis of a low rank follows noise, and the float64
# reference itself, given gradients that differ by 6e-8, drifts apart by up to 7e-6 in 30 steps (8 x 8, rank 4: float32
# was off by 4e-5 in one of twenty sequences).
FP32 = 1e-5
FP64 = 1e-11
# Muon's iteration multiplies what float32 leaves in directions where a gradient has nothing by up to 3.4445⁵ = 484.
AMPLIFIED = 5 * FP32


def test_every_kind_has_a_reference():
    for registry in (MOMENTA, SECOND_MOMENTS):
        for name in registry.names():
            assert reference_of(registry.get(name)(), layout_of((8, 6)))


def test_a_kind_without_a_reference_fails():
    class Newcomer(DenseMomentum):
        name = "newcomer"

    with pytest.raises(
        AssertionError, match=r"'newcomer' has no float64 reference; write one in tests/kinds/reference/"
    ):
        errors(Newcomer(), gradients("random", (4, 3)), layout_of((4, 3)))


CASES = [(kind, name) for kind in KINDS for name in (SEQUENCES if is_basic(kind) else ("drifting", "rank 2"))]


@pytest.mark.parametrize(("kind", "sequence"), CASES, ids=label)
def test_float32_equals_the_reference(kind, sequence):
    few = FEW_SHAPES if kind.needs_matrix else [*FEW_SHAPES, (9,)]
    for shape in shapes_for(kind) if sequence == "drifting" else few:
        if shape in ((), (1,)):
            continue  # a single number may pass through zero: there is no norm to compare with
        found, _ = errors(kind, gradients(sequence, shape), layout_of(shape), index=2)
        # A row's product with a single random vector may be near 0.
        cancels = kind.name == "apollo" and kind.rank == 1
        bound = AMPLIFIED if cancels or (kind.name == "orthogonal" and sequence == "rank 2") else FP32
        assert max(found) <= bound, f"shape {shape}, step {found.index(max(found)) + 1}: {max(found):.1e}"


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_float64_equals_the_reference(kind):
    for shape in ((3, 20, 12),):
        grads = [grad.double() for grad in gradients("drifting", shape)]
        found, _ = errors(kind, grads, layout_of(shape, torch.float64))
        assert max(found) <= FP64, f"shape {shape}: {max(found):.1e}"


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_bfloat16_state_stays_near_the_reference(kind):
    """2⁻⁸ of relative error in what is stored; a low rank has coefficients of 1/(1−β₁) on it.

    Fira divides by the norm of R, which at rank 1 is a single number and may be almost 0.
    """
    bound = 0.1 if getattr(kind, "averages_squares", False) else 0.05
    for shape in ((3, 20, 12),):
        found, _ = errors(kind, gradients("drifting", shape), layout_of(shape, state_dtype=torch.bfloat16))
        assert max(found) <= bound, f"shape {shape}: {max(found):.1e}"


@pytest.mark.parametrize("kind", all_second_moments(), ids=label)
def test_second_moment_adds_up_with_beta2_of_one(kind):
    for shape in ((12, 20), (2, 20, 12)):
        found, _ = errors(kind, gradients("random", shape), layout_of(shape), beta2=1.0)
        assert max(found) <= FP32


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "kind", [kind for kind in all_momenta() if is_basic(kind) or changes_a_switch(kind)], ids=label
)
def test_momentum_with_other_decays(kind, beta1):
    """At β₁ = 0.99 the low rank's two coefficients are 99 and −99: ten times the rounding of β₁ = 0.9.

    APOLLO divides by the norm of a sketch, which at rank 1 is a single number and may be almost 0.
    """
    found, _ = errors(kind, gradients("random", (20, 12)), layout_of((20, 12)), beta1=beta1)
    assert max(found) <= FP32 * (10 if beta1 == 0.99 or kind.averages_squares else 1)


@pytest.mark.parametrize(
    ("projection", "handover", "bias_correction", "correct_complement"),
    list(product(PROJECTIONS.names(), HANDOVERS.names(), (True, False), (True, False))),
)
def test_subspace_with_all_options_together(projection, handover, bias_correction, correct_complement):
    kind = SubspaceMomentum(
        rank=3,
        gap=4,
        projection=projection,
        handover=handover,
        bias_correction=bias_correction,
        correct_complement=correct_complement,
    )
    for shape, index in (((12, 20), 0), ((2, 9, 7), 3)):
        found, _ = errors(kind, gradients("drifting", shape), layout_of(shape), index=index)
        assert max(found) <= FP32


@pytest.mark.parametrize(
    ("stagger", "index", "shift"), [*((True, index, index) for index in range(4)), (False, 0, 0), (False, 3, 0)]
)
def test_subspace_refreshes_are_staggered_unless_told_otherwise(stagger, index, shift):
    kind = SubspaceMomentum(rank=2, gap=4, stagger=stagger, projection="random")
    layout = layout_of((6, 5))
    state, refreshed = kind.init(layout), []
    for number in range(1, 14):
        before = state["subspace_p"].clone()
        step(kind, gradient((6, 5), number), state, layout, tick_at(number, index=index))
        if not torch.equal(before, state["subspace_p"]):
            refreshed.append(number)
    assert refreshed == [1, *(number for number in range(2, 14) if (number + shift) % 4 == 0)]


def test_subspace_survives_ill_conditioned_gradients():
    """A first power iteration from random columns sees the square of the spread of the singular values."""
    u, v = (torch.linalg.qr(gradient((size, 6), 1, torch.float64)).Q for size in (40, 30))
    spread = 10.0 ** -torch.arange(6, dtype=torch.float64)
    grad = ((u * spread) @ v.T).float()
    kind, layout = SubspaceMomentum(rank=4), layout_of((40, 30))
    state = kind.init(layout)
    step(kind, grad, state, layout, tick_at(1))
    assert_orthonormal(state["subspace_p"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("subset_size", [1, 4, 7, 20, 21])
def test_subset_norm_with_a_ragged_last_run(subset_size, reduction):
    kind = SubsetNormSecondMoment(subset_size=subset_size, reduction=reduction)
    for shape in ((12, 20), (20, 12), (3, 5, 20)):
        for beta2 in (0.99, 1.0):
            found, _ = errors(kind, gradients("random", shape), layout_of(shape), beta2=beta2)
            assert max(found) <= FP32


@pytest.mark.parametrize("head_dim", [None, 4])
@pytest.mark.parametrize("output_dim", [-2, -1])
def test_blockwise_per_head_or_output(output_dim, head_dim):
    for shape in ((12, 20), (20, 12), (2, 8, 8)):
        layout = layout_of(shape, output_dim=output_dim)
        found, state = errors(BlockwiseSecondMoment(outputs_per_number=head_dim), gradients("random", shape), layout)
        assert max(found) <= FP32
        by_layout = layout_of(shape, output_dim=output_dim, head_dim=head_dim)
        other = BlockwiseSecondMoment().init(by_layout)
        steps(BlockwiseSecondMoment(), gradients("random", shape), other, by_layout)
        assert_equal(other, state)


def test_blockwise_refuses_heads_that_do_not_divide():
    with pytest.raises(
        ValueError, match=r"`outputs_per_number` 8 does not divide the outputs of a block of shape \(12, 20\)"
    ):
        BlockwiseSecondMoment(outputs_per_number=8).init(layout_of((12, 20)))


# --- what the formulas promise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 8), (3, 6, 9)])
def test_low_rank_at_full_rank_is_adams_momentum(shape):
    layout = layout_of(shape)
    full, dense = LowRankMomentum(rank=layout.short_side), DenseMomentum()
    full_state, dense_state = full.init(layout), dense.init(layout)
    for number, grad in enumerate(gradients("random", shape), start=1):
        actual = step(full, grad, full_state, layout, tick_at(number))
        assert relative_error(actual, step(dense, grad, dense_state, layout, tick_at(number))) <= 3e-6


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 8), (3, 6, 9)])
def test_low_rank_at_full_rank_is_adams_momentum_in_float64(shape):
    layout = layout_of(shape, torch.float64)
    full, dense = LowRankMomentum(rank=layout.short_side), DenseMomentum()
    full_state, dense_state = full.init(layout), dense.init(layout)
    for number, grad in enumerate(gradients("random", shape), start=1):
        actual = step(full, grad.double(), full_state, layout, tick_at(number))
        assert relative_error(actual, step(dense, grad.double(), dense_state, layout, tick_at(number))) <= 1e-9


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(12, 20), (24, 16)])
def test_low_rank_owes_only_what_its_factors_hold(shape, rank):
    """Without the bias correction, ΣU = ΣG − β₁/(1−β₁) · QR at any time: nothing else is ever lost."""
    given, received, kept = sums_over_time(shape, rank, steps_with_gradient=60, steps_without=0)
    assert relative_error(received + BETAS[0] / (1 - BETAS[0]) * kept, given) <= 1e-6


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_low_rank_loses_no_gradient_over_time(rank):
    """After 150 random and 50 zero gradients ΣU = ΣG, up to 9 · 0.9⁵⁰ of what the factors held when those began.

    What the bias correction gives on top in the first steps is left out.
    """
    given, received, _ = sums_over_time((64, 48), rank, steps_with_gradient=150, steps_without=50)
    assert relative_error(received, given) <= 5e-4


def sums_over_time(shape, rank, *, steps_with_gradient, steps_without):
    kind, layout = LowRankMomentum(rank=rank), layout_of(shape)
    state, beta1 = kind.init(layout), BETAS[0]
    given, received = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for number in range(1, steps_with_gradient + steps_without + 1):
        grad = gradient(shape, number) if number <= steps_with_gradient else torch.zeros(shape)
        direction = step(kind, grad, state, layout, tick_at(number)).double()
        kept = kind.to_dense(state, layout).double()
        received += direction - kept * (1 / (1 - beta1**number) - 1)
        given += grad
    return given, received, kept


@pytest.mark.parametrize("sequence", ["random", "drifting", "huge", "tiny"])
def test_low_rank_basis_stays_orthonormal(sequence):
    kind, layout = LowRankMomentum(rank=6), layout_of((40, 24))
    state = kind.init(layout)
    for number in range(1, 301):
        grad = gradients(sequence, (40, 24))[number % 20] if number <= 20 else gradient((40, 24), number)
        step(kind, grad, state, layout, tick_at(number))
        if number % 10 == 0:
            assert_orthonormal(state["low_rank_q"])


@pytest.mark.parametrize("projection", PROJECTIONS.names())
def test_subspace_basis_is_orthonormal(projection):
    kind, layout = SubspaceMomentum(rank=5, gap=3, projection=projection), layout_of((3, 14, 30))
    state = kind.init(layout)
    for number in range(1, 31):
        step(kind, gradient((3, 14, 30), number), state, layout, tick_at(number))
        assert_orthonormal(state["subspace_p"])


@pytest.mark.parametrize(("projection", "iterations"), [("svd", 1), ("power", 60)])
def test_subspace_finds_the_leading_singular_vectors(projection, iterations):
    grad = gradient((20, 12), 7)
    kind, layout = SubspaceMomentum(rank=3, gap=1, projection=projection), layout_of((20, 12))
    state = kind.init(layout)
    steps(kind, [grad] * iterations, state, layout)
    assert_same_projector(state["subspace_p"], torch.linalg.svd(grad.double()).Vh[:3].T)


def test_low_rank_recovers_after_its_basis_died():
    """Rank-one gradients leave dead columns; gradients of full rank must fill all of them again."""
    kind, layout = LowRankMomentum(rank=3), layout_of((10, 8))
    state = kind.init(layout)
    ones = torch.ones(10, 8)
    steps(kind, [ones] * 3, state, layout)
    assert int((state["low_rank_q"].norm(dim=0) > 0.5).sum()) == 1
    steps(kind, [gradient((10, 8), i) for i in range(3)], state, layout, first=4)
    assert_orthonormal(state["low_rank_q"])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_follows_gradients_whose_space_changes(shape, rank):
    """Gradients of rank two, in another space at every step."""
    grads = [
        (gradient((shape[0], 2), i, torch.float64) @ gradient((2, shape[1]), 500 + i, torch.float64)).float()
        for i in range(30)
    ]
    found, _ = errors(LowRankMomentum(rank=rank), grads, layout_of(shape))
    assert max(found) <= FP32


# --- stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.keys and kind.restorable and is_basic(kind)], ids=label
)
def test_rounding_of_the_state_is_unbiased(kind: Kind):
    """Over many seeds, the mean of the stored statistic is the one that was to be stored."""
    shape, seeds = (12, 16), 128
    start_layout, layout = layout_of(shape), layout_of(shape, state_dtype=torch.bfloat16)
    start = kind.init(start_layout)
    steps(kind, gradients("drifting", shape)[:5], start, start_layout)
    start = {key: value.bfloat16() for key, value in start.items()}
    exact = {key: value.float() for key, value in start.items()}
    grad, number, index = gradients("drifting", shape)[5], 6, 1  # (6 + 1) % 3: no refresh, so no draw
    step(kind, grad, exact, start_layout, tick_at(number, index=index))
    expected = kind.to_dense(exact, start_layout).double()
    mean, single = torch.zeros_like(expected), 0.0
    for seed in range(seeds):
        state = cloned(start)
        step(kind, grad, state, layout, tick_at(number, name=f"block {seed}", index=index))
        stored = kind.to_dense(state, layout).double()
        mean += stored / seeds
        single += relative_error(stored, expected) / seeds
    assert 1e-4 < single < 2e-2, "bfloat16 rounds to 2⁻⁸"
    assert relative_error(mean, expected) < single / 6


@pytest.mark.parametrize("kind", [kind for kind in all_second_moments() if kind.keys and is_basic(kind)], ids=label)
def test_bfloat16_second_moment_does_not_stall(kind):
    """Rounding to nearest would stop V ← 0.999 V + 0.001 at a quarter, where the increments get lost."""
    layout = layout_of((8, 12), state_dtype=torch.bfloat16)
    state = kind.init(layout)
    signs = torch.where(gradient((8, 12), 1) > 0, 1.0, -1.0)
    for number in range(1, 601):
        step(kind, signs, state, layout, tick_at(number), beta2=0.999)
    expected = 1 - 0.999**600
    assert abs(float(kind.to_dense(state, layout).mean()) - expected) < 0.1


def assert_orthonormal(basis: torch.Tensor) -> None:
    square = basis.double().mT @ basis.double()
    error = float((square - torch.eye(square.shape[-1], dtype=torch.float64)).abs().max())
    assert error <= 1e-6, f"QᵀQ is off by {error:.1e}"
