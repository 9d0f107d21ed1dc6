"""What momentum kinds and second-moment kinds have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_memopt.layout import Layout
from lightning_memopt.tick import Tick

State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Pure math on one block. A subclass is a frozen dataclass whose fields are its options; it holds no tensor.

    Attributes:
        name: The name it is registered under.
        keys: The names of its state tensors. No two kinds share one, so that a checkpoint's keys tell the kind.
        needs_matrix: Whether it is undefined on vectors.
        restorable: Whether another kind can go on from its state.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    needs_matrix: ClassVar[bool] = True
    restorable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options that are true or false; a kind with others checks those after calling this.

        Raises:
            TypeError: If one is neither: a word like "no" would count as true.
        """
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(entry.default, bool) and not isinstance(value, bool):
                raise TypeError(f"`{entry.name}` must be True or False, got {value!r}.")

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the kind's options."""
        return [entry.name for entry in fields(cls)]

    def resolve(self, layout: Layout) -> Self:
        """Return the kind with every option that depends on the block's shape replaced by a number."""
        return self

    def init(self, layout: Layout) -> State:
        """Allocate the state of one block, all zeros, on the layout's device."""
        return {}

    def keeps_state_of(self, other: Kind, layout: Layout) -> bool:
        """Return whether the state of ``other`` is one of this kind, tensor for tensor.

        No option changes what a state of given shapes means; options only change what is done with it.
        """
        return type(self) is type(other) and self.shapes(layout) == other.shapes(layout)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return the full statistic that the state stands for, ``[..., m, n]``, without bias correction."""
        raise NotImplementedError

    def from_dense(self, value: Tensor, layout: Layout) -> State:
        """Return the state that stands for a full statistic as closely as this kind can."""
        raise NotImplementedError

    def infer(self, state: Mapping[str, Tensor], layout: Layout) -> Self:
        """Return the kind with the options that the shapes of saved state show.

        Raises:
            ValueError: If the shapes cannot belong to this block; names the key and both shapes.
        """
        for key, expected in self.shapes(layout).items():
            found = tuple(state[key].shape)
            if found != expected:
                raise ValueError(f"{key!r} has shape {found}, expected {expected} for a block of shape {layout.shape}")
        return self

    def shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Return the global shapes of the state tensors; allocates nothing."""
        state = self.init(replace(layout, device=torch.device("meta")))
        return {key: tuple(value.shape) for key, value in state.items()}

    def nbytes(self, layout: Layout) -> int:
        """Return the bytes of the block's state, over all ranks."""
        size = layout.state_dtype.itemsize
        return sum(torch.Size(shape).numel() * size for shape in self.shapes(layout).values())


def rounding(layout: Layout, tick: Tick, key: str) -> torch.Generator | None:
    """Return the randomness for stochastic rounding where state is stored in less than it is computed in.

    Every state tensor, named by ``key``, has its own: one that all ranks hold must be rounded alike on all of them,
    although they round parts of different sizes of one that is sharded.
    """
    return tick.generator(layout.device, f"rounding {key}") if layout.state_dtype != layout.dtype else None
