"""Subspace-Momentum: momentum inside a low-dimensional subspace, plain SGD outside it."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import gram, leading_triplets, matmul, signed_eigh, store_
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction, Momentum, State
from lightning_memopt.kinds.momentum.projections import (
    HANDOVERS,
    NEED_SHORT_SIDE_WHOLE,
    PROJECTIONS,
    check_gap,
    scratch,
    sides,
)
from lightning_memopt.kinds.momentum.rank import check_rank, resolve_rank
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, interleave, request
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes


@MOMENTA.register("subspace")
@dataclass(frozen=True)
class SubspaceMomentum(Momentum):
    """Momentum in a subspace of the short side (SNSM, arXiv 2411.07120).

    For a tall block, m ≥ n (a wide block is transposed)::

        every `gap` steps:  P ← `projection`(G),  X ← `handover`(X)
        X ← β₁ X + (1−β₁) G P
        U = X Pᵀ / (1−β₁ᵗ) + (G − G P Pᵀ)

    State: ``subspace_p`` ``[..., n, k]`` with orthonormal (or zero) columns, ``subspace_x`` ``[..., m, k]``.

    Attributes:
        rank: k: an integer, or a fraction of the short side (then at least 4).
        gap: Steps between two choices of the subspace.
        stagger: Let blocks take turns, so that all steps take about as long. Otherwise all of them choose at step 1 and
            at every multiple of ``gap``, as in the authors' code.
        projection: ``power`` (warm-started power iteration), ``svd`` (exact), ``random``, ``topk`` (coordinates).
        handover: What happens to the momentum in a new subspace: ``reset``, ``rotate`` or ``keep``.
        bias_correction: Divide the momentum by 1−β₁ᵗ.
        correct_complement: Divide the complement by 1−β₁ᵗ too, as the authors' code does.
    """

    name: ClassVar[str] = "subspace"
    keys: ClassVar[tuple[str, ...]] = ("subspace_p", "subspace_x")
    projection_keys: ClassVar[tuple[str, ...]] = ("subspace_p",)
    batched: ClassVar[bool] = True

    rank: int | float = 1 / 8
    gap: int = 10
    stagger: bool = True
    projection: str = "power"
    handover: str = "reset"
    bias_correction: bool = True
    correct_complement: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        check_gap(self.gap)
        PROJECTIONS.get(self.projection)
        HANDOVERS.get(self.handover)

    def resolve(self, layout: Layout) -> SubspaceMomentum:
        """Replace a fraction by the rank for this block."""
        return replace(self, rank=resolve_rank(self.rank, layout))

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return the basis, and the coordinates of the momentum in it."""
        rank, (long, short) = resolve_rank(self.rank, layout), sides(layout)
        return {"subspace_p": (short, rank), "subspace_x": (long, rank)}

    def needs_whole(self, layout: Layout) -> bool:
        """Return whether the projection compares parts of the short side that different ranks hold."""
        return self.projection in NEED_SHORT_SIDE_WHOLE and layout.divides(sides(layout)[1])

    def scratch(self, layout: Layout, tick: Tick) -> int:
        """Return the bytes that a choice of the subspace needs, in the steps in which it is due."""
        return scratch(self.projection, layout) if self.phase(tick) else 0

    def phase(self, tick: Tick) -> Hashable:
        """Return whether a new subspace is due."""
        return tick.due(self.gap, stagger=self.stagger)

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, Direction]:
        """Refresh the subspace if due, then average in the projected gradient."""
        long, short = sides(layout)
        tall = grad if long == -2 else grad.mT
        basis, momentum = (state[key].to(layout.dtype) for key in self.keys)
        old, due = basis, tick.due(self.gap, stagger=self.stagger)
        if due:
            basis = yield from PROJECTIONS.get(self.projection)(tall, old, layout, long, short, tick)
        (projected,), momentum = yield from interleave(
            request(Sum(matmul(tall, basis), layout, short)),
            HANDOVERS.get(self.handover if due else "keep")(momentum, old, basis, layout, short),
        )
        if due:
            store_(state["subspace_p"], basis, self.rounding(layout, tick, "subspace_p"))
        momentum = momentum.lerp(projected, 1 - beta1)
        store_(state["subspace_x"], momentum, self.rounding(layout, tick, "subspace_x"))
        inside = 1 / (1 - beta1**tick.step) if self.bias_correction else 1.0
        outside = inside if self.correct_complement else 1.0
        left, right = momentum.mul_(inside).sub_(projected, alpha=outside), basis.mT
        return Direction(grad, outside, left, right) if long == -2 else Direction(grad, outside, right.mT, left.mT)

    def factors(self, state: State, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return X and Pᵀ, or P and Xᵀ for a wide block."""
        basis, momentum = (state[key].to(layout.dtype) for key in self.keys)
        return (momentum, basis.mT) if sides(layout)[0] == -2 else (basis, momentum.mT)

    def resized(self, state: State, layout: Layout) -> State:
        """Keep the directions that hold the most momentum, or add zeros. The next subspace replaces the zeros."""
        mine = self.init(layout)
        rank, (basis, momentum) = mine["subspace_p"].shape[-1], (state[key] for key in self.keys)
        if rank < basis.shape[-1]:
            # Keep directions even where they hold no momentum yet, as in the first steps.
            turn = signed_eigh(gram(momentum))[1][..., -rank:].flip(-1)
            basis, momentum = basis.double() @ turn, momentum.double() @ turn
        store_(mine["subspace_p"][..., : basis.shape[-1]], basis)
        store_(mine["subspace_x"][..., : momentum.shape[-1]], momentum)
        return mine

    def from_dense(self, momentum: Tensor, layout: Layout) -> State:
        """Keep the part of the momentum that its leading singular vectors span."""
        state = self.init(layout)
        tall = momentum if sides(layout)[0] == -2 else momentum.mT
        basis = leading_triplets(tall, state["subspace_p"].shape[-1])[2].mT.to(layout.dtype)
        store_(state["subspace_p"], basis)
        store_(state["subspace_x"], tall.to(layout.dtype) @ basis)
        return state

    def infer(self, state: Mapping[str, Tensor], layout: Layout) -> SubspaceMomentum:
        """Infer the rank from the basis."""
        kind = replace(self, rank=max(1, int(state["subspace_p"].shape[-1])))
        return Momentum.infer(kind, state, layout)
