"""What this rank holds of one block of a parameter, and how its state is wrapped; the only user of DTensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:  # torch can be built without distributed
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError:  # pragma: no cover
    DTensor = None  # type: ignore[assignment,misc]


@dataclass(frozen=True)
class Slot:
    """The part of a parameter that a block covers: ``length`` entries of dimension ``dim``, from ``start``."""

    dim: int
    start: int
    length: int


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
        local: Sizes of this rank's part of ``matrix``.
        offset: Where in ``matrix`` that part starts.
        slot: Which part of the parameter the block covers, if not all of it.
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
        matrix = _matrix(tuple(shape), flatten)
        mesh, local, offset = None, matrix, (0,) * len(matrix)
        placements: tuple[Any, ...] = ()
        if DTensor is not None and isinstance(param, DTensor):
            mesh, placements = param.device_mesh, tuple(param.placements)
            _check(param, slot, flattened=len(matrix) < param.ndim)
            mine, start = map(list, compute_local_shape_and_global_offset(param.shape, mesh, placements))
            if slot is not None:
                mine[slot.dim], start[slot.dim] = slot.length, 0
            local = _matrix(tuple(mine), flatten)
            offset = (0, *start) if len(shape) == 1 else tuple(start if len(shape) == len(matrix) else (start[0], 0))
        return Layout(
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
        )

    def groups(self, dim: int) -> list[Any]:
        """Return the process groups over which dimension ``dim`` (negative) of ``matrix`` is sharded."""
        return [
            self.mesh.get_group(position)
            for position, placement in enumerate(self.placements)
            if placement.is_shard() and self._matrix_dim(placement.dim) == dim
        ]

    def _matrix_dim(self, dim: int) -> int:
        """Return the negative dimension of ``matrix`` in which dimension ``dim`` of the parameter ends up."""
        if len(self.shape) == 1:
            return -1
        return dim - len(self.shape) if len(self.shape) == len(self.matrix) else -2

    def zeros(self, *sizes: int) -> Tensor:
        """Allocate one state tensor of this block, stack dimensions first.

        Args:
            sizes: The last two sizes: ``-2`` or ``-1`` for "as many as that dimension of the block", which is
                then sharded as the block is, or a plain number.
        """
        stack = len(self.matrix) - 2
        whole = [*self.matrix[:stack], *(self.matrix[size] if size < 0 else size for size in sizes)]
        mine = [*self.local[:stack], *(self.local[size] if size < 0 else size for size in sizes)]
        follows = {size: stack + position for position, size in enumerate(sizes) if size < 0}
        follows.update({position - len(self.matrix): position for position in range(stack)})
        return self._wrap(whole, mine, follows)

    def zeros_elementwise(self) -> Tensor:
        """Allocate a state tensor with the block's own shape: one number per element."""
        mine = self.local_view(self.shape, self.local)
        follows = {self._matrix_dim(dim): dim for dim in reversed(range(len(self.shape)))}
        return self._wrap(list(self.shape), mine, follows)

    @staticmethod
    def local_view(shape: tuple[int, ...], local: tuple[int, ...]) -> list[int]:
        """Return the local sizes of a block of global ``shape`` whose local matrix is ``local``."""
        if len(shape) <= 1:
            return list(local[len(local) - len(shape) :])
        return list(local) if len(shape) == len(local) else [local[0], *shape[1:]]

    def _wrap(self, whole: list[int], mine: list[int], follows: dict[int, int]) -> Tensor:
        local = torch.zeros(mine, dtype=self.state_dtype, device=self.device)
        if self.mesh is None:
            return local
        placements = [
            Shard(follows[self._matrix_dim(placement.dim)])
            if placement.is_shard() and self._matrix_dim(placement.dim) in follows
            else Replicate()
            for placement in self.placements
        ]
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)

    def take(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of the block out of its parameter or gradient, as ``[..., m, n]``."""
        tensor = local_tensor(tensor)
        if self.slot is not None:
            tensor = tensor.narrow(self.slot.dim, self.slot.start, self.slot.length)
        return tensor.reshape(self.local)

    def cut(self, tensor: Tensor, *, at: int, dim: int) -> Tensor:
        """Cut this rank's part out of a global tensor whose dimension ``at`` runs along dimension ``dim`` of the block.

        Stack dimensions come first in both.
        """
        for position in range(len(self.matrix) - 2):
            tensor = tensor.narrow(position, self.offset[position], self.local[position])
        return tensor.narrow(at, self.offset[dim], self.local[dim])

    def require_whole(self, dim: int, what: str) -> None:
        """Refuse to work where dimension ``dim`` of ``matrix`` is sharded.

        Raises:
            NotImplementedError: Naming ``what`` needs it whole, and the placements.
        """
        if self.groups(dim):
            raise NotImplementedError(
                f"{what} needs dimension {dim} of a block of shape {self.shape} whole, "
                f"but its placements are {self.placements}; shard the other dimension."
            )

    @property
    def vector(self) -> bool:
        """Whether the block has fewer than two dimensions."""
        return len(self.shape) < 2

    @property
    def short_side(self) -> int:
        """The smaller of m and n."""
        return min(self.matrix[-2:])


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _matrix(shape: tuple[int, ...], flatten: bool = False) -> tuple[int, ...]:
    if len(shape) < 2:
        return (1, math.prod(shape))
    if len(shape) <= 3 and not (flatten and len(shape) == 3):
        return shape
    return (shape[0], math.prod(shape[1:]))


def _check(param: Any, slot: Slot | None, *, flattened: bool) -> None:
    """Refuse placements under which a block's rows and columns do not stay whole."""
    placements = param.placements
    dims = [placement.dim for placement in placements if type(placement) is Shard]
    plain = all(type(placement) in (Shard, Replicate) for placement in placements)
    torn = flattened and any(dim != 0 for dim in dims)
    fused = slot is not None and slot.dim in dims
    if not plain or len(dims) != len(set(dims)) or torn or fused:
        what = "in the dimension that its fused blocks share" if fused else "in this way"
        raise NotImplementedError(
            f"A parameter of shape {tuple(param.shape)} is sharded {what}: placements {tuple(placements)}. "
            "Supported: Replicate and one Shard per dimension, on dimension 0 for weights of more than three "
            "dimensions, and not across the blocks of a fused weight."
        )
