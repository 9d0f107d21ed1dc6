"""Single cases of saving and loading, which `test_checkpoints` runs on four ranks; each is a test of its own there."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies.model_parallel import _load_checkpoint as stock_load
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType, fully_shard

from lightning_memopt import AdaPMLean, MemOpt, ResumeWarning
from lightning_memopt.sharding.tensors import local_tensor
from lightning_memopt.strategy.checkpoint.save import optimizer_state
from lightning_memopt.strategy.files import same_save
from lightning_memopt.strategy.files.checksums import ChecksummedStream
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.same_save import open_together
from tests._compare import assert_equal
from tests.strategy.checkpoint._checkpoints import (
    FAMILIES,
    FORMATS,
    Case,
    World,
    difference,
    grouped,
    load,
    raises,
    save,
    shard,
    step,
    towers,
    unchanged,
    whole_params,
    whole_state,
)
from tests.strategy.files._faults import PLACES, Hostile, sums_renewed

CASES: list[Case] = []


def case(function: Case) -> Case:
    """Run this on all ranks, in a folder of its own; what it raises fails the test of its name."""
    CASES.append(function)
    return function


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def lean(model: nn.Module, **options: Any) -> AdaPMLean:
    return AdaPMLean(model.named_parameters(), lr=0.01, **options)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def momentum(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def there_and_back(make: Any, first: World, second: World, folder: Path, *, steps: int) -> None:
    """Save in one world, resume in another, in both formats; take a step and compare with going on."""
    expected: list[Any] = [None]
    if first.mine:
        model = shard(towers("net"), first)
        optimizer = make(model)
        for number in range(steps):
            step(model, optimizer, number)
        with unchanged(model, optimizer):
            for format in FORMATS:
                save(folder / format, model, optimizer, format=format, world=first)
        step(model, optimizer, steps)
        expected = [whole_params(model)]
    dist.broadcast_object_list(expected, src=0)
    for format in FORMATS if second.mine else ():
        model = shard(towers("net", seed=1), second)
        optimizer = make(model)
        assert load(folder / format, model, optimizer, world=second) == {}
        step(model, optimizer, steps)
        assert not difference(model, expected[0], exact=first is second)


@case
def optimizers_of_torch(ranks: dict[int, World], folder: Path) -> None:
    for make in (adamw, sgd, momentum):
        there_and_back(make, ranks[3], ranks[2], folder / make.__name__, steps=2)


@case
def before_the_first_step(ranks: dict[int, World], folder: Path) -> None:
    """No step is taken to find out what the state looks like: it would count, and draw projections."""
    for make in (adamw, lean):
        there_and_back(make, ranks[2], ranks[2], folder / make.__name__, steps=0)


@case
def kinds_that_changed(ranks: dict[int, World], folder: Path) -> None:
    """Saved right after a change of kinds, and a step later; an optimizer built with the defaults goes on."""
    layer = "net.layers.0"
    for first, second in ((ranks[3], ranks[2]), (ranks[2], ranks[2])):
        expected: dict[int, Any] = {}
        if first.mine:
            model = shard(towers("net"), first)
            optimizer = lean(model)
            optimizer.reformat({f"{layer}.mlp.up_proj.weight": {"momentum": "none"}})
            for number in (0, 1):
                step(model, optimizer, number)
            optimizer.reformat(
                {
                    f"{layer}.mlp.up_proj.weight": {"momentum": "low_rank", "rank": 2},
                    f"{layer}.self_attn.q_proj.weight": {"momentum": "subspace", "rank": 3},
                    "net.embed_tokens.weight": {"momentum": "dense", "second_moment": "subset_norm"},
                }
            )
            for number in (2, 3):
                for format in FORMATS:
                    save(folder / f"{first.size}-{format}-{number}", model, optimizer, format=format, world=first)
                step(model, optimizer, number)
                expected[number] = whole_params(model)
        box = [expected]
        dist.broadcast_object_list(box, src=0)
        for format, number in itertools.product(FORMATS, (2, 3)) if second.mine else ():
            model = shard(towers("net", seed=1), second)
            optimizer = lean(model)
            load(folder / f"{first.size}-{format}-{number}", model, optimizer, world=second)
            kinds = [block.momentum for block in optimizer.snapshot().blocks]
            assert kinds == ["dense", "subspace", "low_rank", "dense"]
            step(model, optimizer, number)
            assert not difference(model, box[0][number], exact=first is second)


@case
def several_optimizers_and_groups(ranks: dict[int, World], folder: Path) -> None:
    """Each optimizer gets its own state, though the model lists parameters in another order than the groups do."""

    def build(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = shard(towers("a", "b", seed=seed), ranks[2])
        vectors = [param for param in model["a"].parameters() if param.ndim == 1]
        matrices = [param for param in model["a"].parameters() if param.ndim > 1]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices[::-1], "weight_decay": 0.1 + seed}]
        return model, [torch.optim.AdamW(groups, lr=0.01), lean(model["b"])]

    for format in FORMATS if ranks[2].mine else ():
        model, optimizers = build(0)
        for optimizer in optimizers:
            step(model, optimizer, 0)
        save(folder / format, model, *optimizers, format=format, world=ranks[2])
        other, others = build(1)
        load(folder / format, other, *others, world=ranks[2])
        assert_equal(whole_params(other), whole_params(model))
        for optimizer, twin in zip(optimizers, others, strict=True):
            assert_equal(whole_state(twin), whole_state(optimizer))
        assert [group["weight_decay"] for group in others[0].param_groups] == [0.0, 0.1]


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
        assert_equal(whole_params(other), whole_params(model))
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


@case
def dtypes(ranks: dict[int, World], folder: Path) -> None:
    """Neither weights nor state change their dtype: float64, bfloat16 with state in float32, and state in bfloat16."""
    kinds: list[tuple[torch.dtype, Any, dict[str, Any]]] = [
        (torch.float64, lean, {}),
        (torch.bfloat16, lean, {}),
        (torch.float32, lean, {"state_dtype": "bfloat16"}),
        (torch.bfloat16, adamw, {}),
    ]
    for number, (dtype, make, options) in enumerate(kinds):
        for format, sizes in itertools.product(FORMATS, ((2, 2), (2, 3))):
            first, second = (ranks[size] for size in sizes)
            expected: list[Any] = [None]
            path = folder / f"{number}-{format}-{sizes[1]}"
            if first.mine:
                model = shard(towers("net").to(dtype), first)
                optimizer = make(model, **options)
                step(model, optimizer, 0)
                save(path, model, optimizer, format=format, world=first)
                expected = [(whole_params(model), whole_state(optimizer))]
            dist.broadcast_object_list(expected, src=0)
            if second.mine:
                model = shard(towers("net", seed=1).to(dtype), second)
                optimizer = make(model, **options)
                load(path, model, optimizer, world=second)
                assert_equal((whole_params(model), whole_state(optimizer)), expected[0])


@case
def state_dtype_of_the_checkpoint(ranks: dict[int, World], folder: Path) -> None:
    for format in FORMATS if ranks[2].mine else ():
        model = shard(towers("net"), ranks[2])
        optimizer = lean(model, state_dtype="bfloat16")
        step(model, optimizer, 0)
        save(folder / format, model, optimizer, format=format, world=ranks[2])
        twin = lean(model)
        load(folder / format, model, twin, world=ranks[2])
        assert_equal(whole_state(twin), whole_state(optimizer))


@case
def hybrid_sharding(ranks: dict[int, World], folder: Path) -> None:
    """Two replicas of two shards, to three ranks and back."""
    hybrid = World(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")), ranks[4].group)
    there_and_back(lean, hybrid, hybrid, folder / "same", steps=2)
    there_and_back(lean, hybrid, ranks[3], folder / "to three", steps=2)
    there_and_back(lean, ranks[3], hybrid, folder / "from three", steps=2)


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
        self.norms = nn.Sequential(*(nn.BatchNorm1d(size) for size in (7, 5, 16, 3, 9)))
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
            assert [float(entry["step"]) for entry in loaded.state.values()] == [10.0] * 11
    sizes = [(folder / "hybrid directory" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert min(sizes) > 0, sizes


def same_content(actual: Any, expected: Any) -> None:
    """Compare nested state dicts, in which not only tensors matter."""
    if isinstance(expected, Tensor):
        assert_equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            same_content(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same_content(one, other)
    else:
        assert actual == expected


@case
def a_file_and_a_single_device(ranks: dict[int, World], folder: Path) -> None:
    """The file is what one device writes, in every key, shape and dtype, and the other way round."""
    for make in (adamw, lean):
        alone = towers("net")
        optimizer = make(alone)
        for number in (0, 1):
            step(alone, optimizer, number)
        theirs = {"state_dict": alone.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        path, ours = folder / make.__name__, folder / f"{make.__name__}-sharded"
        if dist.get_rank() == 0:
            path.parent.mkdir(exist_ok=True)
            torch.save(theirs, path)
        dist.barrier()
        if ranks[3].mine:
            model = shard(towers("net", seed=1), ranks[3])
            sharded = make(model)
            load(path, model, sharded, world=ranks[3])
            save(ours, model, sharded, format="file", world=ranks[3])
        dist.barrier()
        again = torch.load(ours, weights_only=True)
        # One device knows the names only if the optimizer does.
        (names,) = again["optimizer_states"][0].pop("param_names")
        assert names == [name for name, _ in alone.named_parameters()]
        theirs["optimizer_states"][0].pop("param_names", None)
        same_content(again, theirs)
        twin = make(towers("net", seed=1))
        twin.load_state_dict(again["optimizer_states"][0])
        same_content(twin.state_dict(), optimizer.state_dict())


@case
def the_stock_strategy_reads_ours(ranks: dict[int, World], folder: Path) -> None:
    model = shard(towers("net"), ranks[4])
    optimizer = adamw(model)
    step(model, optimizer, 0)
    for format in FORMATS:
        save(folder / format, model, optimizer, format=format, world=ranks[4], global_step=1)
        other = shard(towers("net", seed=1), ranks[4])
        twin = adamw(other)
        state = {"state_dict": other, "optimizer_0": twin}
        rest = stock_load(folder / format, state, optimizer_states_from_list=True, weights_only=True)
        assert rest["global_step"] == 1
        assert_equal(whole_params(other), whole_params(model))
        assert_equal(whole_state(twin), whole_state(optimizer))


def stock_save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save as Lightning's ModelParallelStrategy does, on all ranks."""
    states = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    dcp.save({"state_dict": states[0], "optimizer_0": states[1]}, checkpoint_id=folder / "directory")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_model_state_dict(model, options=whole), get_optimizer_state_dict(model, optimizer, options=whole)
    if dist.get_rank() == 0:
        torch.save({"global_step": 1}, folder / "directory" / "meta.pt")
        by_id = FullyShardedDataParallel.rekey_optim_state_dict(states[1], OptimStateKeyType.PARAM_ID, model)
        torch.save({"state_dict": states[0], "optimizer_states": [by_id], "global_step": 1}, folder / "file")
    dist.barrier()


