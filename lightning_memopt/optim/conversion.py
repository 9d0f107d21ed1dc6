"""Conversion of a block's state to other kinds or ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_memopt.kinds.base import Kind, State
from lightning_memopt.kinds.batch import Scratch, chunks
from lightning_memopt.kinds.momentum import Direction, Momentum
from lightning_memopt.kinds.second_moment import Denominator
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.block import Block
from lightning_memopt.sharding.collectives import finished
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.tensors import fill_, full_tensor

Loss = Callable[[State, State], None]


def converted(
    old: Block,
    new: Block,
    state: Mapping[str, Tensor],
    *,
    keep: bool = False,
    on_loss: Loss | None = None,
    group: Mapping[str, Any] | None = None,
    betas: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Tensor]:
    """Return state for ``new`` that continues from the state of ``old``. Needs memory for one block's dense state.

    Every rank gathers a sharded block and keeps its part of the result.

    Args:
        old: The block that the state belongs to.
        new: The same block with another recipe or placement.
        state: The state; keys have the block's prefix.
        keep: Whether the result may share unchanged tensors with ``state`` instead of copying them.
        on_loss: Called with the whole momentum state before and after, if the rank becomes smaller.
        group: Hyperparameters. If given, bound momentum that the steps of the new block will not bound.
        betas: Of the averages in ``state``, for momentum that has to start from both of them.
    """
    require_squares(old, new)
    result: dict[str, Tensor] = {}
    for before, after in zip(old.kinds, new.kinds, strict=True):
        source = {key: state[old.prefix + key] for key in before.keys}
        stays = after.keeps_state_of(before, new.layout)
        if not stays:
            whole = {key: full_tensor(value) for key, value in source.items()}
            if new.recipe.momentum.averages_squares and isinstance(after, Momentum):
                source = _started(old, new, whole, state, betas)
            else:
                source = _carried(before, after, whole, old.layout.whole(), new.layout.whole())
            if on_loss is not None and _rank(after, source, new.layout) < _rank(before, whole, old.layout):
                on_loss(whole, source)
            unbounded = not (new.recipe.bounded or new.recipe.second_moment.of_direction)
            if group is not None and isinstance(after, Momentum) and not before.elementwise and unbounded:
                source = _limited(old, after, source, new.layout.whole(), state, group)
        if not (stays and keep and old.work.gathered == new.work.gathered):
            target = after.init(new.work)
            for key, value in source.items():
                fill_(target[key], value)
            source = target
        result.update({new.prefix + key: value for key, value in source.items()})
    return result


def _carried(before: Kind, after: Kind, state: State, old: Layout, new: Layout) -> State:
    """Return the whole state of ``after`` that continues from the whole state of ``before``."""
    if not state or not after.keys or old.empty:  # no dense form needed: nothing exists, or nothing is kept
        return after.init(new)
    if isinstance(after, Momentum) and type(before) is type(after):
        resized = after.resized(state, new)
        if resized is not None:
            return resized
    return after.from_dense(before.to_dense(state, old), new)


def require_squares(old: Block, new: Block) -> None:
    """Check that a momentum that averages squares has a second moment to start from, if it does not stay as it is.

    Starting from zero in the middle of a run, it would make the next updates several times too large.

    Raises:
        ValueError: If it has none.
    """
    after = new.recipe.momentum
    if not after.averages_squares or after.keeps_state_of(old.recipe.momentum, new.layout):
        return
    if not old.recipe.second_moment.restorable:
        raise ValueError(
            f"The block {old.name!r} has no second moment that the momentum {after.name!r} could start from; create a "
            "new optimizer instead."
        )


def _started(old: Block, new: Block, momentum: State, state: Mapping[str, Tensor], betas: tuple[float, float]) -> State:
    """Return the whole state of a momentum that averages squares, which starts from both averages of the old block."""
    before, second_moment = old.kinds
    layout, after = old.layout.whole(), new.layout.whole()
    if old.layout.empty:
        return new.recipe.momentum.init(after)
    square = {key: full_tensor(state[old.prefix + key]) for key in second_moment.keys}
    steps = int(state["step"])
    return new.recipe.momentum.from_moments(
        before.to_dense(momentum, layout),
        second_moment.to_dense(square, layout),
        after,
        Tick(steps + 1, new.key, new.index),
        (weight_of(betas[0], max(1, steps)), weight_of(betas[1], max(1, steps))),
    )


def weight_of(beta: float, steps: float) -> float:
    """Return the weight of all gradients in an average of this many. With a β of 1, they are added up."""
    return steps if beta == 1 else 1 - beta**steps


def _limited(
    old: Block, kind: Momentum, source: State, layout: Layout, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> State:
    """Return whole momentum that moves no weight by more than ``max_update`` in one step.

    An average of an element's own gradients needs no bound, but factors mix elements. Momentum that is small enough
    stays so: it decays faster than the root of the second moment. Without an average of squares, nothing bounds it.
    """
    second_moment = old.recipe.second_moment
    if not source or group["max_update"] is None or not second_moment.normalizes or second_moment.of_direction:
        return source
    denominator = denominator_of(old, state, group)
    value = kind.to_dense(source, layout)
    bound = group["max_update"] * (1 - group["betas"][0] ** max(1, int(state["step"].item())))
    scratch = Scratch(value, layout.dtype)
    for index in chunks(value):
        limit = denominator.at(index, scratch, value.shape[-1])
        assert limit is not None
        value[index] = value[index].clamp(-bound * limit, bound * limit)
    return kind.from_dense(value, layout)


def denominator_of(old: Block, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Denominator:
    """Return the denominator of the last step for the whole block.

    A norm of the direction is not kept: the momentum's takes its place.
    """
    kind, (beta1, beta2) = old.recipe.second_moment, group["betas"]
    if kind.of_direction:
        layout, momentum = old.layout.whole(), old.recipe.momentum
        average = momentum.to_dense({key: full_tensor(state[old.prefix + key]) for key in momentum.keys}, layout)
        scale = 1 / (1 - beta1 ** max(1, int(state["step"].item())))
        return finished(kind.of(Direction(average, scale), layout, eps=group["eps"]))
    tick = Tick(int(state["step"].item()), old.key, old.index)
    square = {key: full_tensor(state[old.prefix + key]) for key in kind.keys}
    return kind.denominator(square, old.layout.whole(), beta2=beta2, eps=group["eps"], tick=tick)


def _rank(kind: Kind, state: State, layout: Layout) -> int:
    """Return the largest rank that a whole momentum state can hold; 0 for other kinds.

    Comparing sizes would not work: in a square block, factors of half the rank have as many numbers as dense momentum.
    """
    if not isinstance(kind, Momentum):
        return 0
    factors = kind.factors(state, layout.whole()) if state else None
    if factors is not None:
        return min(factors[0].shape[-1], layout.short_side)
    return layout.short_side if state else 0
