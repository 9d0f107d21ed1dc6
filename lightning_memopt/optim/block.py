"""One block of a parameter: its recipe, its state, and the update of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.base import State
from lightning_memopt.kinds.linalg import chunks
from lightning_memopt.kinds.momentum import MOMENTA, Direction, Momentum
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS, Denominator, SecondMoment
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.bounds import Rates, Watch, limited
from lightning_memopt.plans.plan import Plan, Recipe, check_change
from lightning_memopt.sharding.collectives import Gather, Task, interleave
from lightning_memopt.sharding.layout import Cut, Layout
from lightning_memopt.sharding.state import cut_of
from lightning_memopt.sharding.tensors import local_tensor


@dataclass(frozen=True)
class Block:
    """A parameter, or a part of one, with its recipe.

    Attributes:
        name: The parameter's canonical name, followed by ``:role`` if the parameter holds several blocks.
        role: Its role.
        recipe: Its kinds, with ranks as numbers.
        layout: Its shapes and placement, as in the parameter.
        prefix: Prefix of its state keys: empty, or the role and a dot in a fused parameter.
        key: Its :func:`~lightning_memopt.kinds.tick.block_key`.
        index: Its position in the optimizer.
        itemsize: Bytes per element of the parameter.
        plan: The plan of its first recipe. Kinds that it switches to get the plan's options.
    """

    name: str
    role: str
    recipe: Recipe
    layout: Layout
    prefix: str
    key: int
    index: int
    itemsize: int
    plan: Plan

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if self.layout.vector and kind.needs_matrix:
                raise ValueError(
                    f"{kind.name!r} needs a matrix, but {self.name!r} has shape {self.layout.shape}; "
                    "choose 'dense' or 'none' for it."
                )

    def check(self) -> None:
        """Raise if a kind does not fit the block's shape or its sharding."""
        for kind in self.kinds:
            kind.shapes(self.work)

    @property
    def kinds(self) -> tuple[Momentum, SecondMoment]:
        """Both kinds of the recipe."""
        return self.recipe.momentum, self.recipe.second_moment

    @property
    def squares(self) -> set[str]:
        """The state keys, without the prefix, whose elements are never negative."""
        return {key for kind in self.kinds for key in kind.squares}

    @cached_property
    def work(self) -> Layout:
        """The layout that the kinds work with: the parameter's, or that of the whole block if ranks gather it."""
        if self.layout.sharded and (
            self.layout.straddles_shards or any(kind.needs_whole(self.layout) for kind in self.kinds)
        ):
            return self.layout.gather()
        return self.layout

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """How the state tensors that ranks gather for a step are cut, by key without the prefix."""
        if not self.layout.sharded:
            return {}
        cuts = {key: cut_of(self.work, sizes) for kind in self.kinds for key, sizes in kind.sizes(self.work).items()}
        return {key: cut for key, cut in cuts.items() if cut is not None}

    def changed(self, change: Recipe | Mapping[str, Any]) -> Block:
        """Return the block with a whole new recipe, or with other kinds and options by name.

        Raises:
            TypeError: If ``change`` is neither.
            ValueError: If a kind or option is unknown, or does not fit the block.
        """
        if not isinstance(change, Recipe):
            check_change(change)
            change = {
                key: self.plan.kind(key, value, self.name, self.role)
                if key in ("momentum", "second_moment")
                and isinstance(value, str)
                and value != getattr(self.recipe, key).name
                else value
                for key, value in change.items()
            }
        return replace(self, recipe=self.recipe.changed(change).resolve(self.layout))

    def moved(self, param: Tensor) -> Block:
        """Return the same block of another parameter that holds the same weights."""
        old = self.layout
        layout = Layout.of(
            param,
            slot=old.slot,
            state_dtype=old.state_dtype,
            output_dim=old.output_dim,
            head_dim=old.head_dim,
            flatten=len(old.shape) == 3 and len(old.matrix) == 2,
        )
        return replace(self, layout=layout, itemsize=param.element_size())

    def init(self) -> State:
        """Allocate the state of both kinds. Keys have the block's prefix."""
        return {self.prefix + key: value for kind in self.kinds for key, value in kind.init(self.work).items()}

    def part(self, state: Mapping[str, Tensor], keys: tuple[str, ...]) -> State:
        """Return the local parts of the state tensors ``keys``."""
        return {key: local_tensor(state[self.prefix + key]) for key in keys}

    def keys(self, state: Mapping[str, Any]) -> set[str]:
        """Return the keys in ``state`` that belong to this block, without the prefix."""
        if self.prefix:
            return {key.removeprefix(self.prefix) for key in state if key.startswith(self.prefix)}
        return {key for key in state if "." not in key and key != "step"}

    def infer(self, state: Mapping[str, Tensor]) -> Recipe:
        """Return the recipe that the keys and shapes of saved state imply.

        Raises:
            ValueError: If they imply no recipe, or one that does not fit the block.
        """
        keys = self.keys(state)
        found: dict[str, Any] = {}
        for axis, table in (("momentum", MOMENTA), ("second_moment", SECOND_MOMENTS)):
            mine = getattr(self.recipe, axis)
            names = [name for name in table.names() if table.get(name).keys and keys.issuperset(table.get(name).keys)]
            name = names[0] if names else "none"
            kind = mine if mine.name == name else self.plan.kind(axis, name, self.name, self.role)
            found[axis] = kind.infer({key: state[self.prefix + key] for key in kind.keys}, self.layout)
            keys -= set(kind.keys)
        if keys:
            raise ValueError(f"the state has unknown keys {sorted(keys)}")
        return Recipe(**found)

    def requests_for(self, state: State, keys: tuple[str, ...]) -> list[Gather]:
        """Return the gathers for those of the state tensors ``keys`` that :attr:`cuts` names."""
        wanted = []
        for key in keys:
            if key in self.cuts:
                tensor = state[self.prefix + key]
                wanted.append(Gather(local_tensor(tensor), self.cuts[key], tensor.numel() * tensor.element_size()))
        return wanted

    def with_gathered(self, state: State, keys: tuple[str, ...], gathered: Sequence[Tensor]) -> State:
        """Return state tensors as the kinds see them, given the results of :meth:`requests_for`."""
        found = dict(zip((key for key in keys if key in self.cuts), gathered, strict=True))
        return {**self.part(state, keys), **found}

    def gather_requests(self, grad: Tensor, state: State) -> list[Gather]:
        """Return the gathers that :meth:`update` needs. They are the same on all ranks."""
        wanted = self.requests_for(state, tuple(self.cuts))
        if self.work.gathered:
            size = torch.Size(self.layout.matrix).numel() * grad.element_size()
            wanted.append(Gather(self.layout.take(grad), self.layout.cut_of_block(), size))
        return wanted

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        group: Mapping[str, Any],
        step: int,
        gathered: Sequence[Tensor],
        watch: Watch,
    ) -> Task:
        """Add a gradient to the state and update the weights. The result is a task for ``run_tasks``.

        Args:
            param: The parameter.
            grad: Its gradient.
            state: Its state.
            group: Its parameter group.
            step: The current step, counted from 1.
            gathered: The results of :meth:`gather_requests`.
            watch: Records what happens to the weights.
        """
        beta1, beta2 = group["betas"]
        momentum, second_moment = self.kinds
        tick = Tick(step, self.key, self.index)
        gradient = gathered[-1] if self.work.gathered else self.layout.take(grad)
        if group["maximize"]:
            gradient = gradient.neg()
        whole = dict(zip(self.cuts, gathered, strict=False))
        seen = {**self.part(state, (*momentum.keys, *second_moment.keys)), **whole}
        now: dict[str, Any] = {"layout": self.work, "tick": tick}
        direction, denominator = yield from interleave(
            momentum.update(gradient, {key: seen[key] for key in momentum.keys}, beta1=beta1, **now),
            second_moment.update(
                gradient, {key: seen[key] for key in second_moment.keys}, beta2=beta2, eps=group["eps"], **now
            ),
        )
        for key, tensor in whole.items():
            local_tensor(state[self.prefix + key]).copy_(self.cuts[key].mine(tensor))
        self.apply(param, direction, denominator, group, bounded=self.recipe.bounded, watch=watch)

    def apply(
        self,
        param: Tensor,
        direction: Direction,
        denominator: Denominator,
        group: Mapping[str, Any],
        *,
        bounded: bool,
        watch: Watch,
    ) -> None:
        """Update the local weights.

        Args:
            param: The parameter.
            direction: U.
            denominator: D.
            group: Its parameter group.
            bounded: Whether ``max_update`` bounds |U / D|.
            watch: Records what happens to the weights.
        """
        mine = self.layout.take(param)
        dtype = self.layout.dtype
        rates = Rates.of(group, weights=param.dtype, arithmetic=dtype, bounded=bounded)
        if self.work.gathered:  # U and D cover the whole block: update a copy, of which only the local part matters
            whole = mine.new_zeros(self.work.local)
            part = self.layout.cut_of_block().mine(whole).copy_(mine)
            lost = apply_(whole, direction, denominator, rates, dtype=dtype, watch=watch)
            mine.copy_(part)
        else:
            lost = apply_(mine, direction, denominator, rates, dtype=dtype, watch=watch)
        if lost is not None:
            watch.lost[self.name] = (self.layout, lost)
        target = local_tensor(param)
        if mine.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
            # No view of the weights is a matrix (channels-last convolutions), so a copy was updated.
            target.copy_(mine.view(target.shape))