@case
def the_stock_strategys_are_read(ranks: dict[int, World], folder: Path) -> None:
    model = shard(towers("net"), ranks[4])
    optimizer = adamw(model)
    step(model, optimizer, 0)
    stock_save(folder, model, optimizer)
    expected = whole_params(model), whole_state(optimizer)
    for format in FORMATS if ranks[3].mine else ():
        other = shard(towers("net", seed=1), ranks[3])
        twin = adamw(other)
        assert load(folder / format, other, twin, world=ranks[3]) == {"global_step": 1}
        assert_equal((whole_params(other), whole_state(twin)), expected)


@case
def adamw_of_torch_goes_on_compressed(ranks: dict[int, World], folder: Path) -> None:
    """At any number of ranks as on a single device, which is tested elsewhere."""
    model = shard(towers("net"), ranks[4])
    optimizer = adamw(model)
    for number in (0, 1):
        step(model, optimizer, number)
    for format in FORMATS:
        save(folder / format, model, optimizer, format=format, world=ranks[4])
    alone = towers("net", seed=1)
    expected = lean(alone)
    content = torch.load(folder / "file", weights_only=True)
    alone.load_state_dict(content["state_dict"])
    expected.load_state_dict(content["optimizer_states"][0])
    step(alone, expected, 2)
    for format, size in itertools.product(FORMATS, (1, 3, 4)):
        if ranks[size].mine:
            other = shard(towers("net", seed=1), ranks[size])
            compressed = lean(other)
            load(folder / format, other, compressed, world=ranks[size])
            step(other, compressed, 2)
            assert not difference(other, whole_params(alone), exact=False)


