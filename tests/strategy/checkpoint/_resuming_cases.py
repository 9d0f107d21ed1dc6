"""Cases of saving in one world and resuming in another."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_memopt import AdaPMLean, ResumeWarning
from tests._compare import assert_equal
from tests.strategy.checkpoint._checkpoints import (
    FORMATS,
    World,
    adamw,
    after_a_step,
    case,
    difference,
    lean,
    load,
    local_params,
    local_state,
    momentum,
    raises,
    save,
    sgd,
    shard,
    step,
    towers,
    unchanged,
    whole_params,
    whole_state,
)


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
def extra_bits_of_weights(ranks: dict[int, World], folder: Path) -> None:
    """All bits are back at another number of ranks, on which the next step is the same; fewer come with a warning."""
    expected: list[Any] = [None]
    first, second = ranks[3], ranks[2]
    if first.mine:
        model = shard(towers("net").bfloat16(), first)
        optimizer = lean(model, master_weight_bits=24)
        for number in range(2):
            step(model, optimizer, number)
        for format in FORMATS:
            save(folder / format, model, optimizer, format=format, world=first)
        before = {name: value.full_tensor() for name, value in optimizer.full_weights().items()}
        step(model, optimizer, 2)
        expected = [(before, {name: value.full_tensor() for name, value in optimizer.full_weights().items()})]
    dist.broadcast_object_list(expected, src=0)
    for format in FORMATS if second.mine else ():
        model = shard(towers("net", seed=1).bfloat16(), second)
        optimizer = lean(model, master_weight_bits=24)
        load(folder / format, model, optimizer, world=second)
        assert_equal({name: value.full_tensor() for name, value in optimizer.full_weights().items()}, expected[0][0])
        step(model, optimizer, 2)
        for name, value in optimizer.full_weights().items():
            torch.testing.assert_close(value.full_tensor(), expected[0][1][name], rtol=2**-14, atol=1e-6)
        plain = lean(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(folder / format, model, plain, world=second)
        told = [str(each.message) for each in caught if "master_weight_bits=24" in str(each.message)]
        assert len(told) == (dist.get_rank() == 0)
        assert not any("low_bits" in state for state in plain.state.values())


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
        assert_equal(local_params(other), local_params(model))
        for optimizer, twin in zip(optimizers, others, strict=True):
            assert_equal(local_state(twin), local_state(optimizer))
        assert [group["weight_decay"] for group in others[0].param_groups] == [0.0, 0.1]


@case
def hybrid_sharding(ranks: dict[int, World], folder: Path) -> None:
    """Two replicas of two shards, to three ranks and back."""
    hybrid = World(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")), ranks[4].group)
    there_and_back(lean, hybrid, hybrid, folder / "same", steps=2)
    there_and_back(lean, hybrid, ranks[3], folder / "to three", steps=2)
    there_and_back(lean, ranks[3], hybrid, folder / "from three", steps=2)


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
        expected: list[Any] = [None]
        if ranks[2].mine:
            model = shard(towers("net").to(dtype), ranks[2])
            optimizer = make(model, **options)
            step(model, optimizer, 0)
            for format in FORMATS:
                save(folder / f"{number}-{format}", model, optimizer, format=format, world=ranks[2])
            expected = [(whole_params(model), whole_state(optimizer))]
        dist.broadcast_object_list(expected, src=0)
        for format, size in itertools.product(FORMATS, (2, 3)):
            if ranks[size].mine:
                model = shard(towers("net", seed=1).to(dtype), ranks[size])
                optimizer = make(model, **options)
                load(folder / f"{number}-{format}", model, optimizer, world=ranks[size])
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
        assert_equal(local_state(twin), local_state(optimizer))


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


@case
def weights_alone(ranks: dict[int, World], folder: Path) -> None:
    """Validation needs no optimizers; training needs their states."""
    for format in FORMATS if ranks[2].mine else ():
        model = shard(towers("net"), ranks[2])
        optimizer = lean(model)
        save(folder / format, model, optimizer, format=format, world=ranks[2], epoch=3)
        other = shard(towers("net", seed=1), ranks[2])
        assert load(folder / format, other, world=ranks[2]) == {"epoch": 3}
        assert_equal(local_params(other), local_params(model))
        save(folder / format, model, format=format, world=ranks[2])
        with unchanged(other, optimizer), raises(KeyError, "checkpoint contains only the model", "save_weights_only"):
            load(folder / format, other, optimizer, world=ranks[2])
