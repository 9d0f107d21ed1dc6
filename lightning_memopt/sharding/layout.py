"""What this rank holds of one block of a parameter, and how its state is wrapped; the only user of DTensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

try:  # torch can be built without distributed
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError:  # pragma: no cover
    DTensor = None  # type: ignore[assignment,misc]


@dataclass(frozen=True)
class Whole:
    """As many as dimension ``dim`` of the block, sharded as it is, but every rank works on all of them."""

    dim: int


# The last two sizes of a state tensor: ``-2`` or ``-1`` for "as many as that dimension of the block", of which every
# rank works on its part; `Whole`; or a number, of which every rank works on all.
Sizes = tuple[int | Whole, ...]
# The sizes of a state tensor that has one number per element of the block, in the block's own shape.
ELEMENTWISE: Sizes = ()


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
        torn: Whether a fused parameter is sharded across its blocks, so that a rank may hold any part of this one.
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
    torn: bool = False
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
        mesh, local, offset, torn, local_slot = None, matrix, (0,) * len(matrix), False, slot
        placements: tuple[Any, ...] = ()
        if DTensor is not None and isinstance(param, DTensor):
            mesh, placements = param.device_mesh, tuple(param.placements)
            _check(param, flattened=len(matrix) < param.ndim)
            mine, start = map(list, compute_local_shape_and_global_offset(param.shape, mesh, placements))
            if slot is not None:
                torn = any(p.is_shard(slot.dim) and mesh.size(i) > 1 for i, p in enumerate(placements))
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
            torn=torn,
        )
        if torn:
            layout.gather()  # refuses what cannot be gathered
        return layout

    # ------------------------------------------------------------------ how the block is sharded

    def group(self, dim: int) -> Any | None:
        """Return the process group over which the work on dimension ``dim`` (negative) of ``matrix`` is divided."""
        positions = [] if self.gathered else self._shards(dim)
        assert len(positions) < 2, "two mesh dimensions shard one dimension, which _check refuses"
        return self.mesh.get_group(positions[0]) if positions else None

    def mesh_groups(self) -> list[Any]:
        """Return the process groups of all mesh dimensions, those that replicate the block included."""
        count = self.mesh.ndim if self.mesh is not None else 0
        return [self.mesh.get_group(position) for position in range(count) if self.mesh.size(position) > 1]

    def _shards(self, dim: int | None = None) -> list[int]:
        """Return the mesh dimensions of more than one rank that shard the block, or one dimension of ``matrix``."""
        return [
            position
            for position, placement in enumerate(self.placements)
            if placement.is_shard()
            and self.mesh.size(position) > 1
            and (dim is None or self._matrix_dim(placement.dim) == dim)
        ]

    def _matrix_dim(self, dim: int) -> int:
        """Return the negative dimension of ``matrix`` in which dimension ``dim`` of the parameter ends up."""
        if len(self.shape) == 1:
            return -1
        return dim - len(self.shape) if len(self.shape) == len(self.matrix) else -2

    def divides(self, dim: int) -> bool:
        """Return whether dimension ``dim`` of ``matrix`` is sharded."""
        return bool(self._shards(dim))

    def gather(self) -> Layout:
        """Return the layout for a block that every rank works on as a whole.

        Raises:
            NotImplementedError: If it is sharded over more than one dimension of the mesh.
        """
        if len(self._shards()) > 1:
            raise NotImplementedError(
                f"A block of shape {self.shape} has to be worked on as a whole, but its parameter is sharded over "
                f"several mesh dimensions: placements {self.placements}. Shard it over one of them, along the "
                "dimension that its fused blocks or its statistics do not need whole."
            )
        return replace(self, local=self.matrix, offset=(0,) * len(self.matrix), gathered=True)

    def whole(self) -> Layout:
        """Return the layout of the same block on one process."""
        origin = (0,) * len(self.matrix)
        return replace(self, mesh=None, placements=(), local=self.matrix, offset=origin, torn=False, gathered=False)

    # ------------------------------------------------------------------ state

    def allocate(self, sizes: Sizes) -> Tensor:
        """Allocate one state tensor of this block, all zeros, stack dimensions first.

        A state tensor that lies along a sharded dimension is sharded with it. One that does not, such as the right
        factor of a matrix whose rows are sharded, is sharded along its own longest dimension: ranks gather it for a
        step and keep their piece.

        Args:
            sizes: The last two sizes, or ``ELEMENTWISE``.
        """
        whole = self.shape_of(sizes)
        if self.mesh is None:
            return torch.zeros(whole, dtype=self.state_dtype, device=self.device)
        placements = self._placements(sizes)
        mine, _ = compute_local_shape_and_global_offset(torch.Size(whole), self.mesh, placements)
        local = torch.zeros(mine, dtype=self.state_dtype, device=self.device)
        meta = TensorMeta(torch.Size(whole), torch.empty(whole, device="meta").stride(), self.state_dtype)
        # Not from_local, which would move the state of offloaded parameters to the mesh's device.
        return DTensor(local, DTensorSpec(self.mesh, placements, tensor_meta=meta), requires_grad=False)

    def shape_of(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the global shape of a state tensor."""
        if sizes == ELEMENTWISE:
            return self.shape
        dims = [size.dim if isinstance(size, Whole) else size for size in sizes]
        return (*self.matrix[:-2], *(self.matrix[size] if size < 0 else size for size in dims))

    def origin(self, sizes: Sizes) -> tuple[int, ...]:
        """Return where in the whole state tensor, seen as ``[..., m, n]``, the part starts that this rank works on."""
        if sizes == ELEMENTWISE:
            return self.offset
        parts = [0 if isinstance(size, Whole) or size >= 0 else self.offset[size] for size in sizes]
        return (*self.offset[:-2], *parts)

    def cut_of(self, sizes: Sizes) -> Cut | None:
        """Return how a state tensor is cut that ranks need as a whole; None for one of which each works on its part."""
        for position in self._shards():
            placement, follows = self._placements(sizes)[position], self._follows(sizes, position)
            last = None if follows is None or sizes == ELEMENTWISE else follows - len(self.matrix) + 2
            seen_whole = follows is None or (last is not None and last >= 0 and isinstance(sizes[last], Whole))
            if placement.is_shard() and seen_whole:
                pieces = _pieces(self.shape_of(sizes)[placement.dim], self.mesh.size(position))
                return self._cut(position, placement.dim, pieces)
        return None

    def cut_of_block(self) -> Cut:
        """Return how the block, as ``[..., m, n]``, is cut where it has to be gathered."""
        (position,) = self._shards()
        dim = self.placements[position].dim
        count = self.mesh.size(position)
        pieces = _pieces(self.param_shape[dim], count)
        if self.slot is not None and self.slot.dim == dim:
            starts = [sum(pieces[:rank]) for rank in range(count)]
            pieces = [_overlap(self.slot, start, size).length for start, size in zip(starts, pieces, strict=True)]
        return self._cut(position, self._matrix_dim(dim) + len(self.matrix), pieces)

    def _cut(self, position: int, dim: int, pieces: list[int]) -> Cut:
        return Cut(dim, tuple(pieces), self.mesh.get_local_rank(position), self.mesh.get_group(position))

    def _follows(self, sizes: Sizes, position: int) -> int | None:
        """Return the dimension of a state tensor that is sharded as mesh dimension ``position`` shards the block."""
        if self.gathered:
            return None
        dim = self._matrix_dim(self.placements[position].dim)
        stack = len(self.matrix) - 2
        if sizes == ELEMENTWISE:
            return self.placements[position].dim
        if dim < -2:
            return dim + len(self.matrix)
        return next((stack + place for place, size in enumerate(sizes) if size in (dim, Whole(dim))), None)

    def _placements(self, sizes: Sizes) -> tuple[Any, ...]:
        shape = self.shape_of(sizes)
        placements: list[Any] = [Replicate()] * len(self.placements)
        shards = self._shards()
        for position in shards:
            follows = self._follows(sizes, position)
            if follows is not None:
                placements[position] = Shard(follows)
            elif len(shards) == 1 and shape:
                placements[position] = Shard(max(range(len(shape)), key=lambda dim: shape[dim]))
        return tuple(placements)

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
        return bool(self._shards())

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


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, which all its ranks ask for together, or the tensor itself."""
    return tensor.full_tensor() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def is_aligned(grad: Tensor, param: Tensor) -> bool:
    """Return whether a gradient has the placements of its parameter.

    Autograd may leave others where ``fully_shard`` does not reduce it, such as a pending sum over the ranks.
    """
    if DTensor is None or not (isinstance(grad, DTensor) and isinstance(param, DTensor)):
        return True
    return grad.placements == param.placements


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter; all its ranks ask for that together."""
    if is_aligned(grad, param):
        return grad
    return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]