@case
def weights_alone(ranks: dict[int, World], folder: Path) -> None:
    """Validation needs no optimizers; training needs their states."""
    for format in FORMATS if ranks[2].mine else ():
        model = shard(towers("net"), ranks[2])
        optimizer = lean(model)
        save(folder / format, model, optimizer, format=format, world=ranks[2], epoch=3)
        other = shard(towers("net", seed=1), ranks[2])
        assert load(folder / format, other, world=ranks[2]) == {"epoch": 3}
        assert_equal(whole_params(other), whole_params(model))
        save(folder / format, model, format=format, world=ranks[2])
        with unchanged(other, optimizer), raises(KeyError, "checkpoint contains only the model", "save_weights_only"):
            load(folder / format, other, optimizer, world=ranks[2])


@case
def what_does_not_fit(ranks: dict[int, World], folder: Path) -> None:
    """Refused on all ranks, with nothing changed."""
    world = ranks[3]
    for format in FORMATS if world.mine else ():
        path = folder / format
        model = shard(towers("a", "b"), world)
        save(path, model, adamw(model), format=format, world=world)
        load_here = functools.partial(load, path, world=world)

        other = shard(towers("a", "c", seed=1), world)
        missing = "missing in the checkpoint: 'c.embed_tokens.weight'", "not in the model: 'b.embed_tokens.weight'"
        with unchanged(other), raises(RuntimeError, *missing, "Nothing was loaded", "strict_loading = False"):
            load_here(other)
        texts = (
            "Training goes on only with the model",
            "helps `validate`, `test` and `predict`",
            "leave out `ckpt_path`",
        )
        with unchanged(other), raises(RuntimeError, *missing, "Nothing was loaded", *texts):
            load_here(other, adamw(other))
        load_here(other, strict=False)
        assert not difference(other["a"], {k[2:]: v for k, v in whole_params(model).items() if k[0] == "a"}, exact=True)

        wider = towers("a", "b", seed=1)
        wider["b"].embed_tokens = nn.Embedding(12, 6)
        shard(wider, world)
        text = "'b.embed_tokens.weight' has shape (11, 6) in the checkpoint and (12, 6) in the model"
        with unchanged(wider), raises(RuntimeError, text):
            load_here(wider, strict=False)

        with unchanged(model, adamw(model)), raises(ValueError, "the states of 1 optimizers", "returns 2"):
            load_here(model, adamw(model), adamw(model))
        halves = [{"params": list(model[name].parameters())} for name in "ab"]
        with unchanged(model, torch.optim.AdamW(halves)), raises(ValueError, "parameter group"):
            load_here(model, torch.optim.AdamW(halves))
        fewer = adamw(model["a"])
        with unchanged(model, fewer), raises(ValueError, "'b.embed_tokens.weight', which AdamW does not train"):
            load_here(model, fewer)
        with raises(ValueError, "does not point to a valid checkpoint: there is no file or directory"):
            load(folder / "nothing", model, world=world)