def apply_(
    weights: Tensor, direction: Direction, denominator: Denominator, rates: Rates, *, dtype: torch.dtype, watch: Watch
) -> Tensor | None:
    """W ← (1 − ηλ) W − η · U / D, in ``dtype``, one chunk at a time. All shapes broadcast to ``[..., m, n]``.

    The rates decide whether |U / D| is bounded, and whether to check weights. A checked weight that would become
    non-finite keeps its value. Returns the number of these weights, or None if no weights were checked.
    """
    lost = torch.zeros((), device=weights.device) if rates.checked else None
    for index in chunks(weights):
        part = weights[index].to(dtype, copy=rates.checked)
        if rates.weight_decay:
            part.mul_(1 - rates.lr * rates.weight_decay)
        update, scale = direction.at(index, dtype)
        divisor = denominator.at(index, dtype, weights.shape[-1])
        if divisor is not None and rates.max_update is not None:
            update, divisor = limited(update, scale, divisor, rates.max_update, watch), None
        if divisor is None:
            part.add_(update, alpha=-rates.lr * scale)
        else:
            part.addcdiv_(update, divisor, value=-rates.lr * scale)
        if lost is not None:
            fits = part.abs() <= torch.finfo(weights.dtype).max
            lost += fits.logical_not().sum()
            part = part.where(fits, weights[index].to(dtype))
        if part.dtype != weights.dtype or rates.checked:
            weights[index] = part
    return lost


def initial_state(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step."""
    state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
    for block in blocks:
        state.update(block.init())
    return state
