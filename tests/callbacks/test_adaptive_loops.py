"""AdaptiveMomentum in Lightning's loops: accumulation, epochs, several optimizers, layers that begin to train."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum
from lightning_memopt.callbacks.policies import energy
from tests.callbacks._adaptive import Module, Network, StopsAt, Watch, dense_bytes, fit, steps_of, tokens, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


def test_decisions_count_steps_of_the_optimizer():
    """With accumulation, clipping, validation in between, a scheduler and epochs instead of steps."""

    def scheduled(module: Module) -> Any:
        optimizer = lm.AdaPMLean(module.named_parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Module(scheduled, layers=0)
    callback, watch = AdaptiveMomentum(0.25, "energy", every_n_steps=2), Watch(int(0.25 * dense_bytes(module)))
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "val_check_interval": 4, "limit_val_batches": 1}
    made = fit(module, callback, watch, max_epochs=5, **options)  # 10 batches and 4 steps each
    assert made.global_step == 20
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**20)
    assert steps_of(callback) == [0, 2, 4], "frozen after 30% of 20 steps"


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(6))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 20}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 2}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 2, "max_steps": 1000}, [0, 2, 4, 6, 8]),
        ({"max_epochs": 1000, "max_steps": 20}, [0, 2, 4, 6, 8]),
        ({"fast_dev_run": 10, "max_steps": 1000}, [0, 2, 4]),
    ],
    ids=str,
)
def test_half_of_the_training(options, expected):
    callback = AdaptiveMomentum(0.25, every_n_steps=2, freeze_after=0.5)
    trainer(callback, **options).fit(Module(layers=0))
    assert steps_of(callback) == expected


@pytest.mark.parametrize("unknown", ["time", "stream"])
def test_training_of_unknown_length_warns(unknown, tmp_path):
    def run(*callbacks: Callback) -> None:
        if unknown == "time":
            stops = StopsAt(12, path=tmp_path)
            made = trainer(*callbacks, stops, max_steps=-1, max_epochs=-1, max_time=timedelta(minutes=5))
            made.fit(Module(layers=0))
        else:
            trainer(*callbacks, max_epochs=2).fit(Module(layers=0), DataLoader(Stream()))

    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=2)
    with pytest.warns(UserWarning, match="`freeze_after` 0.3 is a fraction of the training, but its length is unknown"):
        run(callback)
    assert steps_of(callback) == [0, 2, 4, 6, 8, 10, 12]
    by_steps = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=5)
    run(by_steps)
    assert steps_of(by_steps) == [0, 2, 4]
    with pytest.raises(ValueError, match="'schedule' needs the length of training"):
        run(AdaptiveMomentum(0.25, "schedule", freeze_after=None))


def test_stopping_early():
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=None)
    stopping = EarlyStopping("val_loss", patience=1, mode="max", stopping_threshold=-1e9)
    made = fit(Module(layers=0), callback, stopping, max_epochs=9, limit_val_batches=1)
    assert 10 <= made.global_step < 90
    assert steps_of(callback)[-1] == made.global_step


class TwoOptimizers(Module):
    """Steps one of its optimizers in every batch, the other in every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Network(layers=1)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(self.loss(batch_idx))
        first.step()
        self.untoggle_optimizer(first)
        if batch_idx % 2:
            self.toggle_optimizer(second)
            second.zero_grad()
            self.manual_backward(self.other(tokens(batch_idx)).square().mean())
            second.step()
            self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return (
            lm.AdaPMLean(self.model.named_parameters(), lr=1e-2),
            lm.AdamSNSM(self.other.named_parameters(), lr=1e-2),
        )


