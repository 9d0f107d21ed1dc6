"""Blocks whose rows and columns are both sharded: what each kind asks of which mesh dimension, and how often in all.

One process is rank 0 of a process group whose other ranks do not exist, so sums are wrong and only counts are checked.
`tests/optim/test_world_sizes.py` checks weights on real ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import lightning_memopt as lm
from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.sharding import collectives
from tests.kinds.contract.cases import gradient

TALL, WIDE = (20, 12), (12, 20)
ROWS_FIRST, COLUMNS_FIRST = (Shard(0), Shard(1)), (Shard(1), Shard(0))
BOTH = [(shape, placements) for shape in (TALL, WIDE) for placements in (ROWS_FIRST, COLUMNS_FIRST)]
FSDP_ALONE = [(shape, (Shard(dim), Replicate())) for shape in (TALL, WIDE) for dim in (0, 1)]
MOMENTUM: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"rank": 2}],
    "subspace": [{"rank": 2, "gap": 2, "handover": "rotate"}, {"rank": 2, "gap": 1, "projection": "random"}],
    "galore": [{"rank": 2, "gap": 2, "projection": "power"}],
    "fira": [{"rank": 2, "gap": 2, "projection": "power"}],
    "apollo": [{"rank": 2, "gap": 2}, {"rank": 2, "scaling": "tensor"}],
}
KINDS = [
    {"momentum": momentum, "second_moment": second_moment, **options}
    for momentum in MOMENTA.names()
    for second_moment in SECOND_MOMENTS.names()
    for options in MOMENTUM.get(momentum, [{}])
    if second_moment == "none" or not MOMENTA.get(momentum).averages_squares
]
# A norm of the direction follows the momentum, all others run beside it.
BESIDE = [kinds for kinds in KINDS if not SECOND_MOMENTS.get(kinds["second_moment"]).of_direction]


class Recorder:
    """Records the collectives of a step by mesh dimension and dtype; a gather sends bytes."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.seen: list[str] = []
        self._names = {mesh.get_group(name): name for name in ("fsdp", "tp")}

    def all_reduce(self, flat, op=None, group=None):
        if group in self._names:  # the gradient check asks all ranks
            self.seen.append(f"{self._names[group]} {8 * flat.element_size()}")

    def all_gather(self, output, piece, group=None):
        self.seen.append(f"{self._names[group]} gather")
        output.view(-1, piece.numel()).copy_(piece)


@pytest.fixture
def mesh() -> DeviceMesh:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))


@pytest.fixture
def recorder(mesh, monkeypatch) -> Recorder:
    recorder = Recorder(mesh)
    monkeypatch.setattr(dist, "all_reduce", recorder.all_reduce)
    monkeypatch.setattr(collectives, "_all_gather", recorder.all_gather)
    return recorder


def steps(
    mesh: DeviceMesh, recorder: Recorder, kinds: Iterable[Any], places: Iterable[Any], dtype: torch.dtype
) -> list[list[str]]:
    """Return the collectives of two steps of one optimizer, with a block of all kinds in all places."""
    params, changes = {}, {}
    for number, (change, (shape, placements)) in enumerate((change, place) for change in kinds for place in places):
        name = f"layers.{number}.mlp.up_proj.weight"
        value = distribute_tensor(gradient(shape, number, dtype), mesh, placements, src_data_rank=None)
        params[name], changes[name] = nn.Parameter(value), change
        params[name].grad = value.detach().clone()
    optimizer = lm.MemOpt(params.items(), "adamw", overrides=changes, lr=1e-3)
    found = []
    for _ in range(2):
        recorder.seen = []
        optimizer.step()
        found.append(recorder.seen)
    return found


ASKED = {
    ("low_rank", "none"): ["tp 64", "tp 32", "fsdp 64", "fsdp 32"],
    ("none", "factored"): ["tp 32", "fsdp 64", "fsdp 32"],
    ("low_rank", "factored"): ["tp 64", "tp 32", "fsdp 64", "fsdp 32"],
    ("subspace", "none"): ["tp 32", "fsdp 64", "fsdp 32", "tp 64", "tp 32"],
    ("subspace", "subset_norm"): ["tp 32", "fsdp 64", "fsdp 32", "tp 64", "tp 32"],
    ("none", "blockwise"): ["tp 32"],
    ("none", "subset_norm"): ["tp 32"],
    ("dense", "dense"): [],
    ("galore", "none"): ["tp 32", "fsdp 64", "fsdp 32", "tp 64", "tp 32"],
    ("fira", "none"): ["tp 32", "fsdp 64", "fsdp 32", "tp 64", "tp 32", "fsdp 64"],
    ("apollo", "none"): ["tp 32", "fsdp 64"],
}


@pytest.mark.parametrize(("momentum", "second_moment"), ASKED)
def test_what_a_kind_asks(mesh, recorder, momentum, second_moment):
    """The rows of a tall block are sharded by FSDP, its columns by tensor parallelism. Its subspace is new."""
    wanted = {"rank": 2, "gap": 1, "projection": "power"}
    options = {key: value for key, value in wanted.items() if key in MOMENTA.get(momentum).options()}
    change = {"momentum": momentum, "second_moment": second_moment, **options}
    for found in steps(mesh, recorder, [change], [(TALL, ROWS_FIRST)], torch.float32):
        assert found == ASKED[momentum, second_moment]


@pytest.mark.parametrize(
    ("places", "dtype", "limit"),
    [
        (BOTH, torch.float32, 4),
        (BOTH, torch.float64, 5),  # all sums are float64, so two turns in four are empty
        (BOTH + FSDP_ALONE, torch.float32, 5),
        (BOTH + FSDP_ALONE, torch.float64, 5),
    ],
)
def test_all_kinds_together(mesh, recorder, places, dtype, limit):
    """At most five collectives per mesh dimension, with the gather of blocks that FSDP alone shards.

    Fira's limiter asks for a norm after all that a new subspace asks. Without it there are four.
    """
    for found in steps(mesh, recorder, BESIDE, places, dtype):
        assert max(Counter(entry.split()[0] for entry in found).values()) <= limit, found


def test_a_norm_of_the_direction_adds_two_collectives_at_most(mesh, recorder):
    for found in steps(mesh, recorder, KINDS, BOTH, torch.float32):
        assert max(Counter(entry.split()[0] for entry in found).values()) <= 6, found


@pytest.mark.parametrize("change", KINDS, ids=lambda change: "-".join(map(str, change.values())))
def test_each_kind_alone_takes_no_more(mesh, recorder, change):
    limit = 4 if change in BESIDE else 6
    for found in steps(mesh, recorder, [change], BOTH, torch.float32):
        assert max([0, *Counter(entry.split()[0] for entry in found).values()]) <= limit, found
        assert not any("gather" in entry for entry in found)
