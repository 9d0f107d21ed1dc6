"""The part of one parameter block that a rank holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.sharding.slot import Slot
from lightning_memopt.sharding.tensors import arithmetic_dtype, is_dtensor, local_part, local_tensor


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut over the ranks of a group.

    Attributes:
        dim: The dimension that is cut.
        sizes: The length of every rank's piece, in the order of the pieces.
        rank: This rank's position in the group.
        group: The process group.
    """

    dim: int
    sizes: tuple[int, ...]
    rank: int
    group: Any

    def mine(self, whole: Tensor) -> Tensor:
        """Return this rank's piece of the whole tensor, as a view."""
        return whole.narrow(self.dim, sum(self.sizes[: self.rank]), self.sizes[self.rank])


@dataclass(frozen=True)
class Layout:
    """Shapes and placement of one block.

    Attributes:
        shape: Global shape of the block in the parameter.
        matrix: The global shape as ``[..., m, n]``, which kinds see. A vector is one row. Three dimensions are a stack
            of matrices, or a kernel. Kernels and weights of more dimensions are one matrix: trailing dimensions are
            flattened.
        dtype: The dtype of all arithmetic: float32, or float64 for float64 parameters.
        state_dtype: The dtype of stored state.
        device: The device of the state.
        output_dim: The dimension of ``matrix`` that indexes the layer's outputs: ``-2``, or ``-1`` if transposed.
        head_dim: Outputs per attention head, if known.
        mesh: The device mesh of a sharded parameter.
        placements: Its placements, one per mesh dimension.
        local: Sizes of the part of ``matrix`` that this rank works on.
        offset: Where that part starts in ``matrix``.
        slot: The part of the parameter that the block covers, or None for the whole parameter.
        local_slots: Where that part is in this rank's local part of the parameter; empty for the whole parameter.
        param_shape: Global shape of the parameter.
        straddles_shards: Whether shard boundaries of a fused parameter are inside its blocks, so that a rank may hold
            any part of this block.
        gathered: Whether every rank works on the whole block although the parameter is sharded.
        batch: Number of equal blocks that are updated together, or None. It is the first size of ``matrix`` and
            ``local`` then.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device
    output_dim: int = -2
    head_dim: int | None = None
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    local: tuple[int, ...] = ()
    offset: tuple[int, ...] = ()
    slot: Slot | None = None
    local_slots: tuple[Slot, ...] = ()
    param_shape: tuple[int, ...] = ()
    straddles_shards: bool = False
    gathered: bool = False
    batch: int | None = None

    @staticmethod
    def of(
        param: Tensor,
        *,
        slot: Slot | None = None,
        state_dtype: torch.dtype | None = None,
        output_dim: int = -2,
        head_dim: int | None = None,
        flatten: bool = False,
    ) -> Layout:
        """Derive the layout of one block from its parameter, which may be a DTensor.

        Args:
            param: The parameter.
            slot: The part that the block covers, or None for the whole parameter.
            state_dtype: The dtype of state; None means the dtype of the arithmetic.
            output_dim: See the attribute.
            head_dim: See the attribute.
            flatten: Whether three dimensions are one matrix instead of a stack.

        Raises:
            NotImplementedError: If the sharding is not supported; the message names the placements. Also if the device
                does not support float64.
        """
        if param.device.type == "mps":
            raise NotImplementedError(
                "The device 'mps' does not support float64, which factoring small matrices needs: train on the CPU, "
                "for example with Trainer(accelerator='cpu')."
            )
        shape = tuple(param.shape) if slot is None else slot.shape_in(param.shape)
        dtype = arithmetic_dtype(param)
        matrix = as_matrix(shape, flatten)
        mesh, local, offset, straddles = None, matrix, (0,) * len(matrix), False
        local_slots: tuple[Slot, ...] = () if slot is None else (slot,)
        placements: tuple[Any, ...] = ()
        if is_dtensor(param):
            mesh, placements = param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]
            _check(param, flattened=len(matrix) < param.ndim)
            mine, start = map(list, local_part(param.shape, mesh, placements))
            if slot is not None:
                straddles = any(p.is_shard(slot.dim) and mesh.size(i) > 1 for i, p in enumerate(placements))
                first, size = start[slot.dim], mine[slot.dim]
                local_slots = slot.within(first, size)
                start[slot.dim] = slot.count(first)
                mine[slot.dim] = slot.count(first + size) - start[slot.dim]
            local = as_matrix(tuple(mine), flatten)
            if len(shape) > 0:
                offset = (
                    (0, *start) if len(shape) == 1 else tuple(start if len(shape) == len(matrix) else (start[0], 0))
                )
        layout = Layout(
            shape=shape,
            matrix=matrix,
            dtype=dtype,
            state_dtype=state_dtype or dtype,
            device=param.device,
            output_dim=output_dim,
            head_dim=head_dim,
            mesh=mesh,
            placements=placements,
            local=local,
            offset=offset,
            slot=slot,
            local_slots=local_slots,
            param_shape=tuple(param.shape),
            straddles_shards=straddles,
        )
        if straddles:
            layout.gather()  # raises if the block cannot be gathered
        return layout

    # ------------------------------------------------------------------ how the block is sharded

    def group(self, dim: int) -> Any | None:
        """Return the process group that divides the work on dimension ``dim`` (negative) of ``matrix``, or None."""
        positions = [] if self.gathered else self.shards(dim)
        assert len(positions) < 2, "two mesh dimensions shard one dimension, which _check refuses"
        return self.mesh.get_group(positions[0]) if positions else None

    def matrix_groups(self) -> list[Any]:
        """Return the process groups that divide the work on rows and columns, in the order of the mesh."""
        positions = [] if self.gathered else sorted((*self.shards(-2), *self.shards(-1)))
        return [self.mesh.get_group(position) for position in positions]

    def mesh_groups(self) -> list[Any]:
        """Return the process groups of all mesh dimensions, including those that replicate the block."""
        count = self.mesh.ndim if self.mesh is not None else 0
        return [self.mesh.get_group(position) for position in range(count) if self.mesh.size(position) > 1]

    def shards(self, dim: int | None = None) -> list[int]:
        """Return the mesh dimensions of more than one rank that shard the block, or dimension ``dim`` of ``matrix``."""
        return [
            position
            for position, placement in enumerate(self.placements)
            if placement.is_shard()
            and self.mesh.size(position) > 1
            and (dim is None or self.matrix_dim(placement.dim) == dim)
        ]

    def matrix_dim(self, dim: int) -> int:
        """Return the negative dimension of ``matrix`` that contains dimension ``dim`` of the parameter."""
        if len(self.shape) == 1:
            return -1
        stacked = 0 if self.batch is None else 1
        return dim - len(self.shape) if len(self.shape) == len(self.matrix) - stacked else -2

    def divides(self, dim: int) -> bool:
        """Return whether dimension ``dim`` of ``matrix`` is sharded."""
        return bool(self.shards(dim))

    def gather(self) -> Layout:
        """Return the layout with which every rank works on the whole block.

        Raises:
            NotImplementedError: If it is sharded over several mesh dimensions.
        """
        if len(self.shards()) > 1:
            raise NotImplementedError(
                f"A block of shape {self.shape} must be gathered, but its parameter is sharded over several mesh "
                f"dimensions: placements {self.placements}. Shard it over one mesh dimension only, along a dimension "
                "that its fused blocks or statistics do not need whole."
            )
        return replace(self, local=self.matrix, offset=(0,) * len(self.matrix), gathered=True)

    def whole(self) -> Layout:
        """Return the layout of the same block on one process."""
        origin = (0,) * len(self.matrix)
        return replace(
            self, mesh=None, placements=(), local=self.matrix, offset=origin, straddles_shards=False, gathered=False
        )

    def batched(self, count: int) -> Layout:
        """Return the layout of ``count`` blocks with this layout, which are updated together."""
        return replace(
            self,
            batch=count,
            matrix=(count, *self.matrix),
            local=(count, *self.local),
            offset=(0, *self.offset),
        )

    def cut_of_block(self) -> Cut:
        """Return how the block, as ``[..., m, n]``, is cut, for a block that ranks gather."""
        (position,) = self.shards()
        dim = self.placements[position].dim
        count = self.mesh.size(position)
        lengths = pieces(self.param_shape[dim], count)
        if self.slot is not None and self.slot.dim == dim:
            ends = [0, *itertools.accumulate(lengths)]
            lengths = [self.slot.count(end) - self.slot.count(start) for start, end in itertools.pairwise(ends)]
        return self.cut(position, self.matrix_dim(dim) + len(self.matrix), lengths)

    def cut(self, position: int, dim: int, lengths: list[int]) -> Cut:
        """Return how a tensor is cut over the ranks of one mesh dimension."""
        return Cut(dim, tuple(lengths), self.mesh.get_local_rank(position), self.mesh.get_group(position))

    # ------------------------------------------------------------------ parts of the block

    def take(self, tensor: Tensor) -> Tensor:
        """Return the local part of the block from its parameter or gradient, as ``[..., m, n]``.

        It is a view where that is possible. A channels-last kernel and a part that lies in several runs are copied.
        """
        tensor = local_tensor(tensor)
        views = [slot.view(tensor) for slot in self.local_slots] or [tensor]
        tensor = views[0] if len(views) == 1 else torch.cat(views, self.local_slots[0].dim)
        return tensor if tensor.shape == self.local else tensor.reshape(self.local)

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Write what :meth:`take` returned, changed since, to the block's parameter. A view of it needs nothing."""
        tensor = local_tensor(tensor)
        if part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            return
        views = [slot.view(tensor) for slot in self.local_slots] or [tensor]
        if len(views) == 1:
            views[0].copy_(part.view(views[0].shape))
            return
        dim, sizes = self.local_slots[0].dim, [slot.length for slot in self.local_slots]
        shape = [*tensor.shape]
        shape[dim] = sum(sizes)
        torch._foreach_copy_(views, part.view(shape).split(sizes, dim))

    def part_of(self, tensor: Tensor, *, at: int, dim: int) -> Tensor:
        """Return the local part of a global tensor whose dimension ``at`` matches dimension ``dim`` of the block.

        Stack dimensions come first in both.
        """
        return self.along(self.part_of_stack(tensor), at=at, dim=dim)

    def part_of_stack(self, tensor: Tensor) -> Tensor:
        """Return the matrices of a global stack that this rank works on."""
        for position in range(len(self.matrix) - 2):
            tensor = tensor.narrow(position, self.offset[position], self.local[position])
        return tensor

    def along(self, tensor: Tensor, *, at: int, dim: int) -> Tensor:
        """Return the local part of a tensor whose dimension ``at`` covers all of dimension ``dim``."""
        return tensor.narrow(at, self.offset[dim], self.local[dim])

    def part(self, whole: Tensor) -> Tensor:
        """Return the local part of a tensor that broadcasts against the whole block, as a view."""
        for dim, size in enumerate(whole.shape):
            if size != 1:
                whole = whole.narrow(dim, self.offset[dim], self.local[dim])
        return whole

    @property
    def sharded(self) -> bool:
        """Whether ranks hold different parts of the block."""
        return bool(self.shards())

    @property
    def vector(self) -> bool:
        """Whether the block has fewer than two dimensions."""
        return len(self.shape) < 2

    @property
    def empty(self) -> bool:
        """Whether the block has no elements, on any rank."""
        return 0 in self.shape

    @property
    def short_side(self) -> int:
        """The smaller of m and n."""
        return min(self.matrix[-2:])