@case
def what_one_rank_finds_unsound(ranks: dict[int, World], folder: Path) -> None:
    """Every rank looks at its part, or at its share of whole tensors; all of them refuse, and nothing has changed."""
    world = ranks[3]
    cells = itertools.product(FORMATS, (adamw, lean), ((0, -1.0), (2, torch.nan)))
    for number, (format, make, (victim, value)) in enumerate(cells if world.mine else ()):
        model, optimizer = after_a_step(make, world)
        if dist.get_rank() == victim:
            squares = next(
                part
                for entries in optimizer.state.values()
                for key, entry in entries.items()
                if key in ("exp_avg_sq", "factored_row") and (part := local_tensor(entry)).numel()
            )
            squares.view(-1)[0] = value
        save(folder / str(number), model, optimizer, format=format, world=world)
        other, twin = after_a_step(make, world, seed=1)
        has = "has NaN" if value != value else "has negative elements (-1), but is an average of squares"
        with unchanged(other, twin), raises(ValueError, "The saved optimizer state", has, "the run had diverged"):
            load(folder / str(number), other, twin, world=world)


@case
def parameters_in_another_order(ranks: dict[int, World], folder: Path) -> None:
    """By name on any number of ranks, for every optimizer, own keys of groups included; said by the first rank only."""

    def reversed_(make: Any, model: nn.Module) -> torch.optim.Optimizer:
        if make is adamw:
            return torch.optim.AdamW(list(model.parameters())[::-1], lr=0.02)
        return AdaPMLean(list(model.named_parameters())[::-1], lr=0.02)

    for format, make in itertools.product(FORMATS, (adamw, lean)):
        path, expected = folder / f"{format}-{make.__name__}", [None]
        if ranks[3].mine:
            model, optimizer = after_a_step(make, ranks[3])
            optimizer.param_groups[0]["lr_scale"] = 0.5
            save(path, model, optimizer, format=format, world=ranks[3])
            step(model, optimizer, 1)
            expected = [whole_params(model)]
        dist.broadcast_object_list(expected, src=0)
        if ranks[2].mine:
            other = shard(towers("net", seed=1), ranks[2])
            twin = reversed_(make, other)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ResumeWarning)
                load(path, other, twin, world=ranks[2])
            told = [str(entry.message) for entry in caught if entry.category is ResumeWarning]
            assert len(told) == (dist.get_rank() == 0), told
            assert all("lr 0.01 instead of 0.02" in line and str(path) in line for line in told)
            assert twin.param_groups[0]["lr_scale"] == 0.5
            step(other, twin, 1)
            assert not difference(other, expected[0], exact=False)


