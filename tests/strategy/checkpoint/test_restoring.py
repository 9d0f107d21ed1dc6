"""Checkpoints that the strategy loads: names, checks of everything before the first write, finetuning; one process."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning

import lightning_memopt as lm
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_directory, save_file
from tests._compare import assert_equal
from tests._models import fill_grads

pytestmark = pytest.mark.slow

FORMATS = ("directory", "file")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def adamw(model: nn.Module, order: int = 1, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(model.parameters())[::order], lr=0.01, **options)


def lean(model: nn.Module, order: int = 1, **options) -> lm.AdaPMLean:
    return lm.AdaPMLean(list(model.named_parameters())[::order], lr=0.01, **options)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, seed: int = 0) -> None:
    fill_grads(list(model.parameters()), seed)
    for optimizer in optimizers:
        optimizer.step()


def checkpoint(model: nn.Module, *optimizers: torch.optim.Optimizer, whole: bool) -> dict[str, Any]:
    states = [optimizer_state(optimizer, model, whole=whole) for optimizer in optimizers]
    return {"state_dict": model_state(model, whole=whole), "optimizer_states": states}


def save(path: Path, content: dict[str, Any], format: str) -> None:
    if format == "file":
        save_file(content, path, AtomicCheckpointIO())
    else:
        save_directory(content, path)


def load(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer, **options) -> dict[str, Any]:
    return load_checkpoint(path, model, optimizers, AtomicCheckpointIO(), **options)


def everything(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))


def refused(path: Path, model: nn.Module, *optimizers, kind: type[Exception], match: str) -> None:
    before = everything(model, *optimizers)
    with pytest.raises(kind, match=match):
        load(path, model, *optimizers)
    after = everything(model, *optimizers)
    assert_equal(after[0], before[0])
    for mine, theirs in zip(after[1], before[1], strict=True):
        assert_equal(mine["state"], theirs["state"])
        assert mine["param_groups"] == theirs["param_groups"]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("make", "other"), [(adamw, adamw), (lean, lean), (adamw, lean)])
def test_the_order_in_an_optimizer_does_not_matter(make, other, format, tmp_path):
    model, twin, straight = network(), network(1), network(2)
    optimizer = make(model)
    step(model, optimizer)
    save(tmp_path / "c", checkpoint(model, optimizer, whole=format == "file"), format)
    reversed_, same = other(twin, -1), other(straight)
    load(tmp_path / "c", twin, reversed_)
    load(tmp_path / "c", straight, same)
    for trained, opt in ((twin, reversed_), (straight, same)):
        step(trained, opt, seed=1)
    assert_equal(twin.state_dict(), straight.state_dict())
    if make is other:
        step(model, optimizer, seed=1)
        assert_equal(twin.state_dict(), model.state_dict())


def without_names(content: dict[str, Any]) -> dict[str, Any]:
    for state in content["optimizer_states"]:
        del state["param_names"]
    return content


@pytest.mark.parametrize("make", [adamw, lean])
def test_an_old_file_goes_by_position_with_a_warning(make, tmp_path):
    model, twin = network(), network(1)
    optimizer = make(model)
    step(model, optimizer)
    save(tmp_path / "c", without_names(checkpoint(model, optimizer, whole=True)), "file")
    other = make(twin)
    with pytest.warns(
        lm.ResumeWarning, match="The saved optimizer state has no parameter names, so state was assigned by position"
    ):
        load(tmp_path / "c", twin, other)
    assert_equal(other.state_dict()["state"], optimizer.state_dict()["state"])
    three = make(nn.Sequential(*network(), nn.Linear(6, 6)))
    refused(
        tmp_path / "c",
        twin,
        three,
        kind=ValueError,
        match=r"groups of \[4\] parameters for .*, the optimizer has.*\[6\]",
    )


def test_names_that_the_optimizer_was_given(tmp_path):
    """On a single device these are all it knows."""
    model, twin = network(), network(1)
    pairs = [(f"own.{number}", param) for number, param in enumerate(model.parameters())]
    theirs = [(f"own.{number}", param) for number, param in enumerate(twin.parameters())]
    optimizer, other = lm.AdaPM(pairs), lm.AdaPM(theirs[::-1])
    step(model, optimizer)
    for format in FORMATS:
        save(tmp_path / format, checkpoint(model, optimizer, whole=format == "file"), format)
        load(tmp_path / format, twin, other)
        for mine, param in zip(twin.parameters(), model.parameters(), strict=True):
            assert_equal(dict(other.state[mine]), dict(optimizer.state[param]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [adamw, lean])
@pytest.mark.parametrize("lr", [np.float32(0.5), torch.tensor([0.5])], ids=["numpy", "tensor"])
def test_own_keys_and_numbers_come_back(lr, make, format, tmp_path):
    model, twin = network(), network(1)
    optimizer, other = make(model), make(twin)
    step(model, optimizer)
    optimizer.param_groups[0] |= {"lr": lr, "lr_scale": 0.25, "tag": "head"}
    save(tmp_path / "c", checkpoint(model, optimizer, whole=format == "file"), format)
    load(tmp_path / "c", twin, other)
    group = other.param_groups[0]
    assert type(group["lr"]) is (torch.Tensor if isinstance(lr, torch.Tensor) else float)
    assert (float(group["lr"]), group["lr_scale"], group["tag"]) == (0.5, 0.25, "head")
    step(twin, other)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [adamw, lean])
def test_what_changes_is_told_with_the_path(make, format, tmp_path):
    model, twin = network(), network(1)
    optimizer = make(model, weight_decay=0.5)
    step(model, optimizer)
    path = tmp_path / "last.ckpt"
    save(path, checkpoint(model, optimizer, whole=format == "file"), format)
    with pytest.warns(
        lm.ResumeWarning, match=rf"resumes from step 1 of '{path}'\. .* weight_decay 0\.5 instead of 0\.25"
    ):
        load(path, twin, make(twin, weight_decay=0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, twin, make(twin, weight_decay=0.5))


# --- all is checked before anything is written -----------------------------------------------------------------------


def two(make_second) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = network()
    optimizers = [adamw(model[0]), make_second(model[1])]
    step(model, *optimizers)
    return model, optimizers


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [adamw, lambda model: lm.AdaPM(model.named_parameters())])
def test_a_second_optimizer_that_does_not_fit_leaves_the_first(make, format, tmp_path):
    model, optimizers = two(make)
    save(tmp_path / "c", checkpoint(model, *optimizers, whole=format == "file"), format)
    step(model, *optimizers, seed=1)
    pairs = [[pair] for pair in model[1].named_parameters()]
    groups = [{"params": entries if make is not adamw else [entries[0][1]]} for entries in pairs]
    split = (torch.optim.AdamW if make is adamw else lm.AdaPM)(groups)
    step(model, split)
    refused(tmp_path / "c", model, optimizers[0], split, kind=ValueError, match="has 1 parameter groups, .* 2: it was")


def set_first(key: str, value: float):
    def change(content: dict[str, Any]) -> None:
        state = content["optimizer_states"][1]["state"]
        next(entries for entries in state.values() if key in entries)[key].view(-1)[0] = value

    return change


def set_weight(value: float):
    def change(content: dict[str, Any]) -> None:
        content["state_dict"]["1.weight"].view(-1)[0] = value

    return change


def whole_numbers(content: dict[str, Any]) -> None:
    content["state_dict"]["1.weight"] = content["state_dict"]["1.weight"].int()


def complex_numbers(content: dict[str, Any]) -> None:
    content["state_dict"]["1.weight"] = content["state_dict"]["1.weight"].to(torch.complex64)


UNSOUND = [
    (set_first("exp_avg", float("nan")), ValueError, r"'exp_avg' of '.*' contains NaN: the run diverged"),
    (set_first("exp_avg_sq", float("inf")), ValueError, r"'exp_avg_sq' of '.*' contains infinite elements"),
    (set_first("exp_avg_sq", -1.0), ValueError, r"'exp_avg_sq' of '.*' contains negative elements \(-1\)"),
    (set_first("step", -1.0), ValueError, r"of '.*' has 'step' = -1: it must be a whole number"),
    (set_first("step", float("nan")), ValueError, r"of '.*' has 'step' = nan: it must be a whole number"),
    (set_weight(float("nan")), ValueError, r"The saved weight '1\.weight' in .* contains NaN: the run diverged"),
    (set_weight(float("inf")), ValueError, r"The saved weight '1\.weight' in .* contains infinite elements"),
    (whole_numbers, RuntimeError, r"'1\.weight' has dtype torch\.int32 in the checkpoint and torch\.float32"),
    (complex_numbers, RuntimeError, r"'1\.weight' has dtype torch\.complex64 in the checkpoint and torch\.float32"),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("change", "kind", "match"), UNSOUND)
@pytest.mark.parametrize("second", [adamw, lean])
def test_what_is_unsound_leaves_everything(second, change, kind, match, format, tmp_path):
    model, optimizers = two(second)
    content = copy.deepcopy(checkpoint(model, *optimizers, whole=format == "file"))
    change(content)
    save(tmp_path / "c", content, format)
    step(model, *optimizers, seed=1)
    refused(tmp_path / "c", model, *optimizers, kind=kind, match=match)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (
            lambda c: c["state_dict"]["1.weight"].to_sparse(),
            ValueError,
            r"'1\.weight' in .* is sparse \(torch\.sparse_coo\)",
        ),
        (lambda c: c["state_dict"]["1.weight"].to("meta"), ValueError, r"'1\.weight' in .* is on the meta device"),
    ],
)
def test_weights_that_are_no_numbers(change, kind, match, tmp_path):
    model, optimizers = two(adamw)
    content = checkpoint(model, *optimizers, whole=True)
    content["state_dict"]["1.weight"] = change(content)
    torch.save(content, tmp_path / "c")
    step(model, *optimizers, seed=1)
    refused(tmp_path / "c", model, *optimizers, kind=kind, match=match)


@pytest.mark.parametrize(
    ("content", "kind", "match"),
    [
        ([1, 2], TypeError, "must be a dict with the key 'state_dict', got list"),
        (torch.ones(2), TypeError, "must be a dict with the key 'state_dict', got Tensor"),
        ({"0.weight": torch.ones(2)}, ValueError, "has no key 'state_dict', it has '0.weight': it was not saved by"),
        ({}, ValueError, "has no key 'state_dict', it has nothing"),
        ({"state_dict": [1]}, TypeError, "has a value of type list under 'state_dict'"),
        ({"state_dict": torch.ones(2)}, TypeError, "has a value of type Tensor under 'state_dict'"),
        (
            {"state_dict": {}, "optimizer_states": {}},
            TypeError,
            "has a value of type dict under 'optimizer_states'",
        ),
        (
            {"state_dict": {}, "optimizer_states": [3]},
            TypeError,
            "of optimizer 0 in the checkpoint must be a dict",
        ),
        (
            {"state_dict": {}, "optimizer_states": [{"a": 1}]},
            ValueError,
            "state of optimizer 0 in the checkpoint has no key",
        ),
    ],
)
def test_files_that_are_no_checkpoints(content, kind, match, tmp_path):
    torch.save(content, tmp_path / "c")
    model = network()
    refused(tmp_path / "c", model, adamw(model), kind=kind, match=match)


@pytest.mark.parametrize("format", FORMATS)
def test_shapes_are_checked_for_optimizers_of_torch(format, tmp_path):
    """An average of 6 numbers fits a bias, and would broadcast against a weight of 6 columns."""
    model, optimizers = two(adamw)
    content = checkpoint(model, *optimizers, whole=format == "file")
    for number, length in enumerate((6, 1)):
        state = content["optimizer_states"][1]["state"]
        next(iter(state.values()))["exp_avg"] = torch.zeros(length)
        save(tmp_path / str(number), content, format)
        match = rf"'exp_avg' of '1\.weight' has shape \({length},\), expected \(6, 6\): it was saved for another"
        refused(tmp_path / str(number), model, *optimizers, kind=ValueError, match=match)


KINDS: list[Any] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    torch.optim.Adafactor,
    lambda p: torch.optim.Adam(p, amsgrad=True),
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Rprop,
    torch.optim.ASGD,
]


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_sound_states_of_torchs_optimizers_load(number, tmp_path):
    for format in FORMATS:
        model, twin = network(), network(1)
        optimizer, other = KINDS[number](list(model.parameters())), KINDS[number](list(twin.parameters())[::-1])
        step(model, optimizer)
        save(tmp_path / format, checkpoint(model, optimizer, whole=format == "file"), format)
        load(tmp_path / format, twin, other)
        for trained, opt in ((model, optimizer), (twin, other)):
            step(trained, opt, seed=1)
        assert_equal(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("format", FORMATS)
def test_buffers_and_frozen_weights_may_be_infinite(format, tmp_path):
    """A mask is."""
    model, twin = network(), network(1)
    for each in (model, twin):
        each.register_buffer("mask", torch.full((2, 2), -torch.inf))
        each.frozen = nn.Parameter(torch.full((2,), torch.inf), requires_grad=False)
    save(tmp_path / "c", checkpoint(model, whole=format == "file"), format)
    load(tmp_path / "c", twin)
    assert_equal(twin.state_dict(), model.state_dict())
    model.frozen[0] = torch.nan
    save(tmp_path / "c", checkpoint(model, whole=format == "file"), format)
    refused(tmp_path / "c", twin, kind=ValueError, match="The saved weight 'frozen' in .* contains NaN")


# --- finetuning ------------------------------------------------------------------------------------------------------


class Finetuned(LightningModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make = make
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.head(self.backbone(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)


def finetune(module: Finetuned, folder: Path, epochs: int, format: str | None, **options) -> Trainer:
    """Unfreeze the backbone in the second epoch; without a format, with Lightning's strategy for one device."""
    strategy = lm.MemOptFSDPStrategy(save_distributed_checkpoint=format == "directory") if format else "auto"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            callbacks=[BackboneFinetuning(1, backbone_initial_lr=0.005, train_bn=False)],
            max_epochs=epochs,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, **options)
    return trainer


