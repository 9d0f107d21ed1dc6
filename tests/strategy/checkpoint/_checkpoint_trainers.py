"""Trainers that save and load with the strategy, which `test_checkpoints` runs on two ranks."""

from __future__ import annotations

import logging
import os
import pickle
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memopt import AdaPMLean
from lightning_memopt.strategy import MemOptFSDPStrategy
from lightning_memopt.strategy.checkpoint.io import AtomicCheckpointIO
from lightning_memopt.strategy.export import export_command
from lightning_memopt.strategy.export.inspection import inspect_checkpoint
from tests._compare import assert_equal
from tests.strategy.checkpoint._checkpoints import (
    FORMATS,
    Case,
    World,
    local_params,
    local_state,
    raises,
    whole_params,
)
from tests.strategy.files._bucket import Bucket

TRAINERS: list[Case] = []
RANKS = 2


def case(function: Case) -> Case:
    TRAINERS.append(function)
    return function


class Module(LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layers(batch).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        optimizer = AdaPMLean(self.named_parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), batch_size=2)

    val_dataloader = train_dataloader


class Strategy(MemOptFSDPStrategy):
    """The two together."""


class SavesAtOnce(Callback):
    """Saves before the first step, and keeps a state of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def trainer(folder: Path, format: str, *callbacks: Callback, plugins: Any = (), **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    strategy = Strategy(save_distributed_checkpoint=format == "directory")
    return Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        plugins=[LightningEnvironment(), *plugins],
        callbacks=[*callbacks],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **{"max_epochs": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options},
    )


@case
def a_resumed_fit_equals_an_uninterrupted_one(ranks: dict[int, World], folder: Path) -> None:
    """From the end of the first epoch, and from before the first step; files that are no longer wanted are removed."""
    for format in FORMATS:
        place = folder / format
        first, model = SavesAtOnce(place / "first.ckpt"), Module()
        every = ModelCheckpoint(place, filename="{epoch}", save_top_k=-1, save_last=True)
        latest = ModelCheckpoint(place / "one", filename="{step}", every_n_train_steps=1)
        trainer(folder, format, first, every, latest).fit(model)
        dist.barrier()
        assert sorted(path.name for path in place.iterdir()) == [
            "epoch=0.ckpt",
            "epoch=1.ckpt",
            "first.ckpt",
            "last.ckpt",
            "one",
        ]
        assert [path.name for path in (place / "one").iterdir()] == ["step=4.ckpt"]
        for name, epochs in (("epoch=0.ckpt", 1), ("first.ckpt", 0)):
            resumed, callback = Module(seed=1), SavesAtOnce(folder / "unused.ckpt")
            again = trainer(folder, format, callback)
            again.fit(resumed, ckpt_path=place / name)
            assert_equal(local_params(resumed), local_params(model))
            assert (callback.seen, again.global_step, epochs) == (2, 4, epochs)
            assert again.optimizers[0].param_groups[0]["lr"] == 0.01 / 4


@case
def validation_loads_weights_only(ranks: dict[int, World], folder: Path) -> None:
    for format in FORMATS:
        model, path = Module(), folder / format
        fitted = trainer(folder, format, max_epochs=1)
        fitted.fit(model)
        fitted.save_checkpoint(path)
        other = Module(seed=1)
        trainer(folder, format).validate(other, ckpt_path=path, verbose=False)
        assert_equal(local_params(other), local_params(model))
        with raises(TypeError, "storage_options=...)` is not supported"):
            fitted.save_checkpoint(path, storage_options={"a": 1})
        fitted.save_checkpoint(path, weights_only=True)
        trainer(folder, format).validate(other, ckpt_path=path, verbose=False)
        with raises(KeyError, "checkpoint contains only the model"):
            trainer(folder, format).fit(Module(), ckpt_path=path)


class Normalised(Module):
    """Keeps running statistics, which differ from rank to rank as the batches do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        norms = (nn.BatchNorm1d(8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8), nn.BatchNorm1d(8))
        self.layers = nn.Sequential(*norms)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("loss", (self.layers(batch) - batch).square().mean(), sync_dist=True)

    def train_dataloader(self) -> DataLoader:
        data = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(data * torch.arange(1, 17).unsqueeze(1), batch_size=4)

    val_dataloader = train_dataloader


@case
def validation_does_not_depend_on_the_format(ranks: dict[int, World], folder: Path) -> None:
    losses, models = [], []
    for format in FORMATS:
        model, path = Normalised(), folder / format
        fitted = trainer(folder, format, max_epochs=1)
        fitted.fit(model)
        means: list[Any] = [None] * RANKS
        dist.all_gather_object(means, model.layers[0].running_mean.tolist())
        assert means[0] != means[1]
        fitted.save_checkpoint(path)
        other = Normalised(seed=1)
        validating = trainer(folder, format)
        validating.validate(other, ckpt_path=path, verbose=False)
        assert other.layers[0].running_mean.tolist() == means[0]
        losses.append(validating.callback_metrics["loss"].item())
        models.append(dict(other.named_buffers()))
    assert losses[0] == losses[1]
    assert_equal(models[0], models[1])