def fill_(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, or a DTensor of any placement, into what this rank holds of ``target``."""
    if DTensor is None or not isinstance(target, DTensor):
        target.copy_(full_tensor(value).view(target.shape))
        return
    same = isinstance(value, DTensor) and value.device_mesh == target.device_mesh
    if same and value.placements == target.placements and value.shape == target.shape:  # type: ignore[attr-defined]
        target.to_local().copy_(value.to_local())  # type: ignore[attr-defined]
        return
    sizes, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    part = full_tensor(value).view(target.shape)
    for dim, (start, length) in enumerate(zip(offset, sizes, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), length)
    target.to_local().copy_(part)


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _pieces(length: int, count: int) -> list[int]:
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
    placements = [p for position, p in enumerate(param.placements) if param.device_mesh.size(position) > 1]
    dims = [placement.dim for placement in placements if type(placement) is Shard]
    plain = all(type(placement) in (Shard, Replicate) for placement in placements)
    torn = flattened and any(dim != 0 for dim in dims)
    if not plain or len(dims) != len(set(dims)) or torn:
        raise NotImplementedError(
            f"A parameter of shape {tuple(param.shape)} is sharded in this way: placements {param.placements}. "
            "Supported: Replicate and one Shard per dimension, on dimension 0 for weights of more than three "
            "dimensions."
        )
