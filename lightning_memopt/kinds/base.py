"""What momentum kinds and second-moment kinds have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from lightning_memopt.kinds.linalg import Noise
from lightning_memopt.kinds.ranges import check_option
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes, allocate, origin, shape_of

State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Pure math on one block. A subclass is a frozen dataclass whose fields are its options; it holds no tensor.

    Attributes:
        name: The name it is registered under.
        keys: The names of its state tensors. No two kinds share one, so that a checkpoint's keys tell the kind.
        squares: Those of its ``keys`` whose elements are never negative, such as averages of squares.
        needs_matrix: Whether it is undefined on vectors.
        restorable: Whether another kind can go on from its state.
        elementwise: Whether what it says of an element follows from that element's gradients alone, averaged. The
            quotient of two such kinds is bounded by their decays (RMSProp, Adam); no other is.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    squares: ClassVar[tuple[str, ...]] = ()
    needs_matrix: ClassVar[bool] = True
    restorable: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check what holds for options of any kind; a kind checks the rest after calling this.

        Raises:
            TypeError: If one that is true or false is neither: a word like "no" would count as true.
            ValueError: If a number is not finite, or larger than anything it could count.
        """
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(entry.default, bool) and not isinstance(value, bool):
                raise TypeError(f"`{entry.name}` must be True or False, got {value!r}.")
            check_option(entry.name, value)

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the kind's options."""
        return [entry.name for entry in fields(cls)]

    def resolve(self, layout: Layout) -> Self:
        """Return the kind with every option that depends on the block's shape replaced by a number."""
        return self

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return the sizes of every state tensor, as :func:`allocate` takes them.

        A dimension given as ``-2`` or ``-1`` is sharded as the block's is, and :meth:`update` sees this rank's part of
        it. Every other dimension it sees as a whole, wherever the tensor is stored.
        """
        return {}

    def needs_whole(self, layout: Layout) -> bool:
        """Return whether the update can do nothing with a part of the block, as it is sharded.

        Every rank then gathers the gradient and works on all of it.
        """
        return False

    def init(self, layout: Layout) -> State:
        """Allocate the state of one block, all zeros, on the layout's device."""
        return {key: allocate(layout, sizes) for key, sizes in self.sizes(layout).items()}

    def keeps_state_of(self, other: Kind, layout: Layout) -> bool:
        """Return whether the state of ``other`` is one of this kind, tensor for tensor.

        No option changes what a state of given shapes means; options only change what is done with it.
        """
        return type(self) is type(other) and self.shapes(layout) == other.shapes(layout)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return the full statistic that the state stands for, ``[..., m, n]``, without bias correction.

        State and layout are those of a whole block on one process, here and in :meth:`from_dense`.
        """
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
        return {key: shape_of(layout, sizes) for key, sizes in self.sizes(layout).items()}

    def nbytes(self, layout: Layout) -> int:
        """Return the bytes of the block's state, over all ranks."""
        size = layout.state_dtype.itemsize
        return sum(torch.Size(shape).numel() * size for shape in self.shapes(layout).values())

    def rounding(self, layout: Layout, tick: Tick, key: str) -> Noise | None:
        """Return the noise with which a state tensor is rounded, where it is stored in less than it is computed in.

        It is a function of the position in the whole tensor: every sharding rounds alike.
        """
        if layout.state_dtype == layout.dtype:
            return None
        sizes = self.sizes(layout)[key]
        shape = shape_of(layout, sizes) if sizes else layout.matrix
        return Noise(tick.salted(f"rounding {key}"), shape, origin(layout, sizes))