@case
def objects_need_trust(ranks: dict[int, World], folder: Path) -> None:
    """Loading refuses what is more than tensors and builtins, and says what to do."""
    for format in FORMATS:
        model, path = Module(), folder / format
        model.hparams["place"] = Path("somewhere")
        fitted = trainer(folder, format, max_epochs=1)
        fitted.fit(model)
        fitted.save_checkpoint(path)
        other, again = Module(seed=1), trainer(folder, format, max_epochs=1)
        with raises(
            pickle.UnpicklingError,
            "contains `pathlib.PosixPath`",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1, or allow the classes",
        ):
            again.fit(other, ckpt_path=path)
        with mock.patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
            trainer(folder, format, max_epochs=1).fit(other, ckpt_path=path)
        assert_equal(local_params(other), local_params(model))


@case
def a_file_is_one_of_lightnings(ranks: dict[int, World], folder: Path) -> None:
    """`load_from_checkpoint` and a Trainer on one device read it, and what that saves is read sharded."""
    model, path = Module(), folder / "file"
    fitted = trainer(folder, "file", max_epochs=1)
    fitted.fit(model)
    fitted.save_checkpoint(path)
    expected = whole_params(model)
    loaded = Module.load_from_checkpoint(path)
    assert_equal({name: param.data for name, param in loaded.named_parameters()}, expected)
    dist.barrier()
    if dist.get_rank() == 0:  # the process group is there, but a strategy for one device does not use it
        alone = Module(seed=2)
        options = {"strategy": SingleDeviceStrategy("cpu"), "accelerator": "cpu", "logger": False}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
        one = Trainer(**options, max_epochs=2, limit_val_batches=0)
        one.fit(alone, ckpt_path=path)
        assert one.global_step == 2 + 4
        one.save_checkpoint(folder / "one device")
        expected = {name: param.data for name, param in alone.named_parameters()}
    dist.barrier()
    again = Module(seed=3)
    trainer(folder, "file", max_epochs=2).fit(again, ckpt_path=folder / "one device")
    everything = [expected]
    dist.broadcast_object_list(everything, src=0)
    assert_equal(whole_params(again), everything[0])


@case
def saves_are_waited_for(ranks: dict[int, World], folder: Path) -> None:
    """When `fit` returns, what was saved in the background is there."""

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            time.sleep(0.5)
            super().save_checkpoint(checkpoint, path, storage_options)

    last = ModelCheckpoint(folder, filename="last")
    trainer(folder, "file", last, plugins=[AsyncCheckpointIO(Slow())], max_epochs=1).fit(Module())
    if dist.get_rank() == 0:
        assert (folder / "last.ckpt").is_file()


@case
def a_directory_becomes_a_file(ranks: dict[int, World], folder: Path) -> None:
    """By a fit that has no steps left to take."""
    model = Module()
    fitted = trainer(folder, "directory", max_epochs=1)
    fitted.fit(model)
    fitted.save_checkpoint(folder / "directory")
    other = Module(seed=1)
    again = trainer(folder, "file", max_epochs=None, max_steps=fitted.global_step)
    again.fit(other, ckpt_path=folder / "directory")
    again.save_checkpoint(folder / "file")
    assert again.global_step == fitted.global_step
    assert_equal(local_params(other), local_params(model))
    assert_equal(local_state(again.optimizers[0]), local_state(fitted.optimizers[0]))
    content = torch.load(folder / "file", weights_only=True)
    assert_equal(content["state_dict"], whole_params(model))
    assert content["global_step"] == fitted.global_step


@case
def plugins_of_the_user_are_used(ranks: dict[int, World], folder: Path) -> None:
    class Own(TorchCheckpointIO):
        saved: list[Any] = []

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            self.saved.append(path)
            super().save_checkpoint(checkpoint, path, storage_options)

    for plugin, inner in ((Own(), Own), (AsyncCheckpointIO(Own()), Own), (AsyncCheckpointIO(), AtomicCheckpointIO)):
        own, model, path = trainer(folder, "file", plugins=[plugin], max_epochs=1), Module(), folder / inner.__name__
        assert own.strategy.checkpoint_io is plugin
        own.fit(model)
        own.save_checkpoint(path)
        own.strategy.teardown()  # as at the end of every fit
        dist.barrier()
        assert isinstance(getattr(plugin, "checkpoint_io", plugin), inner)
        other = Module(seed=1)
        trainer(folder, "file", plugins=[plugin]).validate(other, ckpt_path=path, verbose=False)
        assert_equal(local_params(other), local_params(model))
    assert len(Own.saved) == 2 * (dist.get_rank() == 0)
    trainer_of_directories = trainer(folder, "directory", max_epochs=1)
    trainer_of_directories.fit(model)
    trainer_of_directories.save_checkpoint(path)
    own = trainer(folder, "file", plugins=[Own()], max_epochs=1)
    own.fit(model)
    own.save_checkpoint(path)
    assert path.is_file()
    assert type(trainer(folder, "file").strategy.checkpoint_io) is AtomicCheckpointIO


