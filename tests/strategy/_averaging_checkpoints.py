"""Checkpoints with averaged weights: both formats, and what continues from them; for `test_continued`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.strategy.checkpoint.save import AVERAGING_STATE, CURRENT, WEIGHTS
from lightning_memopt.strategy.export.export_command import main as export
from lightning_memopt.strategy.export.inspection import inspect_checkpoint
from tests.strategy._fabric_checkpoints import EXPECTED, FORMATS, STEPS, Ordered
from tests.strategy._fabric_checkpoints import start as by_fabric
from tests.strategy._training import raises, trainer, whole, whole_weights
from tests.strategy.cases.averaging import Ema
from tests.strategy.cases.shared import close_weights


class Extra(Ordered):
    """Has extra state, which is not averaged."""

    steps = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    val_dataloader = Ordered.train_dataloader


def averaged(callback: Ema) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in callback._average_model.module.named_parameters()}


def start(name: str, max_steps: int = 2 * STEPS, **options: Any) -> tuple[Trainer, Ema]:
    callback = Ema()
    strategy = MemOptFSDPStrategy(save_distributed_checkpoint=FORMATS[name])
    given = {"callbacks": [callback], "use_distributed_sampler": False, "limit_val_batches": 1, **options}
    return trainer(strategy, max_steps=max_steps, **given), callback


def both(average: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**average, **{f"trained {name}": value for name, value in trained.items()}}


class Keeps(Ema):
    """Keeps the weights that train before the average replaces them."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.trained = whole_weights(pl_module)
        super().on_train_end(trainer, pl_module)


def run(name: str, module: Ordered, **options: Any) -> dict[str, Tensor]:
    """Train to the end and return the average, and the weights that it is of."""
    callback = Keeps()
    made, _ = start(name, callbacks=[callback])
    made.fit(module, **options)
    assert made.global_step == 2 * STEPS
    return both(averaged(callback), callback.trained)


def saved(folder: Path) -> None:
    """Save in both formats during training, after two of four steps."""
    for name in FORMATS:

        class Saves(Extra):
            def on_train_batch_end(self, *_: Any) -> None:
                if self.trainer.global_step == STEPS:
                    self.trainer.save_checkpoint(folder / name)  # noqa: B023

        found = run(name, Saves())
    if dist.get_rank() == 0:
        torch.save(found, folder / EXPECTED)
    dist.barrier()


def averaging_continues(folder: Path, name: str) -> None:
    module = Extra(start=STEPS, seed=1)
    found = run(name, module, ckpt_path=folder / name)
    close_weights(found, torch.load(folder / EXPECTED), 0 if dist.get_world_size() == 2 else 1e-5)
    assert module.steps == 2 * STEPS


def the_average_is_what_others_load(folder: Path) -> None:
    """Under Lightning's key for weights, so that validation and `load_weights` take the average."""
    found = []
    for name in FORMATS:
        module = Extra(seed=1)
        start(name)[0].validate(module, ckpt_path=folder / name, verbose=False)
        weights = lm.load_weights(folder / name)
        close_weights(whole_weights(module), {k: v for k, v in weights.items() if isinstance(v, Tensor)}, 0)
        found.append(whole_weights(module))
    close_weights(*found, 0)
    expected = torch.load(folder / EXPECTED)
    assert not torch.equal(found[0]["model.lm_head.weight"], expected["model.lm_head.weight"])


def files_are_those_of_lightnings_other_strategies(folder: Path) -> None:
    """One file goes from DDP to shards and back, with the average."""
    expected = torch.load(folder / EXPECTED)
    callback = Keeps()
    made = trainer("ddp", max_steps=2 * STEPS, callbacks=[callback], use_distributed_sampler=False)
    made.fit(Extra(start=STEPS, seed=1), ckpt_path=folder / "file")
    close_weights(both(averaged(callback), callback.trained), expected, 1e-5)

    class Saves(Extra):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == STEPS:
                self.trainer.save_checkpoint(folder / "ddp")

    trainer("ddp", max_steps=STEPS, callbacks=[Ema()], use_distributed_sampler=False).fit(Saves())
    close_weights(run("file", Extra(start=STEPS, seed=1), ckpt_path=folder / "ddp"), expected, 1e-5)


def an_export_holds_both(folder: Path) -> None:
    """One file made of a directory equals the one that the run saves, with which others go on."""
    path = folder / "exported.ckpt"
    if dist.get_rank() == 0:
        assert export([str(folder / "directory"), str(path), "--optimizer"]) == 0
        found, expected = (torch.load(each, weights_only=True) for each in (path, folder / "file"))
        assert found.keys() == expected.keys()
        for part in (WEIGHTS, CURRENT):
            assert list(found[part]) == list(expected[part])
            tensors = [{k: v for k, v in each[part].items() if isinstance(v, Tensor)} for each in (found, expected)]
            close_weights(*tensors, 0)
        assert all(inspect_checkpoint(folder / name).averaged for name in FORMATS)


def fabric_goes_on_from_the_average(folder: Path) -> None:
    """What it passes on to a Trainer does not bring back the weights that trained before, or half of an average."""
    for name, distributed in FORMATS.items():
        made, state = by_fabric(distributed, seed=1)
        rest = made.load(folder / name, state, strict=False)  # it has no extra state
        assert not {CURRENT, AVERAGING_STATE} & rest.keys()
        made.save(folder / f"fabric-{name}", {**rest, **state})
        starts, callback = start(name, STEPS)
        starts.fit(Ordered(start=STEPS, seed=2), ckpt_path=folder / f"fabric-{name}")
        close_weights(averaged(callback), whole_weights(state["model"].module), 0)
        with raises(ValueError, f"The key '{CURRENT}' of the state is where"):
            made.save(folder / "refused", {**state, CURRENT: {}})


def a_run_without_averages_goes_on_with_them(folder: Path) -> None:
    for name in FORMATS:
        plain = start(name, STEPS, callbacks=[])[0]
        plain.fit(Extra())
        plain.save_checkpoint(folder / f"plain-{name}")
        made, callback = start(name, STEPS)
        module = Extra(start=STEPS, seed=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.fit(module, ckpt_path=folder / f"plain-{name}")
        assert dist.get_rank() or any("was not created with WeightAveraging" in str(w.message) for w in caught)
        close_weights(averaged(callback), whole_weights(plain.lightning_module), 0)


CONTINUED: dict[str, Callable[[Path], None]] = {
    f"averaging-{name}": partial(averaging_continues, name=name) for name in FORMATS
}
ON_TWO = (the_average_is_what_others_load, files_are_those_of_lightnings_other_strategies, an_export_holds_both,
          fabric_goes_on_from_the_average, a_run_without_averages_goes_on_with_them)  # fmt: skip
