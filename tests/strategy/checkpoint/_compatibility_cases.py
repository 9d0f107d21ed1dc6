"""Cases of checkpoints that others write or read: one device, the stock strategy, other optimizers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies.model_parallel import _load_checkpoint as stock_load
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from lightning_memopt import MemOpt
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
    same_content,
    save,
    sgd,
    shard,
    step,
    towers,
    unchanged,
    whole_params,
    whole_state,
)


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
        assert_equal(local_params(other), local_params(model))
        assert_equal(local_state(twin), local_state(optimizer))


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


@case
def other_kinds_of_optimizers(ranks: dict[int, World], folder: Path) -> None:
    """What can go on takes a step; what would fail in the step is refused before anything changes."""
    world, saved = ranks[2], dict[Any, Path]()
    for format, cell in itertools.product(FORMATS, (*FITTING, *FOREIGN)) if world.mine else ():
        make, other, *texts = cell
        if (format, make) not in saved:
            saved[format, make] = folder / str(len(saved))
            save(saved[format, make], *after_a_step(make, world), format=format, world=world)
        path = saved[format, make]
        model, optimizer = after_a_step(other, world, seed=1)
        if texts:
            texts += [
                "Nothing was loaded",
                "Use the optimizer of the run that saved it",
                "with a Trainer, without `ckpt_path`",
            ]
            with unchanged(model, optimizer), raises(ValueError, *texts):
                load(path, model, optimizer, world=world)
        else:
            load(path, model, optimizer, world=world)
        step(model, optimizer, 1)
