"""Parameters as a rank of a larger job would hold them, on the meta device and without a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PlannedMesh:
    """What DTensor and the optimizer ask a one-dimensional ``DeviceMesh`` for, answered for one rank of many.

    It has no process group: nothing that is planned communicates.

    Attributes:
        ranks: Number of ranks.
        rank: The one to answer for.
    """

    ranks: int
    rank: int = 0
    device_type: str = "meta"
    ndim: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return (self.ranks,)

    def size(self, mesh_dim: int | None = None) -> int:
        """Return the number of ranks."""
        return self.ranks

    def get_coordinate(self) -> list[int]:
        """Return where the rank is in the mesh."""
        return [self.rank]

    # Under these names DTensor asks for the same.

    def _is_current_rank_part_of_mesh(self) -> bool:
        return True

    def _sym_get_coordinate(self, index: int) -> int:
        return self.rank


def whole_parameter(param: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter of the same shape on the meta device."""
    return nn.Parameter(torch.empty(param.shape, dtype=dtype, device="meta"), requires_grad=param.requires_grad)


def sharded_parameter(param: Tensor, dtype: torch.dtype, *, dim: int, mesh: PlannedMesh) -> nn.Parameter:
    """Return a parameter of the same shape on the meta device, as a DTensor of which the mesh's rank holds its part."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = (Shard(dim),)
    mine, _ = compute_local_shape_and_global_offset(param.shape, mesh, placements)  # type: ignore[arg-type]
    whole = torch.empty(param.shape, dtype=dtype, device="meta")
    meta = TensorMeta(whole.shape, whole.stride(), dtype)
    spec = DTensorSpec(mesh, placements, tensor_meta=meta)  # type: ignore[arg-type]
    local = torch.empty(mine, dtype=dtype, device="meta")
    return nn.Parameter(DTensor(local, spec, requires_grad=False), requires_grad=param.requires_grad)


def outline(module: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """Return a module of the same structure with other parameters and without buffers; the module itself stays.

    Args:
        module: Any module. Its attributes are shared, its values not even looked at.
        make: Returns the parameter that stands for an old one. It is asked once for each, so that sharing survives.
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
            inner = {key: None if child is None else copy(child) for key, child in old._modules.items()}
            # Around nn.Module.__setattr__, and around whatever __init__ would allocate.
            vars(new).update({**vars(old), "_parameters": own, "_buffers": {}, "_modules": inner})
        return modules[old]

    return copy(module)
