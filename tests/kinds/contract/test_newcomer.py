"""A new kind is covered at once: registered in a test, it meets every check, and the checks catch what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_memopt.kinds.linalg import store_
from lightning_memopt.kinds.momentum import MOMENTA, Direction, Momentum
from lightning_memopt.kinds.momentum.dense import DenseMomentum
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.state import allocate
from tests.kinds.contract.cases import all_momenta, label, layout_of, shapes_for, variants
from tests.kinds.contract.checks import CHECKS, check_registry


@dataclass(frozen=True)
class RowMomentum(Momentum):
    """Momentum of the mean of every row, the plain gradient otherwise."""

    name = "toy_rows"
    keys = ("toy_rows_mean",)

    nesterov: bool = False

    def sizes(self, layout):
        return {"toy_rows_mean": (-2, 1)}

    def update(self, grad, state, layout, *, beta1, tick):
        (total,) = yield from request(Sum(grad.to(layout.dtype).sum(-1, keepdim=True), layout, -1))
        mean = total / layout.matrix[-1]
        average = state["toy_rows_mean"].to(layout.dtype).lerp(mean, 1 - beta1)
        store_(state["toy_rows_mean"], average, self.rounding(layout, tick, "toy_rows_mean"))
        ahead = average.lerp(mean, 1 - beta1) if self.nesterov else average
        return Direction(grad, 1.0, ahead - mean, mean.new_ones(*layout.local[:-2], 1, layout.local[-1]))

    def to_dense(self, state, layout):
        return state["toy_rows_mean"].to(layout.dtype).expand(layout.local).contiguous()

    def from_dense(self, momentum, layout):
        state = self.init(layout)
        store_(state["toy_rows_mean"], momentum.mean(-1, keepdim=True))
        return state


@pytest.fixture
def newcomer(monkeypatch):
    monkeypatch.setattr(MOMENTA, "_entries", dict(MOMENTA._entries))
    return MOMENTA.register("toy_rows")(RowMomentum)


def test_a_registered_kind_is_among_the_cases(newcomer):
    mine = [kind for kind in all_momenta() if isinstance(kind, RowMomentum)]
    assert mine == variants(RowMomentum) == [RowMomentum(), RowMomentum(nesterov=True)]
    check_registry(MOMENTA, {})


@pytest.mark.parametrize("check", CHECKS, ids=label)
def test_a_new_kind_meets_the_contract(newcomer, check):
    for kind in variants(newcomer):
        for shape in shapes_for(kind):
            check(kind, shape)


class ChangesTheGradient(DenseMomentum):
    def update(self, grad, state, layout, **now):
        grad.mul_(0.5)
        return (yield from super().update(grad, state, layout, **now))


class ReplacesItsState(DenseMomentum):
    def update(self, grad, state, layout, **now):
        state["exp_avg"] = state["exp_avg"].clone()
        return (yield from super().update(grad, state, layout, **now))


class KeepsMoreThanItSays(DenseMomentum):
    def init(self, layout):
        return {"exp_avg": torch.zeros((3, *layout.shape), dtype=layout.state_dtype, device=layout.device)[1]}


class CallsAMomentumSquares(DenseMomentum):
    squares = ("exp_avg",)


class KeepsAnExtraKey(DenseMomentum):
    def init(self, layout):
        return {**super().init(layout), "extra": allocate(layout, (1, 1))}


class DrawsFromTheGlobalGenerator(DenseMomentum):
    def update(self, grad, state, layout, **now):
        return (yield from super().update(grad + 0.01 * torch.randn_like(grad), state, layout, **now))


class CountsForItself(DenseMomentum):
    count = [0]

    def update(self, grad, state, layout, **now):
        self.count[0] += 1
        return (yield from super().update(grad * self.count[0], state, layout, **now))


class DividesByTheNorm(DenseMomentum):
    def update(self, grad, state, layout, **now):
        return (yield from super().update(grad / grad.norm(), state, layout, **now))


class HoldsAFullTensorWhileItWaits(RowMomentum):
    def update(self, grad, state, layout, **now):
        square = grad.square()
        direction = yield from super().update(grad, state, layout, **now)
        assert square is not None
        return direction


class ForgetsItsHistory(DenseMomentum):
    def to_dense(self, state, layout):
        return super().to_dense(state, layout) * 0.5


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (ChangesTheGradient, "gradient_is_not_modified"),
        (ReplacesItsState, "update_writes_in_place"),
        (KeepsMoreThanItSays, "state_is_exactly_what_it_declares"),
        (KeepsMoreThanItSays, "meta_state_equals_real_state"),
        (CallsAMomentumSquares, "squares_are_never_negative"),
        (KeepsAnExtraKey, "state_is_exactly_what_it_declares"),
        (DrawsFromTheGlobalGenerator, "deterministic"),
        (CountsForItself, "resumable"),
        (DividesByTheNorm, "finite"),
        (DividesByTheNorm, "scales_with_the_gradient"),
        (HoldsAFullTensorWhileItWaits, "nothing_full_size_waits"),
        (ForgetsItsHistory, "dense_round_trip"),
    ],
    ids=label,
)
def test_the_checks_catch(broken, check):
    (function,) = (entry for entry in CHECKS if entry.__name__ == f"check_{check}")
    for shape in ((20, 12), (3, 12, 20)):
        with pytest.raises(AssertionError):
            function(broken(), shape)


def test_a_kind_without_a_dense_form_says_what_it_lacks():
    kind = WithoutDense()
    layout = layout_of((4, 6))
    with pytest.raises(NotImplementedError, match="The momentum kind 'toy_rows' defines neither factors nor to_dense"):
        kind.to_dense(kind.init(layout), layout)


@dataclass(frozen=True)
class WithoutDense(RowMomentum):
    to_dense = Momentum.to_dense
