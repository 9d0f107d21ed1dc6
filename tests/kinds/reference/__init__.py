"""Naive float64 versions of every kind, written from the formulas: one process, one matrix, M and V written out.

A kind without an entry here fails ``tests/kinds/test_reference.py``. A momentum reference has
``update(grad, *, beta1, step, due, draw, like)`` → U (with ``beta2`` and ``eps`` if the kind averages squares), a
second-moment reference ``update(grad, *, beta2, eps, step)`` → D, or U / D if that is a norm of the direction; both for
one ``[m, n]`` matrix. :class:`Stack` makes a stack of matrices out of it.

Attributes of the call:
    due: Whether a refresh falls on this step.
    draw: Random numbers of a shape; those of the library's ``Noise``, since they are part of no formula. ``shared``
        ones last until the next refresh and are the same for all matrices of a stack.
    like: The library's state of this matrix, for the one thing that no formula fixes: signs and order of a basis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.noise import Noise
from tests.kinds.reference import inner_adam, momentum, normalizing, second_moment, subspace

MOMENTA: dict[str, Callable[..., Any]] = {
    "none": momentum.NoMomentum,
    "dense": momentum.DenseMomentum,
    "low_rank": momentum.LowRankMomentum,
    "subspace": subspace.SubspaceMomentum,
    "galore": inner_adam.GaLoreMomentum,
    "fira": inner_adam.FiraMomentum,
    "apollo": inner_adam.ApolloMomentum,
}

SECOND_MOMENTS: dict[str, Callable[..., Any]] = {
    "none": second_moment.NoSecondMoment,
    "dense": second_moment.DenseSecondMoment,
    "blockwise": second_moment.BlockwiseSecondMoment,
    "subset_norm": second_moment.SubsetNormSecondMoment,
    "factored": second_moment.FactoredSecondMoment,
    "normalized": normalizing.NormalizedSecondMoment,
    "orthogonal": normalizing.OrthogonalSecondMoment,
}


class Stack:
    """A reference for ``[..., m, n]``: a loop over matrices, each with a state of its own."""

    def __init__(self, make: Callable[..., Any], matrix: tuple[int, ...], **options: Any) -> None:
        *stack, m, n = matrix
        self.matrix = matrix
        self.count = stack[0] if stack else 1
        self.references = [make((m, n), **options) for _ in range(self.count)]

    def momentum(self, grad: Tensor, *, tick: Any, gap: int, like: dict[str, Tensor], **betas: float) -> Tensor:
        """Return the directions of one step, ``[..., m, n]`` in float64."""
        results = []
        for position, (reference, part) in enumerate(zip(self.references, self._matrices(grad), strict=True)):

            def draw(*shape: int, shared: bool = False, position: int = position) -> Tensor:
                if shared:
                    seed = tick.of_period(gap).salted()
                    return Noise.of(seed, shape, (0,) * len(shape)).normal(shape, torch.device("cpu"))
                sizes = (*self.matrix[:-2], *shape)
                whole = Noise.of(tick.salted(), sizes, (0,) * len(sizes)).normal(sizes, torch.device("cpu"))
                return whole.reshape(self.count, *shape)[position]

            mine = {
                key: value.double().reshape(self.count, -1, value.shape[-1])[position]
                for key, value in like.items()
                if value.ndim >= 2
            }
            now = {"step": tick.step, "due": tick.due(gap), "draw": draw, "like": mine}
            results.append(reference.update(part, **betas, **now))
        return torch.stack(results).reshape(self.matrix)

    def second_moment(self, grad: Tensor, *, beta2: float, eps: float, tick: Any) -> Tensor:
        """Return the denominators of one step, ``[..., m, n]`` in float64."""
        results = [
            reference.update(part, beta2=beta2, eps=eps, step=tick.step).expand(part.shape)
            for reference, part in zip(self.references, self._matrices(grad), strict=True)
        ]
        return torch.stack(results).reshape(self.matrix)

    def _matrices(self, grad: Tensor) -> list[Tensor]:
        return list(grad.double().reshape(self.count, *self.matrix[-2:]))
