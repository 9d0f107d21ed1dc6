import itertools

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_memopt.planner.planned import PlannedMesh
from lightning_memopt.sharding.tensors import local_part


def test_parts_are_those_of_torch_for_every_rank_of_every_mesh():
    shapes, placements = [(7, 5), (1, 4), (0, 3), (8, 8)], [Shard(0), Shard(1), Replicate()]
    meshes = [PlannedMesh(ranks, rank) for ranks in (1, 3, 4) for rank in range(ranks)]
    for _, shape, mesh, placement in itertools.product(("computed", "remembered"), shapes, meshes, placements):
        sizes, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, [placement])
        assert local_part(shape, mesh, [placement]) == (tuple(sizes), tuple(offset)), (shape, mesh, placement)
