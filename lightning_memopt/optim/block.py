"""One block of a parameter: its recipe, and its state."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_memopt.kinds.base import Kind, State
from lightning_memopt.kinds.batch import SMALL
from lightning_memopt.kinds.momentum import MOMENTA, DenseMomentum, Momentum
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS, DenseSecondMoment, SecondMoment
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.weights import LOW_BITS, WeightBits, zero_bits
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.rates import BlockRates
from lightning_memopt.plans.recipe import Recipe, check_change
from lightning_memopt.sharding.collectives import Gather
from lightning_memopt.sharding.layout import Cut, Layout
from lightning_memopt.sharding.state import ELEMENTWISE, cut_of, shape_of
from lightning_memopt.sharding.tensors import local_tensor

# State keys of a whole parameter, which may hold several blocks.
OF_PARAMETERS = frozenset(("step", LOW_BITS))


class Family:
    """All blocks with the same layout and recipe."""


_FAMILIES: WeakValueDictionary[tuple[Layout, Recipe], Family] = WeakValueDictionary()


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
        dtype: Dtype of the parameter.
        plan: The plan of its first recipe. Kinds that it switches to get the plan's options.
        why: What decided its role, in a few words.
        rates: How its rates differ from those of its parameter group.
        weights: How its weights are kept if they are bfloat16.
        clip_update: Bound on the root mean square of its update U / D; None for no bound.
    """

    name: str
    role: str
    recipe: Recipe
    layout: Layout
    prefix: str
    key: int
    index: int
    dtype: torch.dtype
    plan: Plan
    why: str = field(default="", compare=False)
    rates: BlockRates = BlockRates()
    weights: WeightBits = WeightBits()
    clip_update: float | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if self.layout.vector and kind.needs_matrix:
                raise ValueError(
                    f"{kind.name!r} needs a matrix, but {self.name!r} has shape {self.layout.shape}; "
                    "choose 'dense' or 'none' for it."
                )
        momentum, second_moment = self.kinds
        if momentum.averages_squares and second_moment.name != "none":
            raise ValueError(
                f"The momentum {momentum.name!r} divides by a second moment of its own, but {self.name!r} has "
                f"{second_moment.name!r} as well: choose 'none' for its second moment."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from the fields: a copy of the family would be another one."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

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
    def batched(self) -> bool:
        """Whether the block may be updated together with others."""
        return all(kind.batched for kind in self.kinds)

    @property
    def bits(self) -> WeightBits | None:
        """How its weights are kept, or None if they are not bfloat16."""
        return self.weights if self.dtype == torch.bfloat16 else None

    @property
    def kept_dtype(self) -> torch.dtype:
        """The dtype that holds a weight with its extra bits."""
        return self.dtype if self.bits is None or self.bits.extra is None else torch.float32

    def weight_noise(self, layout: Layout, tick: Tick, purpose: str = "weights") -> Noise | None:
        """Return the random numbers that round its weights, or those of its batch; None to round to nearest."""
        if self.bits is None or not self.bits.rounds_by_noise:
            return None
        return Noise.like(layout, ELEMENTWISE, tick, purpose)

    @cached_property
    def recurring(self) -> tuple[Kind, ...]:
        """The kinds with work that is not due in every step."""
        return tuple(kind for kind in self.kinds if type(kind).phase is not Kind.phase)

    @cached_property
    def is_adam(self) -> bool:
        """Whether the kinds are those of AdamW."""
        return self.kinds == (DenseMomentum(), DenseSecondMoment())

    @cached_property
    def work(self) -> Layout:
        """The layout that the kinds work with: the parameter's, or that of the whole block if ranks gather it."""
        if self.layout.sharded and (
            self.layout.straddles_shards or any(kind.needs_whole(self.layout) for kind in self.kinds)
        ):
            return self.layout.gather()
        return self.layout

    @cached_property
    def family(self) -> Family:
        """What this block shares with all others of its layout and recipe."""
        return _FAMILIES.setdefault((self.layout, self.recipe), Family())

    @cached_property
    def small(self) -> bool:
        """Whether a batch stacks all tensors of such blocks. All ranks agree, even if their shares differ."""
        return self.share <= SMALL

    @cached_property
    def share(self) -> int:
        """Number of the block's elements that a rank works on, if all ranks have equally many."""
        divided = [] if self.work.gathered else self.layout.shards()
        return -(-math.prod(self.layout.matrix) // math.prod(self.layout.mesh.size(each) for each in divided))

    @cached_property
    def stacked_bytes(self) -> int:
        """Bytes that a batch stacks for this block: state as large as over all ranks, and small gradients."""
        shapes = [
            shape_of(self.layout, sizes)
            for kind in self.kinds
            for sizes in kind.sizes(self.layout).values()
            if sizes != ELEMENTWISE
        ]
        elements = sum(math.prod(shape) for shape in shapes) + (self.share if self.small else 0)
        return elements * self.layout.dtype.itemsize

    def scratch(self, step: int) -> int:
        """Return the bytes that its kinds hold while ranks add up sums, beyond what is as large as state."""
        tick = Tick(step, self.key, self.index)
        return sum(kind.scratch(self.layout, tick) for kind in self.kinds)

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
        return replace(self, layout=layout, dtype=param.dtype)

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
        return {key for key in state if "." not in key and key not in OF_PARAMETERS}

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
            # A kind without state leaves no trace, so it may be any of these: take the plan's.
            same = mine.name == name or not (names or mine.keys)
            kind = mine if same else self.plan.kind(axis, name, self.name, self.role)
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


def all_layers(name: str) -> str:
    """Return the pattern that matches a name in every layer."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def numel(block: Block) -> int:
    """Return the number of elements of a block, over all ranks."""
    return math.prod(block.layout.shape)


def initial_state(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step."""
    state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
    for block in blocks:
        state.update(block.init())
    return {**state, **zero_bits(blocks[0].layout, blocks[0].bits)}