@case
def an_export_continues_on_one_device(ranks: dict[int, World], folder: Path) -> None:
    """The command writes one file, from a directory that two ranks saved, and no Trainer is needed for it."""
    model = Module()
    fitted = trainer(folder, "directory", max_epochs=1)
    fitted.fit(model)
    fitted.save_checkpoint(folder / "two ranks")
    expected = whole_params(model)
    if dist.get_rank() == 0:
        assert inspect_checkpoint(folder / "two ranks").ranks == RANKS
        assert export_command.main([str(folder / "two ranks"), str(folder / "one.ckpt"), "--optimizer"]) == 0
        loaded = Module.load_from_checkpoint(folder / "one.ckpt")
        assert_equal({name: param.data for name, param in loaded.named_parameters()}, expected)
        options = {"strategy": SingleDeviceStrategy("cpu"), "accelerator": "cpu", "logger": False}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
        one = Trainer(**options, max_epochs=2, limit_val_batches=0)
        one.fit(Module(seed=1), ckpt_path=folder / "one.ckpt")
        assert one.global_step == 2 + 4
    dist.barrier()
    again = trainer(folder, "directory", max_epochs=1)
    other = Module(seed=1)
    again.fit(other, ckpt_path=folder / "one.ckpt")
    assert_equal(local_params(other), local_params(model))
    assert_equal(local_state(again.optimizers[0]), local_state(fitted.optimizers[0]))


@case
def a_run_whose_checkpoints_are_in_a_bucket(ranks: dict[int, World], folder: Path) -> None:
    """Where nothing can be renamed: the latest, `last`, and a resumed run that equals an uninterrupted one."""
    for format in FORMATS:
        Bucket.root = folder / format
        if dist.get_rank() == 0:
            Bucket.root.mkdir(parents=True)
        dist.barrier()
        latest = ModelCheckpoint("bucket://runs", filename="{epoch}", save_last=True)
        model = Module()
        trainer(folder, format, latest).fit(model)
        dist.barrier()
        names = {key.split("/")[1] for key in Bucket()._keys()}
        assert names == {"epoch=1.ckpt", "last.ckpt"}, names
        half, resumed = Module(), Module(seed=1)
        every = ModelCheckpoint("bucket://other", filename="{epoch}", save_top_k=-1)
        trainer(folder, format, every, max_epochs=1).fit(half)
        again = trainer(folder, format)
        again.fit(resumed, ckpt_path="bucket://other/epoch=0.ckpt")
        assert_equal(local_params(resumed), local_params(model))
        other = Module(seed=2)
        trainer(folder, format).validate(other, ckpt_path="bucket://runs/last.ckpt", verbose=False)
        assert_equal(local_params(other), local_params(model))


@case
def a_save_that_fails_in_the_background_ends_the_run(ranks: dict[int, World], folder: Path) -> None:
    """All ranks raise it at the next save, and the checkpoint that it would have replaced is still there."""

    class Failing(AtomicCheckpointIO):
        saved = 0

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            self.saved += 1
            if self.saved == 2:
                raise OSError(28, "No space left on device")
            super().save_checkpoint(checkpoint, path, storage_options)

    class Waiting(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if executor := trainer.strategy.checkpoint_io._executor:
                executor.submit(lambda: None).result()  # the save of the last step has failed by now

    latest = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1)
    failing = trainer(folder, "file", latest, Waiting(), plugins=[AsyncCheckpointIO(Failing())])  # 4 steps
    with raises(OSError, "No space left on device"):
        failing.fit(Module())
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step=1.ckpt", "step=3.ckpt"], names  # the last was under way
    trainer(folder, "file").validate(Module(), ckpt_path=folder / "step=1.ckpt", verbose=False)


@case
def directories_are_not_saved_in_the_background(ranks: dict[int, World], folder: Path) -> None:
    fitted = trainer(folder, "directory", plugins=[AsyncCheckpointIO()], max_epochs=1)
    fitted.fit(Module())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted.save_checkpoint(folder / "directory")
    told = any("AsyncCheckpointIO has no effect on checkpoint directories" in str(each.message) for each in caught)
    assert told == (dist.get_rank() == 0)
