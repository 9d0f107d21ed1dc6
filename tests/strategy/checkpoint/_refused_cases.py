"""Cases of saving that fails and of checkpoints that are refused: all ranks raise, nothing changes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from lightning_memopt.sharding.tensors import local_tensor
from lightning_memopt.strategy.checkpoint import load_directory
from lightning_memopt.strategy.files import same_save
from lightning_memopt.strategy.files.checksums import ChecksummedStream
from lightning_memopt.strategy.files.opened_directory import OpenedDirectory
from lightning_memopt.strategy.files.same_save import open_together
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
    raises,
    save,
    shard,
    step,
    towers,
    unchanged,
    whole_params,
)
from tests.strategy.files._faults import PLACES, Hostile, sums_renewed


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
            "Training can resume only with the model",
            "applies to `validate`, `test` and `predict`",
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

        with unchanged(model, adamw(model)), raises(ValueError, "the states of 1 optimizers", "there are 2"):
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
    for make in (adamw, lean) if world.mine else ():
        model, optimizer = after_a_step(make, world)
        other, twin = after_a_step(make, world, seed=1)
        squares = next(
            part
            for entries in optimizer.state.values()
            for key, entry in entries.items()
            if key in ("exp_avg_sq", "factored_row") and (part := local_tensor(entry)).numel()
        )
        sound = squares.clone()
        for victim, value in ((0, -1.0), (2, torch.nan)):
            squares.copy_(sound)
            if dist.get_rank() == victim:
                squares.view(-1)[0] = value
            has = "contains NaN" if value != value else "contains negative elements (-1), but is an average of squares"
            for format in FORMATS:
                path = folder / f"{make.__name__}-{victim}-{format}"
                save(path, model, optimizer, format=format, world=world)
                with unchanged(other, twin), raises(ValueError, "The saved optimizer state", has, "the run diverged"):
                    load(path, other, twin, world=world)


@case
def what_one_rank_cannot_read(ranks: dict[int, World], folder: Path) -> None:
    """As where another save removes it: the other ranks, which can read it, raise the error instead of waiting."""
    world = ranks[2]
    if not world.mine:
        return
    model, optimizer = after_a_step(adamw, world)
    save(folder / "saved", model, optimizer, format="directory", world=world)
    for owner, name in ((OpenedDirectory, "whole"), (load_directory, "read_objects"), (OpenedDirectory, "tensor")):
        failing: Any = mock.patch.object(owner, name, side_effect=ValueError("gone"))
        with (
            failing if dist.get_rank() else contextlib.nullcontext(),
            unchanged(model, optimizer),
            raises(ValueError, "gone"),
        ):
            load(folder / "saved", model, optimizer, world=world)


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

    texts = "last.ckpt' failed", "No space left on device", "existing checkpoint of this name is unchanged"
    for victim, (place, name) in itertools.product(
        (0, 2), ((FileSystemWriter, "write_data"), (ChecksummedStream, "write"))
    ):
        patched = mock.patch.object(place, name, full) if rank == victim else contextlib.nullcontext()
        with patched, raises(OSError, *texts):
            save(path, model, optimizer, format="directory", world=ranks[4], global_step=2)
        dist.barrier()
        assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"]
        dist.barrier()
    patched = mock.patch.object(torch, "save", full) if rank == 0 else contextlib.nullcontext()
    with patched, raises(OSError, *texts):
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
    (hostile(".metadata, all of it"), ".metadata", "contains `os.system`"),
    (hostile("a hyperparameter"), ".distcp", "contains `os.system`"),
    (lambda path, later: (path / ".metadata").unlink(), ".metadata", "is missing"),
    (lambda path, later: (path / "meta.pt").unlink(), "meta.pt", "is missing"),
    (lambda path, later: (path / "__1_0.distcp").unlink(), "__1_0.distcp", "is missing"),
    (cut_off("__0_0.distcp"), "__0_0.distcp", "truncated"),
    (cut_off("__1_0.distcp", 0), "__1_0.distcp", "truncated"),
    (cut_off(".metadata"), ".metadata", "truncated"),
    (cut_off("meta.pt"), "meta.pt", "is truncated or damaged"),
    (cut_off("meta.pt", 0), "meta.pt", "is not a checkpoint"),
    (replaced("__1_0.distcp"), "__1_0.distcp", "does not match its checksum"),
    (replaced("__0_0.distcp", "__1_0.distcp", ".metadata"), ".metadata", "does not match its checksum"),
    (replaced("meta.pt"), ".metadata", "from another"),
    (flipped, "__1_0.distcp", "does not match its checksum"),
    (lambda path, later: shutil.copy(path / "__0_0.distcp", path / "__2_0.distcp"), "__2_0.distcp", "mixes files"),
    (of_another_tool, "__1_0.distcp", "truncated"),
    (from_more_ranks, "__2_0.distcp", "'.metadata' does not list it"),
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
