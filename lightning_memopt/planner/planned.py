"""Sharded parameters of one rank of a larger job, on the meta device and without a process group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.sharding.tensors import local_part


class PlannedGroup:
    """A stand-in for a ``ProcessGroup``, with the methods that ``torch.distributed`` calls. It sends nothing."""

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> None:
        """Leave the tensors as they are."""

    def all_gather_single(self, output: Tensor, piece: Tensor, options: Any) -> None:
        """Leave the output as it is."""

    def _allgather_base(self, output: Tensor, piece: Tensor, options: Any) -> None:
        self.all_gather_single(output, piece, options)  # before torch 2.13


@dataclass(frozen=True)
class PlannedMesh:
    """A stand-in for a one-dimensional ``DeviceMesh``, with the methods that DTensor and the optimizer call.

    Attributes:
        ranks: Number of ranks.
        rank: The rank that it represents.
        group: The process group.
    """

    ranks: int
    rank: int = 0
    group: PlannedGroup = PlannedGroup()
    device_type: str = "meta"
    ndim: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return (self.ranks,)

    def size(self, mesh_dim: int | None = None) -> int:
        """Return the number of ranks."""
        return self.ranks

    def get_group(self, mesh_dim: int | None = None) -> PlannedGroup:
        """Return the group of all ranks."""
        return self.group

    def get_local_rank(self, mesh_dim: int | None = None) -> int:
        """Return the rank."""
        return self.rank

    def get_coordinate(self) -> list[int]:
        """Return the coordinates of the rank in the mesh."""
        return [self.rank]

    # DTensor calls the same methods by these names.

    def _is_current_rank_part_of_mesh(self) -> bool:
        return True

    def _sym_get_coordinate(self, index: int) -> int:
        return self.rank


def whole_parameter(param: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter of the same shape on the meta device."""
    return nn.Parameter(torch.empty(param.shape, dtype=dtype, device="meta"), requires_grad=param.requires_grad)


def sharded_parameter(param: Tensor, dtype: torch.dtype, *, dim: int, mesh: PlannedMesh) -> nn.Parameter:
    """Return a DTensor parameter of the same shape on the meta device, with the local part of the mesh's rank."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    placements = (Shard(dim),)
    mine, _ = local_part(param.shape, mesh, placements)
    whole = torch.empty(param.shape, dtype=dtype, device="meta")
    meta = TensorMeta(whole.shape, whole.stride(), dtype)
    spec = DTensorSpec(mesh, placements, tensor_meta=meta)  # type: ignore[arg-type]
    local = torch.empty(mine, dtype=dtype, device="meta")
    return nn.Parameter(DTensor(local, spec, requires_grad=False), requires_grad=param.requires_grad)


def outline(
    module: nn.Module,
    make: Callable[[nn.Parameter], nn.Parameter],
    buffers: Callable[[Tensor], Tensor] | None = None,
) -> nn.Module:
    """Return a copy of a module's structure with new parameters, and with new buffers or none.

    Args:
        module: Any module. It does not change, its attributes are shared except hooks, and its values are not read.
        make: Returns the new parameter for an old one. It is called once per parameter, so tied weights stay tied.
        buffers: Returns the new buffer for an old one; None for no buffers.
    """
    modules: dict[nn.Module, nn.Module] = {}
    params: dict[Tensor, nn.Parameter] = {}

    def twin(param: nn.Parameter) -> nn.Parameter:
        if param not in params:
            params[param] = make(param)
        return params[param]

    def copy(old: nn.Module) -> nn.Module:
        if old not in modules:
            new = modules[old] = object.__new__(type(old))
            own = {key: None if param is None else twin(param) for key, param in old._parameters.items()}
            named = old._buffers.items() if buffers is not None else ()
            held = {key: None if buffer is None else buffers(buffer) for key, buffer in named}  # type: ignore[misc]
            inner = {key: None if child is None else copy(child) for key, child in old._modules.items()}
            # Bypass nn.Module.__setattr__, and the allocations of __init__.
            attributes = vars(old).items()
            shared = {key: OrderedDict(each) if isinstance(each, OrderedDict) else each for key, each in attributes}
            vars(new).update({**shared, "_parameters": own, "_buffers": held, "_modules": inner})
        return modules[old]

    return copy(module)