def pieces(length: int, count: int) -> list[int]:
    """Return the lengths of the pieces of a dimension that is sharded over ``count`` ranks."""
    size = -(-length // count)
    return [max(0, min(size, length - rank * size)) for rank in range(count)]


def as_matrix(shape: tuple[int, ...], flatten: bool = False) -> tuple[int, ...]:
    """Return a shape as ``[..., m, n]``; see :attr:`Layout.matrix`."""
    if len(shape) < 2:
        return (1, math.prod(shape))
    if len(shape) <= 3 and not (flatten and len(shape) == 3):
        return shape
    return (shape[0], math.prod(shape[1:]))


def _check(param: Any, *, flattened: bool) -> None:
    """Refuse placements that break up the rows and columns of a block."""
    from torch.distributed.tensor import Replicate, Shard

    placements = [p for position, p in enumerate(param.placements) if param.device_mesh.size(position) > 1]
    dims = [placement.dim for placement in placements if type(placement) is Shard]
    plain = all(type(placement) in (Shard, Replicate) for placement in placements)
    cuts_flattened = flattened and any(dim != 0 for dim in dims)
    if not plain or len(dims) != len(set(dims)) or cuts_flattened:
        raise NotImplementedError(
            f"The sharding of a parameter of shape {tuple(param.shape)} is not supported: placements "
            f"{param.placements}. Supported: Replicate and one Shard per dimension, on dimension 0 for weights of more "
            "than three dimensions."
        )