def of_torch(kind: type[torch.optim.Optimizer], **options: Any) -> Any:
    return lambda model: kind(model.parameters(), lr=0.01, **options)


FITTING = [
    (lambda model: MemOpt(model.named_parameters(), "adamw", lr=0.01), adamw),
    (adamw, lambda model: MemOpt(model.named_parameters(), "adam_mini", lr=0.01)),
    (of_torch(torch.optim.Adam, amsgrad=True), adamw),
    (adamw, of_torch(torch.optim.RAdam)),
    (sgd, momentum),
]
FOREIGN = [
    (lean, adamw, "AdamW cannot", "saved by recipe 'adapm_lean'", "lacks 'exp_avg'"),
    (lean, sgd, "SGD cannot", "saved by recipe 'adapm_lean'", "lacks 'momentum'"),
    (lean, of_torch(torch.optim.RMSprop), "RMSprop cannot", "lacks 'alpha'"),
    (sgd, adamw, "AdamW cannot", "with the options lr, momentum, dampening", "lacks 'betas', 'eps'"),
    (sgd, lean, "AdaPMLean cannot", "with the options lr, momentum, dampening", "lacks 'betas', 'eps'"),
    (of_torch(torch.optim.Adamax), lean, "AdaPMLean cannot", "lacks 'exp_avg_sq'"),
    (adamw, of_torch(torch.optim.Adamax), "Adamax cannot", "lacks 'exp_inf'"),
    (adamw, of_torch(torch.optim.Adagrad), "Adagrad cannot", "lacks 'lr_decay'"),
]


