"""Cases of what a checkpoint holds: tied weights, buffers, extra state, statistics."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_memopt.strategy.checkpoint.save import optimizer_state
from tests._compare import assert_equal
from tests.strategy.checkpoint._checkpoints import (
    FAMILIES,
    FORMATS,
    World,
    adamw,
    case,
    grouped,
    lean,
    load,
    local_params,
    same_content,
    save,
    shard,
    step,
    towers,
    whole_params,
)


class Special(nn.Module):
    """A tied weight, a frozen one, a buffer, extra state, and a parameter that no FSDP group holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.randn(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.note = "fresh"

    def forward(self) -> None: ...

    def get_extra_state(self) -> str:
        return self.note

    def set_extra_state(self, state: str) -> None:
        self.note = state


def special(world: World, seed: int) -> Special:
    torch.manual_seed(seed)
    model = Special()
    fully_shard(model.frozen, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh, ignored_params={model.scale})
    return model


@case
def tied_frozen_and_direct_parameters(ranks: dict[int, World], folder: Path) -> None:
    world = ranks[3]
    for format, make in itertools.product(FORMATS, (adamw, lean)) if world.mine else ():
        model = special(world, 0)
        optimizer = make(model)
        step(model, optimizer, 0)
        model.count += 7
        model.note = "trained"
        save(folder / format, model, optimizer, format=format, world=world)
        other = special(world, 1)
        twin = make(other)
        load(folder / format, other, twin, world=world)
        assert (int(other.count), other.note) == (7, "trained")
        for trained, name in ((model, "uninterrupted"), (other, "resumed")):
            step(trained, optimizer if trained is model else twin, 1)
            trained.note = name
        assert_equal(local_params(other), local_params(model))
        assert other.lm_head.weight is other.embed_tokens.weight


@case
def after_a_forward_pass_alone(ranks: dict[int, World], folder: Path) -> None:
    """FSDP then still has whole parameters in the place of the sharded ones, which the optimizer knows."""
    for format in FORMATS if ranks[2].mine else ():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(model[0], mesh=ranks[2].mesh)
        fully_shard(model, mesh=ranks[2].mesh)
        optimizer = lean(model)
        step(model, optimizer, 0)
        with torch.no_grad():
            model(torch.randn(2, 4))
        states = [optimizer_state(optimizer, model, whole=format == "file", group=ranks[2].group)]
        assert states[0] or dist.get_rank() > 0
        save(folder / format, model, optimizer, format=format, world=ranks[2])
        before = whole_params(model)
        with torch.no_grad():
            model(torch.randn(2, 4))
        load(folder / format, model, optimizer, world=ranks[2])
        assert_equal(whole_params(model), before)


class Noted(nn.Module):
    """Extra state of several parts, which every rank has of its own."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.note: dict[str, Any] = {"rank": value, "parts": [value, {"sum": torch.full((2,), value)}]}

    def get_extra_state(self) -> dict[str, Any]:
        return self.note

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.note = state


class Normed(nn.Module):
    """Batch norms of several sizes, whose statistics every rank has of its own, and a parameter that is not sharded."""

    def __init__(self, world: World, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), value))
        self.norms = nn.Sequential(*(nn.BatchNorm1d(size) for size in (7, 16, 3)))
        fully_shard(self.norms, mesh=world.mesh)
        for buffer in self.norms.buffers():
            buffer.fill_(value)
        self.notes = nn.ModuleList(Noted(value) for _ in range(3))


@case
def statistics_are_those_of_the_first_rank(ranks: dict[int, World], folder: Path) -> None:
    """So is all that is not sharded; shards are divided over the ranks that have them, replicas included."""
    hybrid = World(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")), ranks[4].group)
    for label, world in {"plain": ranks[4], "hybrid": hybrid}.items():
        for format in FORMATS:
            model = Normed(world, 1.0 + dist.get_rank())
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            step(model, optimizer, 0)
            for entry in optimizer.state.values():
                entry["step"].fill_(10 + dist.get_rank())
            optimizer.state[model.scale]["exp_avg"].fill_(1.0 + dist.get_rank())
            save(folder / f"{label} {format}", model, optimizer, format=format, world=world)
            first = [model.scale.detach().clone()]
            dist.broadcast_object_list(first, src=0)
            other = Normed(world, -1.0)
            loaded = torch.optim.AdamW(other.parameters(), lr=0.01)
            load(folder / f"{label} {format}", other, loaded, world=world)
            assert all((buffer == 1).all() for buffer in other.norms.buffers())
            for noted in other.notes:
                same_content(noted.note, Noted(1.0).note)
            assert_equal(other.scale.data, first[0])
            assert_equal(loaded.state[other.scale]["exp_avg"], torch.ones(3))
            assert [float(entry["step"]) for entry in loaded.state.values()] == [10.0] * 7
    sizes = [(folder / "hybrid directory" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert min(sizes) > 0, sizes


@case
def every_file_is_read_without_trust(ranks: dict[int, World], folder: Path) -> None:
    model = shard(towers(*FAMILIES), ranks[4])
    optimizer = grouped(model)
    for format in FORMATS:
        save(folder / format, model, optimizer, format=format, world=ranks[4], callbacks={"a": {"b": torch.ones(2)}})
    assert_equal(torch.load(folder / "file", weights_only=True)["callbacks"], {"a": {"b": torch.ones(2)}})
    assert_equal(
        torch.load(folder / "directory" / "meta.pt", weights_only=True)["callbacks"], {"a": {"b": torch.ones(2)}}
    )