def test_a_callback_for_each_optimizer(tmp_path):
    with pytest.raises(ValueError, match="Optimizers 0, 1 can be adapted: choose one with `optimizer_idx`"):
        fit(TwoOptimizers(), AdaptiveMomentum(0.25))

    def run(**options: Any) -> tuple[TwoOptimizers, list[AdaptiveMomentum], Trainer]:
        module = TwoOptimizers()
        callbacks = [
            AdaptiveMomentum(0.25, "energy", every_n_steps=3, freeze_after=None, optimizer_idx=0),
            AdaptiveMomentum(0.3, "benefit", every_n_steps=2, freeze_after=0.99, optimizer_idx=1),
        ]
        watches = [Watch(int(0.25 * dense_bytes(module.model)), 0), Watch(int(0.3 * dense_bytes(module.other)), 1)]
        return module, callbacks, fit(module, *callbacks, *watches, **options)

    module, callbacks, made = run(max_epochs=2)
    assert made.global_step == 30
    assert list(map(steps_of, callbacks)) == [[0, 3, 6, 9, 12, 15, 18], [0, 2, 4, 6, 8, 10]]
    made.save_checkpoint(tmp_path / "two.ckpt")
    keys = [key for key in torch.load(tmp_path / "two.ckpt")["callbacks"] if "Adaptive" in key]
    assert keys == ["AdaptiveMomentum{'optimizer_idx': 0}", "AdaptiveMomentum{'optimizer_idx': 1}"]
    for callback in callbacks:
        callback.figures = callback.log = True
    run_again = {"default_root_dir": tmp_path, "logger": CSVLogger(tmp_path, "csv")}
    again = fit(TwoOptimizers(), *callbacks, max_epochs=1, log_every_n_steps=1, **run_again)
    assert {path.name for path in Path(again.log_dir).glob("*.png")} == {"allocation_0.png", "allocation_1.png"}
    columns = (Path(again.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"memopt/rank_0/lm_head.weight", "memopt/rank_1/lm_head.weight"} <= set(columns)
    resumed, again, _ = run(max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
    _, uninterrupted, _ = run(max_epochs=3)
    assert [callback.history for callback in again] == [callback.history for callback in uninterrupted]


class Unfreezes(Callback):
    """Lets the second layer train from the third step on."""

    def __init__(self, where: str) -> None:
        setattr(self, where, self.unfreeze)  # before the step of global step 2, or right after the one before

    def unfreeze(self, trainer: Trainer, module: Module, *args: Any) -> None:
        if trainer.global_step == 2:
            module.model.layers[1].requires_grad_(True)


class HalfFrozen(Module):
    def __init__(self, unfreeze: bool = False) -> None:
        super().__init__(layers=2)
        self.model.layers[1].requires_grad_(False)
        self.unfreeze = unfreeze

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.unfreeze and self.global_step == 2:
            self.model.layers[1].requires_grad_(True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "step"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_that_trains_from_the_middle_on(where, frozen):
    """Also if it begins in the very batch whose step counts, and if the allocation is frozen already."""
    budget = int(0.25 * dense_bytes(Network(2))) // 2
    module, watch = HalfFrozen(unfreeze=where == "step"), Watch(budget)
    callback = AdaptiveMomentum(budget, "energy", every_n_steps=3, freeze_after=2 if frozen else None)
    others = [] if where == "step" else [Unfreezes(where)]
    options = {"max_epochs": 6, "limit_train_batches": 1} if where == "on_train_epoch_start" else {"max_steps": 6}
    fit(module, callback, *others, watch, **options)
    assert len(callback.history[0]["ranks"]) == 8
    assert len(callback.history[-1]["ranks"]) == 14
    assert (callback.history[1]["step"], len(callback.history[1]["ranks"])) == (2, 14)
    assert steps_of(callback) == ([0, 2] if frozen else [0, 2, 3, 6])


class Raw(HalfFrozen):
    """Steps an optimizer that Lightning has not wrapped: no hook is called, and no step is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 2:
            self.model.layers[1].requires_grad_(True)
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch_idx))
        optimizer.step()


@pytest.mark.parametrize("freeze_after", [None, 4], ids=["deciding", "frozen"])
def test_a_layer_that_begins_leaves_the_others_what_the_signals_give_them(freeze_after):
    """The newcomers get the rank of an even division; the others divide the rest as the policy would."""

    class Late(HalfFrozen):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.model.layers[1].requires_grad_(self.global_step >= 6)
            return Module.training_step(self, batch, batch_idx)

    asked: list[tuple[Any, Any]] = []

    def policy(problem: Any) -> Any:
        asked.append((problem, energy(problem)))
        return asked[-1][1]

    budget = int(0.3 * dense_bytes(Network(2)))
    callback, watch = AdaptiveMomentum(budget, policy, every_n_steps=2, freeze_after=freeze_after), Watch(budget)
    fit(Late(), callback, watch, max_steps=7)
    before, entry = next(pair for pair in pairwise(callback.history) if len(pair[1]["ranks"]) == 14)
    assert (entry["step"], list(entry["residual"])) == (6, list(before["ranks"]))
    fresh = [name for name in entry["ranks"] if "layers.1" in name]
    assert len({entry["ranks"][name] for name in fresh}) <= 2, "an even division"
    problem, answer = next(pair for pair in asked if len(pair[0].blocks) == 8 and pair[0].budget < 0.7 * budget)
    assert all(block.signals is not None for block in problem.blocks)
    assert {name: rank for name, rank in entry["ranks"].items() if name not in fresh} == answer


def test_a_raw_optimizer():
    module, budget = Raw(), int(0.25 * dense_bytes(Network(2))) // 2
    callback, watch = AdaptiveMomentum(budget, "energy", every_n_steps=3, freeze_after=8), Watch(budget)
    fit(module, callback, watch, max_epochs=1)
    assert len(watch.sizes) == 10
    assert steps_of(callback) == [0, 3, 3, 6]


def test_a_layer_that_is_frozen_keeps_its_momentum_and_that_counts():
    class Freezes(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Module, *args: Any) -> None:
            if trainer.global_step % 6 in (2, 4):
                module.model.layers[1].requires_grad_(trainer.global_step % 6 == 4)

    module = Module(layers=2)
    watch = Watch(int(0.25 * dense_bytes(module)))
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=3, freeze_after=None)
    fit(module, callback, Freezes(), watch, max_steps=18)
    assert steps_of(callback) == [0, 3, 6, 9, 12, 15, 18], "one decision each: nothing begins anew"
    assert [entry["momentum_bytes"] for entry in callback.history] == [
        watch.sizes[0],
        *(watch.sizes[2 * step - 1] for step in steps_of(callback)[1:]),
    ]


def test_validation_alone_does_nothing(capsys):
    callback = AdaptiveMomentum(0.25)
    trainer(callback, limit_val_batches=1).validate(Module(), verbose=False)
    assert (callback.history, callback.state_dict()) == ([], {})
    assert "Adaptive" not in capsys.readouterr().out


def test_a_second_fit_begins_anew():
    callback = AdaptiveMomentum(0.25, "energy", every_n_steps=2, freeze_after=None)
    fit(Module(), callback)
    first = callback.history
    module = Module()
    fit(module, callback, Watch(int(0.25 * dense_bytes(module))))
    assert callback.history == first
    optimizer = lm.AdaPMLean(Network().named_parameters())
    watched = len(optimizer._optimizer_step_post_hooks)
    for again in (callback, AdaptiveMomentum(0.25)):
        module = Module(lambda module: lm.AdaPMLean(module.named_parameters()))
        made = fit(module, again)
        assert len(made.optimizers[0]._optimizer_step_post_hooks) == watched, "nobody watches any more"
