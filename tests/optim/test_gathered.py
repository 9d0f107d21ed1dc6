"""Equal blocks that ranks gather, because a kind cannot work on a part of them."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import lightning_memopt as lm
from tests.kinds.contract.cases import gradient


@pytest.fixture
def mesh():
    """Two ranks, of which this is the first one; what it receives is not from the other one."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


CHANGES = [
    {"momentum": "dense", "second_moment": "blockwise", "outputs_per_number": 2},
    {"momentum": "subspace", "rank": 2, "projection": "svd", "second_moment": "dense"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_elementwise_state_is_cut_in_its_own_shape(mesh, changes, count):
    """That of a convolution is stored with four dimensions, of which the longest is cut. Kinds see a matrix."""
    shape = (8, 32, 3, 3)

    def placed(seed):
        return distribute_tensor(gradient(shape, seed), mesh, [Shard(0)], src_data_rank=None)

    params = {f"conv{place}.weight": nn.Parameter(placed(place)) for place in range(count)}
    for place, param in enumerate(params.values()):
        param.grad = placed(10 + place)
    optimizer = lm.MemOpt(params.items(), "adamw", lr=1e-2, overrides={"*": changes})
    assert all(block.work.gathered for *_, block in optimizer.blocks())
    optimizer.step()
    key = "exp_avg" if changes["momentum"] == "dense" else "exp_avg_sq"
    for param in params.values():
        state = optimizer.state[param][key].to_local()
        assert state.shape == (8, 16, 3, 3)
        assert state.ne(0).any()
