"""Release of momentum that a smaller state cannot hold: it moves the weights at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.base import State
from lightning_memopt.kinds.batch import Scratch, chunks
from lightning_memopt.kinds.momentum import Direction
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounds import Rates, Watch
from lightning_memopt.optim.conversion import Loss, denominator_of
from lightning_memopt.optim.guards import exact_arithmetic
from lightning_memopt.optim.update import Target, apply
from lightning_memopt.sharding.layout import Layout

# What happens to momentum that a smaller state cannot hold.
DROPPED = ("release", "discard")


def release(
    old: Block, new: Block, param: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], watch: Watch
) -> Loss:
    """Return a function that moves the weights by the lost momentum, as the coming steps would have.

    The part ΔM that no state keeps would have entered the next updates with weights β₁, β₁², ...::

        W ← W − lr · β₁ / (1 − β₁) · ΔM / D

    with the block's learning rate and the denominator of the last step. Low-rank momentum (AdaPM, arXiv 2510.09103)
    releases what its factors drop by the same rule.
    """

    def on_loss(before: State, after: State) -> None:
        beta1, denominator = group["betas"][0], denominator_of(old, state, group)
        by_norm = old.recipe.second_moment.of_direction  # which needs the whole direction
        lost = _difference(old, new, before, after, beta1 / (1 - beta1), old.layout.whole() if by_norm else old.work)
        if by_norm:
            lost = Direction(old.work.part(_written(denominator.turned(lost), old.layout.dtype)))
        denominator = denominator.part(old.work)
        # Where the gradient was always 0, the factors still hold noise, which eps would amplify.
        known = tuple(square.where(square > 0, torch.inf) for square in denominator.squares)  # type: ignore[union-attr,operator,arg-type]
        denominator = replace(denominator, squares=known)  # type: ignore[arg-type]
        with exact_arithmetic({param.device.type}):
            # Bounded like an update: the lost momentum mixes elements, whatever its kind.
            bounded = old.recipe.second_moment.normalizes
            own = replace(old.rates, weight_decay=0.0)
            rates = Rates.of(group, own, weights=old.kept_dtype, arithmetic=old.layout.dtype, bounded=bounded)
            tick = Tick(int(state["step"].item()), old.key, old.index)
            noise = old.weight_noise(old.work, tick, "released")
            apply([Target(old, param, state)], lost, denominator, rates, watch, noise=noise)

    return on_loss


def _written(direction: Direction, dtype: torch.dtype) -> Tensor:
    """Return the direction as one tensor."""
    out = direction.base.new_empty(direction.base.shape, dtype=dtype)
    scratch = Scratch(out, dtype)
    for index in chunks(out):
        part, scale = direction.at(index, scratch)
        torch.mul(part, scale, out=out[index])
    return out


def _difference(old: Block, new: Block, before: State, after: State, weight: float, work: Layout) -> Direction:
    """Return ``weight`` times the momentum that ``before`` holds and ``after`` does not, for the part of ``work``."""
    layout = old.layout.whole()
    base = torch.zeros((), dtype=layout.dtype, device=layout.device).expand(work.local)
    lefts, rights = [], []
    for block, state, sign in ((old, before, weight), (new, after, -weight)):
        momentum = block.recipe.momentum
        factors = momentum.factors(state, layout)
        if factors is not None:
            lefts.append(work.part_of(factors[0], at=-2, dim=-2) * sign)
            rights.append(work.part_of(factors[1], at=-1, dim=-1))
        elif state:
            base = base + work.part(momentum.to_dense(state, layout)) * sign
    if not lefts:
        return Direction(base)
    return Direction(base, 1.0, torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2))
