"""What this rank holds of one block of a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.sharding.tensors import arithmetic_dtype, is_dtensor, local_tensor


@dataclass(frozen=True)
class Slot:
    """The part of a parameter that a block covers: ``length`` entries of dimension ``dim``, from ``start``."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut over the ranks of a group.

    Attributes:
        dim: The dimension that is cut.
        sizes: The length of every rank's piece; their order is that of the pieces.
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
        shape: Global shape of the block as it lies in the parameter.
        matrix: The same as ``[..., m, n]``, which is what kinds see: a vector is one row, three dimensions are a
            stack of matrices (or a kernel, as more are: one matrix with the trailing dimensions flattened).
        dtype: The dtype of all arithmetic: float32, or float64 for float64 parameters.
        state_dtype: The dtype in which state is stored.
        device: Where state lives.
        output_dim: Which dimension of ``matrix`` indexes the outputs of the layer: ``-2``, or ``-1`` where a model
            stores its weights transposed.
        head_dim: Outputs per attention head, where known.
        mesh: The device mesh of a sharded parameter.
        placements: Its placements, one per mesh dimension.
        local: Sizes of the part of ``matrix`` that this rank works on.
        offset: Where in ``matrix`` that part starts.
        slot: Which part of the parameter the block covers, if not all of it.
        local_slot: Where that part lies in what this rank holds of the parameter.
        param_shape: Global shape of the parameter.
        straddles_shards: Whether shards of the fused parameter end inside its blocks, so that a rank may hold any part
            of this one.
        gathered: Whether every rank works on the whole block, although the parameter is sharded.
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
    local_slot: Slot | None = None
    param_shape: tuple[int, ...] = ()
    straddles_shards: bool = False
    gathered: bool = False

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
        """Read the layout of one block off its parameter, which may be a DTensor.

        Args:
            param: The parameter.
            slot: The part that the block covers, if not all of it.
            state_dtype: The dtype of state; None means that of the arithmetic.
            output_dim: See the attribute.
            head_dim: See the attribute.
            flatten: Whether three dimensions are one matrix, too.

        Raises:
            NotImplementedError: If the parameter is sharded in a way that no statistic survives; the message names
                the placements. If it is on a device without float64.
        """
        if param.device.type == "mps":
            raise NotImplementedError(
                "Small matrices are factored in float64, which the device 'mps' does not have: train on the CPU, for "
                "instance with Trainer(accelerator='cpu')."
            )
        shape = list(param.shape)
        if slot is not None:
            shape[slot.dim] = slot.length
        dtype = arithmetic_dtype(param)
        matrix = as_matrix(tuple(shape), flatten)
        mesh, local, offset, straddles, local_slot = None, matrix, (0,) * len(matrix), False, slot
        placements: tuple[Any, ...] = ()
        if is_dtensor(param):
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            mesh, placements = param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]
            _check(param, flattened=len(matrix) < param.ndim)
            mine, start = map(list, compute_local_shape_and_global_offset(param.shape, mesh, placements))
            if slot is not None:
                straddles = any(p.is_shard(slot.dim) and mesh.size(i) > 1 for i, p in enumerate(placements))
                local_slot = _overlap(slot, start[slot.dim], mine[slot.dim])
                mine[slot.dim], start[slot.dim] = local_slot.length, max(0, start[slot.dim] - slot.start)
            local = as_matrix(tuple(mine), flatten)
            if len(shape) > 0:
                offset = (
                    (0, *start) if len(shape) == 1 else tuple(start if len(shape) == len(matrix) else (start[0], 0))
                )
        layout = Layout(
            shape=tuple(shape),
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
            local_slot=local_slot,
            param_shape=tuple(param.shape),
            straddles_shards=straddles,
        )
        if straddles:
            layout.gather()  # refuses what cannot be gathered
        return layout

    # ------------------------------------------------------------------ how the block is sharded

    def group(self, dim: int) -> Any | None:
        """Return the process group over which the work on dimension ``dim`` (negative) of ``matrix`` is divided."""
        positions = [] if self.gathered else self.shards(dim)
        assert len(positions) < 2, "two mesh dimensions shard one dimension, which _check refuses"
        return self.mesh.get_group(positions[0]) if positions else None

    def mesh_groups(self) -> list[Any]:
        """Return the process groups of all mesh dimensions, those that replicate the block included."""
        count = self.mesh.ndim if self.mesh is not None else 0
        return [self.mesh.get_group(position) for position in range(count) if self.mesh.size(position) > 1]

    def shards(self, dim: int | None = None) -> list[int]:
        """Return the mesh dimensions of more than one rank that shard the block, or one dimension of ``matrix``."""
        return [
            position
            for position, placement in enumerate(self.placements)
            if placement.is_shard()
            and self.mesh.size(position) > 1
            and (dim is None or self.matrix_dim(placement.dim) == dim)
        ]

    def matrix_dim(self, dim: int) -> int:
        """Return the negative dimension of ``matrix`` in which dimension ``dim`` of the parameter ends up."""
        if len(self.shape) == 1:
            return -1
        return dim - len(self.shape) if len(self.shape) == len(self.matrix) else -2

    def divides(self, dim: int) -> bool:
        """Return whether dimension ``dim`` of ``matrix`` is sharded."""
        return bool(self.shards(dim))

    def gather(self) -> Layout:
        """Return the layout for a block that every rank works on as a whole.

        Raises:
            NotImplementedError: If it is sharded over more than one dimension of the mesh.
        """
        if len(self.shards()) > 1:
            raise NotImplementedError(
                f"A block of shape {self.shape} has to be worked on as a whole, but its parameter is sharded over "
                f"several mesh dimensions: placements {self.placements}. Shard it over one of them, along the "
                "dimension that its fused blocks or its statistics do not need whole."
            )
        return replace(self, local=self.matrix, offset=(0,) * len(self.matrix), gathered=True)

    def whole(self) -> Layout:
        """Return the layout of the same block on one process."""
        origin = (0,) * len(self.matrix)
        return replace(
            self, mesh=None, placements=(), local=self.matrix, offset=origin, straddles_shards=False, gathered=False
        )

    def cut_of_block(self) -> Cut:
        """Return how the block, as ``[..., m, n]``, is cut where it has to be gathered."""
        (position,) = self.shards()
        dim = self.placements[position].dim
        count = self.mesh.size(position)
        lengths = pieces(self.param_shape[dim], count)
        if self.slot is not None and self.slot.dim == dim:
            starts = [sum(lengths[:rank]) for rank in range(count)]
            lengths = [_overlap(self.slot, start, size).length for start, size in zip(starts, lengths, strict=True)]
        return self.cut(position, self.matrix_dim(dim) + len(self.matrix), lengths)

    def cut(self, position: int, dim: int, lengths: list[int]) -> Cut:
        """Return how a tensor is cut over the ranks of one mesh dimension."""
        return Cut(dim, tuple(lengths), self.mesh.get_local_rank(position), self.mesh.get_group(position))

    # ------------------------------------------------------------------ parts of the block

    def take(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of the block out of its parameter or gradient, as ``[..., m, n]``."""
        tensor = local_tensor(tensor)
        if self.local_slot is not None:
            tensor = tensor.narrow(self.local_slot.dim, self.local_slot.start, self.local_slot.length)
        return tensor.reshape(self.local)

    def part_of(self, tensor: Tensor, *, at: int, dim: int) -> Tensor:
        """Return this rank's part of a global tensor whose dimension ``at`` runs along dimension ``dim`` of the block.

        Stack dimensions come first in both.
        """
        return self.along(self.part_of_stack(tensor), at=at, dim=dim)

    def part_of_stack(self, tensor: Tensor) -> Tensor:
        """Return the matrices of a global stack that this rank works on."""
        for position in range(len(self.matrix) - 2):
            tensor = tensor.narrow(position, self.offset[position], self.local[position])
        return tensor

    def along(self, tensor: Tensor, *, at: int, dim: int) -> Tensor:
        """Return this rank's part of a tensor whose dimension ``at`` runs along all of dimension ``dim``."""
        return tensor.narrow(at, self.offset[dim], self.local[dim])

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor that broadcasts against the whole block, as a view."""
        for dim, size in enumerate(whole.shape):
            if size != 1:
                whole = whole.narrow(dim, self.offset[dim], self.local[dim])
        return whole

    @property
    def sharded(self) -> bool:
        """Whether other ranks hold other parts of the block."""
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
    """Return how long the pieces are into which a dimension is sharded over ``count`` ranks."""
    size = -(-length // count)
    return [max(0, min(size, length - rank * size)) for rank in range(count)]


def _overlap(slot: Slot, start: int, length: int) -> Slot:
    """Return where a slot lies in the piece of a parameter that starts at ``start``."""
    low = min(max(0, slot.start - start), length)
    high = min(max(0, slot.start + slot.length - start), length)
    return Slot(slot.dim, low, high - low)


def as_matrix(shape: tuple[int, ...], flatten: bool = False) -> tuple[int, ...]:
    """Return a shape as ``[..., m, n]``; see :attr:`Layout.matrix`."""
    if len(shape) < 2:
        return (1, math.prod(shape))
    if len(shape) <= 3 and not (flatten and len(shape) == 3):
        return shape
    return (shape[0], math.prod(shape[1:]))


def _check(param: Any, *, flattened: bool) -> None:
    """Refuse placements under which a block's rows and columns do not stay whole."""
    from torch.distributed.tensor import Replicate, Shard

    placements = [p for position, p in enumerate(param.placements) if param.device_mesh.size(position) > 1]
    dims = [placement.dim for placement in placements if type(placement) is Shard]
    plain = all(type(placement) in (Shard, Replicate) for placement in placements)
    cuts_flattened = flattened and any(dim != 0 for dim in dims)
    if not plain or len(dims) != len(set(dims)) or cuts_flattened:
        raise NotImplementedError(
            f"A parameter of shape {tuple(param.shape)} is sharded in this way: placements {param.placements}. "
            "Supported: Replicate and one Shard per dimension, on dimension 0 for weights of more than three "
            "dimensions."
        )
