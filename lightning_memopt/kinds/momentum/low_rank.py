"""AdaPM's bias-corrected low-rank momentum."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.linalg import (
    addmm_,
    gram,
    leading_triplets,
    matmul,
    orthonormalize,
    rmatmul,
    row_square_sums,
    store_,
)
from lightning_memopt.kinds.momentum.base import MOMENTA, Direction, Momentum, State
from lightning_memopt.kinds.momentum.rank import check_rank, resolve_rank
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.collectives import Sum, request
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes


@MOMENTA.register("low_rank")
@dataclass(frozen=True)
class LowRankMomentum(Momentum):
    """Momentum stored as Q R. What the factors drop is released at once (AdaPM, arXiv 2510.09103).

    With M = β₁ Q₋R₋ + (1−β₁) G, which is never materialized::

        Q = orth(M R₋ᵀ)            one warm-started block power iteration
        R = Qᵀ M
        U = Q R / (1−β₁ᵗ) + (M − Q R) / (1−β₁)

    In a full average, the dropped part of the gradient would stay for 1/(1−β₁) steps. Adding it once with that weight
    keeps the sum of U over time equal to the sum of G. At full rank U is Adam's momentum.

    State: ``low_rank_q`` ``[..., m, r]`` with orthonormal (or zero) columns, ``low_rank_r`` ``[..., r, n]``.

    Attributes:
        rank: r: an integer, or a fraction of the short side (then at least 4).
    """

    name: ClassVar[str] = "low_rank"
    keys: ClassVar[tuple[str, ...]] = ("low_rank_q", "low_rank_r")
    batched: ClassVar[bool] = True

    rank: int | float = 1 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)

    def resolve(self, layout: Layout) -> LowRankMomentum:
        """Replace a fraction by the rank for this block."""
        return replace(self, rank=resolve_rank(self.rank, layout))

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return both factors."""
        rank = resolve_rank(self.rank, layout)
        return {"low_rank_q": (-2, rank), "low_rank_r": (rank, -1)}

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, Direction]:
        """Take one power iteration on the new momentum: three products with the gradient, 8·m·n·r operations."""
        q_old, r_old = (state[key].to(layout.dtype) for key in self.keys)
        sketch = yield from self._sketch(r_old, layout, tick)
        y, coupling = yield from request(Sum(matmul(grad, sketch.mT), layout, -1), Sum(r_old @ sketch.mT, layout, -1))
        addmm_(y, q_old, coupling, beta=1 - beta1, alpha=beta1)
        (square,) = yield from request(Sum(gram(y), layout, -2))
        q = orthonormalize(y, square)
        projected, overlap = yield from request(Sum(rmatmul(q, grad), layout, -2), Sum(q.mT @ q_old, layout, -2))
        turned = overlap @ r_old
        r = turned.mul(beta1).add_(projected, alpha=1 - beta1)
        # U with M written out, sorted so that the large coefficient β₁ / (1−β₁) meets only what Q lost of Q₋:
        # G + β₁/(1−β₁) (Q₋ − Q QᵀQ₋) R₋ + Q (β₁/(1−β₁ᵗ) QᵀQ₋R₋ − (1 − (1−β₁)/(1−β₁ᵗ)) QᵀG).
        correction = 1 - beta1**tick.step
        left = torch.cat((q_old, q), dim=-1)
        addmm_(left[..., : q.shape[-1]], q, overlap, alpha=-1)
        inside = turned.mul_(beta1 / correction).sub_(projected, alpha=1 - (1 - beta1) / correction)
        right = torch.cat((r_old * (beta1 / (1 - beta1)), inside), dim=-2)
        store_(state["low_rank_q"], q, self.rounding(layout, tick, "low_rank_q"))
        store_(state["low_rank_r"], r, self.rounding(layout, tick, "low_rank_r"))
        return Direction(grad, 1.0, left, right)

    def _sketch(self, r_old: Tensor, layout: Layout, tick: Tick) -> Generator[Any, Any, Tensor]:
        """Return S: the rows of R₋ at unit length, with new random rows in place of zero rows.

        M Sᵀ spans the same space as M R₋ᵀ, but its columns scale with the singular values instead of their squares.
        So tiny and huge gradients stay in the range of float32.
        """
        (squares,) = yield from request(Sum(row_square_sums(r_old, torch.float64), layout, -1))
        norms = squares.sqrt().to(r_old.dtype)
        alive = norms > 0
        if r_old.device.type == "cpu" and bool(alive.all()):  # on other devices, the host would wait for the answer
            return r_old / norms
        draw = Noise.like(layout, (r_old.shape[-2], -1), tick).normal(r_old.shape, r_old.device)
        return torch.where(alive, r_old / torch.where(alive, norms, 1.0), draw.to(r_old.dtype))

    def factors(self, state: State, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return Q and R."""
        return state["low_rank_q"].to(layout.dtype), state["low_rank_r"].to(layout.dtype)

    def resized(self, state: State, layout: Layout) -> State:
        """Truncate the singular value decomposition of Q R, or add zeros, which the next iteration replaces."""
        mine = self.init(layout)
        rank, (q, r) = mine["low_rank_q"].shape[-1], (state[key] for key in self.keys)
        if rank < q.shape[-1]:
            # If Q was stored in bfloat16, its columns are orthonormal to three digits only.
            q, triangle = torch.linalg.qr(q.double())
            u, s, vt = leading_triplets(triangle @ r.double(), rank)
            q, r = q @ u, s.unsqueeze(-1) * vt
        store_(mine["low_rank_q"][..., : q.shape[-1]], q)
        store_(mine["low_rank_r"][..., : r.shape[-2], :], r)
        return mine

    def from_dense(self, momentum: Tensor, layout: Layout) -> State:
        """Keep the best rank-r approximation: the leading singular triplets, zeros where the rank falls short."""
        state = self.init(layout)
        u, s, vt = leading_triplets(momentum, state["low_rank_q"].shape[-1])
        store_(state["low_rank_q"], u.to(layout.dtype))
        store_(state["low_rank_r"], (s.unsqueeze(-1) * vt).to(layout.dtype))
        return state

    def infer(self, state: Mapping[str, Tensor], layout: Layout) -> LowRankMomentum:
        """Infer the rank from the factors."""
        kind = replace(self, rank=max(1, int(state["low_rank_q"].shape[-1])))
        return Momentum.infer(kind, state, layout)