def after_a_step(make: Any, world: World, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shard(towers("net", seed=seed), world)
    optimizer = make(model)
    step(model, optimizer, 0)
    return model, optimizer


@case
def other_kinds_of_optimizers(ranks: dict[int, World], folder: Path) -> None:
    """What can go on takes a step; what would fail in the step is refused before anything changes."""
    world = ranks[2]
    for number, (format, cell) in enumerate(itertools.product(FORMATS, (*FITTING, *FOREIGN)) if world.mine else ()):
        make, other, *texts = cell
        save(folder / str(number), *after_a_step(make, world), format=format, world=world)
        model, optimizer = after_a_step(other, world, seed=1)
        if texts:
            texts += [
                "Nothing was loaded",
                "Use the optimizer of the run that saved it",
                "under a Trainer: `ckpt_path`",
            ]
            with unchanged(model, optimizer), raises(ValueError, *texts):
                load(folder / str(number), model, optimizer, world=world)
        else:
            load(folder / str(number), model, optimizer, world=world)
        step(model, optimizer, 1)


@case
def a_disk_that_is_full_on_one_rank(ranks: dict[int, World], folder: Path) -> None:
    """All ranks raise, none hangs, and the checkpoint that was there stays."""
    path, rank = folder / "last.ckpt", dist.get_rank()
    model = shard(towers("net"), ranks[4])
    optimizer = adamw(model)
    save(path, model, optimizer, format="directory", world=ranks[4], global_step=1)
    before = whole_params(model)
    step(model, optimizer, 0)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    for victim, (place, name) in itertools.product(
        (0, 2), ((FileSystemWriter, "write_data"), (ChecksummedStream, "write"))
    ):
        patched = mock.patch.object(place, name, full) if rank == victim else contextlib.nullcontext()
        with patched, raises(OSError, "last.ckpt' failed", "No space left on device", "before is unchanged"):
            save(path, model, optimizer, format="directory", world=ranks[4], global_step=2)
        dist.barrier()
        assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"]
        dist.barrier()
    patched = mock.patch.object(torch, "save", full) if rank == 0 else contextlib.nullcontext()
    with patched, raises(OSError, "last.ckpt' failed", "No space left on device", "before is unchanged"):
        save(path, model, optimizer, format="file", world=ranks[4], global_step=2)
    assert load(path, model, optimizer, world=ranks[4]) == {"global_step": 1}
    assert_equal(whole_params(model), before)


@case
def truncated_and_mixed_directories(ranks: dict[int, World], folder: Path) -> None:
    """Whatever is damaged, all ranks refuse it before anything changes, with the name of the file."""
    world = ranks[2]
    if not world.mine:
        return
    model = shard(towers("net"), world)
    optimizer = adamw(model)
    good, later = folder / "good", folder / "later"
    for path in (good, later):
        step(model, optimizer, 0)
        save(path, model, optimizer, format="directory", world=world)
    step(model, optimizer, 1)
    for number, (damage, name, text) in enumerate(DAMAGES):
        path = folder / str(number)
        if dist.get_rank() == 0:
            shutil.copytree(good, path)
            damage(path, later)
        dist.barrier(world.group)
        with unchanged(model, optimizer), raises((ValueError, pickle.UnpicklingError), str(path), name, text):
            load(path, model, optimizer, world=world)
    assert not (folder / "was-run").exists()
    load(good, model, optimizer, world=world)


def cut_off(name: str, length: int = -1) -> Any:
    return lambda path, later: (path / name).write_bytes((path / name).read_bytes()[:length])


def replaced(*names: str) -> Any:
    return lambda path, later: [shutil.copy(later / name, path / name) for name in names]


def flipped(path: Path, later: Path) -> None:
    content = bytearray((path / "__1_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__1_0.distcp").write_bytes(content)


def of_another_tool(path: Path, later: Path) -> None:
    """Without checksums sizes must do."""
    torch.save({}, path / "meta.pt")
    cut_off("__1_0.distcp")(path, later)


def from_more_ranks(path: Path, later: Path) -> None:
    torch.save({}, path / "meta.pt")
    shutil.copy(path / "__0_0.distcp", path / "__2_0.distcp")


def hostile(place: str) -> Any:
    """A command that would make a file beside the checkpoint; sums made right again."""

    def damage(path: Path, later: Path) -> None:
        PLACES[place](path, Hostile(path.with_name("was-run")))
        sums_renewed(path, drop=False)

    return damage


DAMAGES: list[tuple[Any, str, str]] = [
    (hostile(".metadata, all of it"), ".metadata", "asks for `os.system`"),
    (hostile("a hyperparameter"), ".distcp", "asks for `os.system`"),
    (lambda path, later: (path / ".metadata").unlink(), ".metadata", "is missing"),
    (lambda path, later: (path / "meta.pt").unlink(), "meta.pt", "is missing"),
    (lambda path, later: (path / "__1_0.distcp").unlink(), "__1_0.distcp", "is missing"),
    (cut_off("__0_0.distcp"), "__0_0.distcp", "truncated"),
    (cut_off("__1_0.distcp", 0), "__1_0.distcp", "truncated"),
    (cut_off(".metadata"), ".metadata", "truncated"),
    (cut_off("meta.pt"), "meta.pt", "is truncated or damaged"),
    (cut_off("meta.pt", 0), "meta.pt", "is no checkpoint"),
    (replaced("__1_0.distcp"), "__1_0.distcp", "does not match its checksum"),
    (replaced("__0_0.distcp", "__1_0.distcp", ".metadata"), ".metadata", "does not match its checksum"),
    (replaced("meta.pt"), ".metadata", "from another"),
    (flipped, "__1_0.distcp", "does not match its checksum"),
    (lambda path, later: shutil.copy(path / "__0_0.distcp", path / "__2_0.distcp"), "__2_0.distcp", "mixes files"),
    (of_another_tool, "__1_0.distcp", "truncated"),
    (from_more_ranks, "__2_0.distcp", "'.metadata' does not know it"),
]


@case
def ranks_that_open_different_saves(ranks: dict[int, World], folder: Path) -> None:
    """They try again until they have the same one, or say so."""
    world, rank = ranks[2], dist.get_rank()
    if not world.mine:
        return
    model = shard(towers("net"), world)
    optimizer = adamw(model)
    for seed, path in enumerate((folder / "old", folder / "new")):
        step(model, optimizer, seed)
        save(path, model, optimizer, format="directory", world=world, global_step=seed)
    tries = 0

    def open_(settles: bool) -> OpenedDirectory:
        nonlocal tries
        tries += 1
        return OpenedDirectory(folder / ("old" if rank and not (settles and tries > 3) else "new"))

    opened = open_together(folder / "new", lambda: open_(True), world.group)
    assert (opened.rest, tries) == ({"global_step": 1}, 4)
    opened.close()
    patched = mock.patch.object(same_save, "_PAUSE", 0.0)
    with patched, raises(ValueError, "The ranks found different checkpoints under", "is not on a file system that all"):
        open_together(folder / "new", lambda: open_(False), world.group)


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