HEADS: list[Any] = [
    lambda module: torch.optim.AdamW(module.head.parameters(), lr=0.01),
    lambda module: lm.AdaPM(module.head.parameters(), lr=0.01),
    lambda module: lm.AdaPM(module.head.named_parameters(), lr=0.01),
]


@pytest.mark.parametrize(("format", "make"), list(itertools.product(FORMATS, HEADS)))
def test_a_run_resumes_after_its_backbone_was_unfrozen(format, make, tmp_path):
    """The callback is given its state after this strategy has loaded; its groups are there in time all the same."""
    model, halfway, resumed = Finetuned(make), Finetuned(make), Finetuned(make)
    before = copy.deepcopy(model.backbone.state_dict())
    finetune(model, tmp_path, 4, format)
    finetune(halfway, tmp_path, 2, format).save_checkpoint(tmp_path / "c")
    trainer = finetune(resumed, tmp_path, 4, format, ckpt_path=tmp_path / "c")
    assert len(trainer.optimizers[0].param_groups) == 2
    for (name, ours), theirs in zip(resumed.named_parameters(), model.parameters(), strict=True):
        assert_equal(ours.full_tensor(), theirs.full_tensor())
        if name.startswith("backbone.0"):
            assert not torch.equal(ours.full_tensor(), before[name.removeprefix("backbone.")])


