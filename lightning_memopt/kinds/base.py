"""The base class of momentum kinds and second-moment kinds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.ranges import check_option
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import Sizes, allocate, shape_of

State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Pure math on one block. A subclass is a frozen dataclass: its fields are its options, and it holds no tensors.

    Attributes:
        name: The name under which the kind is registered.
        keys: The names of its state tensors. No two kinds share a name, so the keys of a checkpoint identify the kind.
        squares: The ``keys`` whose elements are never negative, such as averages of squares.
        needs_matrix: Whether the kind is undefined on vectors.
        restorable: Whether another kind can continue from its state.
        elementwise: Whether the result for an element depends only on the averaged gradients of that element. The
            quotient of two such kinds is bounded by their decay rates (RMSProp, Adam); no other quotient is.
        batched: Whether ``update`` accepts a :class:`~lightning_memopt.kinds.batch.Batch` of blocks. A class with its
            own ``update`` must say so itself; otherwise it gets one block at a time.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    squares: ClassVar[tuple[str, ...]] = ()
    needs_matrix: ClassVar[bool] = True
    restorable: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "update" in cls.__dict__ and "batched" not in cls.__dict__:
            cls.batched = False

    def __post_init__(self) -> None:
        """Check what every option must satisfy. Subclasses call this first, then check the rest.

        Raises:
            TypeError: If a boolean option is not a boolean: a word like "no" would count as true.
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
        """Return the kind with a number for every option that depends on the shape of the block."""
        return self

    def sizes(self, layout: Layout) -> dict[str, Sizes]:
        """Return the sizes of every state tensor, in the form that ``allocate`` takes.

        A dimension given as ``-2`` or ``-1`` is sharded like that dimension of the block: ``update`` sees the local
        part. ``update`` sees every other dimension whole, wherever the tensor is stored.
        """
        return {}

    def needs_whole(self, layout: Layout) -> bool:
        """Return whether the update cannot work on a part of the block, given how the block is sharded.

        Every rank then gathers the gradient and updates the whole block.
        """
        return False

    def scratch(self, layout: Layout, tick: Tick) -> int:
        """Return the bytes that the kind holds for a block while ranks add up sums, if these are larger than state.

        Like sizes, they follow from global shapes and the step, so they are the same on all ranks.
        """
        return 0

    def phase(self, tick: Tick) -> Hashable:
        """Return what all blocks of a batch must share in a step, such as whether recurring work is due."""
        return None

    def init(self, layout: Layout) -> State:
        """Allocate the state of one block on the layout's device, filled with zeros."""
        return {key: allocate(layout, sizes) for key, sizes in self.sizes(layout).items()}

    def keeps_state_of(self, other: Kind, layout: Layout) -> bool:
        """Return whether the state of ``other`` is valid state of this kind, tensor for tensor.

        Options never change the meaning of state of given shapes, only how the kind uses it. No state suits every kind
        without state.
        """
        shapes = self.shapes(layout)
        return shapes == other.shapes(layout) and (type(self) is type(other) or not shapes)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return the full statistic that the state represents, ``[..., m, n]``, without bias correction.

        Here and in :meth:`from_dense`, state and layout describe a whole block on one process.
        """
        raise NotImplementedError

    def from_dense(self, value: Tensor, layout: Layout) -> State:
        """Return the state that best approximates a full statistic."""
        raise NotImplementedError

    def infer(self, state: Mapping[str, Tensor], layout: Layout) -> Self:
        """Return the kind with the options that the shapes of saved state imply.

        Raises:
            ValueError: If the shapes do not fit this block. The message names the key and both shapes.
        """
        for key, expected in self.shapes(layout).items():
            found = tuple(state[key].shape)
            if found != expected:
                raise ValueError(f"{key!r} has shape {found}, expected {expected} for a block of shape {layout.shape}")
        return self

    def shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Return the global shapes of the state tensors, without allocating them."""
        return {key: shape_of(layout, sizes) for key, sizes in self.sizes(layout).items()}

    def nbytes(self, layout: Layout) -> int:
        """Return the size of the block's state in bytes, over all ranks."""
        size = layout.state_dtype.itemsize
        return sum(torch.Size(shape).numel() * size for shape in self.shapes(layout).values())

    def rounding(self, layout: Layout, tick: Tick, key: str) -> Noise | None:
        """Return the noise for rounding a state tensor, or None if it is stored in the dtype of the arithmetic.

        The noise depends on the position in the whole tensor, so every sharding rounds identically.
        """
        if layout.state_dtype == layout.dtype:
            return None
        return Noise.like(layout, self.sizes(layout)[key], tick, f"rounding {key}")
