"""A small transformer's parameters, whole or sharded over a mesh, their gradients, and checks that run on ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.kinds.contract.cases import gradient

# (name, shape, fused dimension): what transformers are made of, and what is awkward: fewer rows than ranks, one row,
# lengths that no number of ranks divides, no elements, a stack, a kernel, a fused weight whose blocks fall on different
# ranks.
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("model.embed_tokens.weight", (50, 24)),
    ("model.layers.0.self_attn.q_proj.weight", (24, 24)),
    ("model.layers.0.self_attn.k_proj.weight", (12, 24)),
    ("model.layers.0.self_attn.v_proj.weight", (12, 24)),
    ("model.layers.0.self_attn.o_proj.weight", (24, 24)),
    ("model.layers.0.mlp.gate_proj.weight", (41, 24)),
    ("model.layers.0.mlp.down_proj.weight", (24, 41)),
    ("model.layers.0.input_layernorm.weight", (24,)),
    ("model.layers.0.experts.weight", (5, 10, 18)),
    ("model.layers.1.short.weight", (2, 30)),
    ("model.layers.1.score.weight", (1, 30)),
    ("model.layers.1.bias", (3,)),
    ("model.layers.1.none.weight", (0, 30)),
    ("model.layers.1.nothing.weight", (6, 0)),
    ("conv.weight", (7, 3, 4, 4)),
    ("attention.in_proj_weight", (66, 22)),
    ("lm_head.weight", (50, 24)),
]


def weights(names: Container[str] = dict(SHAPES)) -> dict[str, Tensor]:
    shapes = enumerate(SHAPES)
    return {name: gradient(shape, number, scale=0.1) for number, (name, shape) in shapes if name in names}


def by_rows(shape: tuple[int, ...], count: int) -> int:
    return 0


def by_long_side(shape: tuple[int, ...], count: int) -> int:
    """Shard the long side where that divides evenly, as FSDP2 demands of every dimension but the first."""
    dim = max(range(len(shape)), key=lambda dim: shape[dim]) if len(shape) < 4 else 0
    return dim if shape[dim] % count == 0 else 0


def sharded(
    mesh: DeviceMesh, choose: Callable[..., int] = by_long_side, names: Container[str] = dict(SHAPES)
) -> dict[str, nn.Parameter]:
    count = mesh.size(mesh.ndim - 1)
    return {
        name: nn.Parameter(
            distribute_tensor(value, mesh, placements_for(value, mesh, choose, count), src_data_rank=None)
        )
        for name, value in weights(names).items()
    }


def placements_for(value: Tensor, mesh: DeviceMesh, choose: Callable[..., int], count: int) -> list[Any]:
    return [Replicate()] * (mesh.ndim - 1) + [Shard(choose(tuple(value.shape), count))]


def fill(params: dict[str, nn.Parameter], step: int) -> None:
    """Give all parameters the gradients of a step; at step 4 some have none, and at step 6 one is zero."""
    for number, param in enumerate(params.values()):
        if step == 4 and number % 3 == 0:
            param.grad = None
            continue
        mesh, placements = (param.device_mesh, param.placements) if isinstance(param, DTensor) else (None, None)
        param.grad = grad_of(tuple(param.shape), step, number, mesh, placements)


@functools.cache  # the same for every optimizer, and cutting one takes as long as many an update
def grad_of(shape: tuple[int, ...], step: int, number: int, mesh: DeviceMesh | None, placements: Any) -> Tensor:
    """Return a gradient that is shared: replace it, never write to it."""
    grad = gradient(shape, 100 * step + number, scale=1e-2) * (step != 6 or number != 5)
    return grad if mesh is None else distribute_tensor(grad, mesh, placements, src_data_rank=None)


def named(params: dict[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return list(params.items())


def plain() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in weights().items()}


def assert_same_wholes(
    params: dict[str, nn.Parameter], expected: dict[str, Tensor], *, tolerance: float, message: str = ""
) -> None:
    """Check weights that the last dimension of a mesh shards, by their relative error as wholes.

    Every rank looks at its pieces, and one sum over the ranks adds up the norms: gathering a weight takes longer than
    many an update.
    """
    squares = []
    for name, param in params.items():
        whole = distribute_tensor(expected[name], param.device_mesh, param.placements, src_data_rank=None).to_local()
        piece = param.detach().to_local()
        assert (piece.shape, piece.dtype) == (whole.shape, whole.dtype), f"{message} {name}: {piece.shape}"
        difference, size = (piece.double() - whole.double()).square().sum(), whole.double().square().sum()
        squares.append(torch.stack([difference, size]))
    mesh = param.device_mesh
    table = torch.stack(squares)
    dist.all_reduce(table, group=mesh.get_group(mesh.ndim - 1))
    for (name, param), (difference, size) in zip(params.items(), table.sqrt().tolist(), strict=True):
        error = difference / size if size else difference
        assert error <= tolerance, f"{message} {name} {param.placements}: {error:.1e}"


def collectives_so_far(mesh: DeviceMesh) -> int:
    """Return how many collectives the groups of a mesh, and that of all ranks, have begun.

    Counts what `tests._traffic.Traffic` counts by looking at every operation, which takes as long as a step.
    """
    groups = {*mesh.get_all_groups(), dist.group.WORLD}
    return sum(group._get_sequence_number_for_group() for group in groups)