def test_on_one_device_the_callback_replaces_the_list_of_groups(tmp_path):
    def bound(module: Finetuned) -> lm.AdaPM:
        optimizer = lm.AdaPM(module.head.named_parameters(), lr=0.01)
        optimizer.bind(module)
        return optimizer

    halfway, resumed = Finetuned(bound), Finetuned(bound)
    saved = finetune(halfway, tmp_path, 2, None)
    saved.save_checkpoint(tmp_path / "c")
    trainer = finetune(resumed, tmp_path, 2, None, ckpt_path=tmp_path / "c", weights_only=True)
    (optimizer,), (expected,) = trainer.optimizers, saved.optimizers
    assert len(optimizer.param_groups) == 2
    assert_equal(optimizer.state_dict()["state"], expected.state_dict()["state"])
    assert optimizer.snapshot() == expected.snapshot()


def test_a_resume_that_fails_leaves_the_groups(tmp_path):
    halfway, other = Finetuned(HEADS[1]), Finetuned(HEADS[1])
    trainer = finetune(halfway, tmp_path, 2, "file")
    with torch.no_grad():
        halfway.head.weight.to_local().fill_(torch.nan)
    trainer.save_checkpoint(tmp_path / "c")
    with pytest.raises(ValueError, match=r"The saved weight 'head\.weight' in .* contains NaN"):
        finetune(other, tmp_path, 4, "file", ckpt_path=tmp_path / "c")
    (optimizer,) = other.trainer.optimizers
    assert len(optimizer.param_groups) == 1
    assert not any(param.requires_grad for param in other.backbone[0].parameters())
    assert len(optimizer.snapshot().blocks) == 2


def test_groups_that_were_added_otherwise_have_to_be_there(tmp_path):
    model, twin = network(), network(1)
    optimizer = adamw(model[0])
    optimizer.add_param_group({"params": list(model[1].parameters())})
    step(model, optimizer)
    for format in FORMATS:
        save(tmp_path / format, checkpoint(model, optimizer, whole=format == "file"), format)
        match = r"has 2 parameter groups, AdamW 1: .*`add_param_group`\) must exist before .* or `on_fit_start`"
        refused(tmp_path / format, twin, adamw(twin[0]), kind=ValueError, match=match)
