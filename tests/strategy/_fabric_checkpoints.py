"""Checkpoints of Fabric and of a Trainer are one format: each continues with the other's; for `test_continued`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memopt as lm
from lightning_memopt import MemOptFabricStrategy, MemOptFSDPStrategy
from tests.strategy._training import LanguageModule, raises, tokens, trainer, whole_weights
from tests.strategy.cases.fabric import fabric, network
from tests.strategy.cases.shared import close_weights

FORMATS = {"directory": True, "file": False}
STEPS = 2  # before the checkpoint, and after it
EXPECTED = "expected.pt"


class Ordered(LanguageModule):
    """Takes the batches of all ranks in a fixed order, from a given one on."""

    def __init__(self, start: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(network() if seed == 0 else type(network())())
        self.start = start

    def train_dataloader(self) -> Any:
        return DataLoader([mine(number) for number in range(self.start, 4)], batch_size=None)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = rates(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Counter:
    """Has a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def mine(number: int) -> Tensor:
    return tokens()[12 * number : 12 * number + 12][dist.get_rank() :: dist.get_world_size()]


def rates(module: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = lm.AdaPMLean(module.named_parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def start(distributed: bool, seed: int = 0) -> tuple[Fabric, dict[str, Any]]:
    made, module = fabric(MemOptFabricStrategy(save_distributed_checkpoint=distributed)), Ordered(seed=seed)
    optimizer, scheduler = rates(module)
    model, optimizer = made.setup(module, optimizer)
    return made, {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def go(made: Fabric, state: dict[str, Any], numbers: range) -> None:
    for number in numbers:
        made.backward(state["model"].loss(mine(number)))
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["scheduler"].step()


def by_trainer(distributed: bool, module: Ordered, **options: Any) -> Trainer:
    made = trainer(MemOptFSDPStrategy(save_distributed_checkpoint=distributed), max_steps=STEPS,
                   use_distributed_sampler=False)  # fmt: skip
    made.fit(module, **options)
    return made


def compare(module: nn.Module, folder: Path, *, exact: bool) -> None:
    expected = torch.load(folder / EXPECTED)
    close_weights(whole_weights(module), expected, 0 if exact else 1e-5)


# --- on two ranks ----------------------------------------------------------------------------------------------------


def saved(folder: Path) -> None:
    """Save with both after two steps, in both formats; keep the weights after four."""
    for name, distributed in FORMATS.items():
        by_trainer(distributed, Ordered()).save_checkpoint(folder / f"trainer-{name}")
        made, state = start(distributed)
        go(made, state, range(STEPS))
        counter = Counter()
        counter.count = 7
        made.save(folder / f"fabric-{name}", {**state, "counter": counter, "epoch": 1, "global_step": STEPS})
        go(made, state, range(STEPS, 2 * STEPS))
    weights = whole_weights(state["model"].module)
    if dist.get_rank() == 0:
        torch.save(weights, folder / EXPECTED)
    dist.barrier()


def values_and_objects_come_back(folder: Path) -> None:
    for name, distributed in FORMATS.items():
        made, state = start(distributed, seed=1)
        counter = Counter()
        given = {**state, "counter": counter, "epoch": 0}
        rest = made.load(folder / f"fabric-{name}", given)
        assert (counter.count, given["epoch"], given["model"]) == (7, 1, state["model"])
        assert rest["global_step"] == STEPS
        assert "pytorch-lightning_version" in rest
        assert not {"epoch", "counter", "state_dict", "optimizer_states"} & rest.keys()
        assert state["scheduler"].last_epoch == STEPS
        before = whole_weights(state["model"].module)
        for strict, missing in ((True, "other"), (False, "other")):
            given = {"model": state["model"], missing: 3}
            if strict:
                with raises(KeyError, f"fabric-{name}' has no 'other': leave it out of the state, or pass `strict=Fal"):
                    made.load(folder / f"fabric-{name}", given)
            else:
                made.load(folder / f"fabric-{name}", given, strict=False)
                assert given["other"] == 3
        close_weights(whole_weights(state["model"].module), before, 0)


def what_a_trainer_kept_is_returned_and_can_be_passed_on(folder: Path) -> None:
    """So that a Trainer counts on from where it was."""
    made, state = start(True, seed=1)
    rest = made.load(folder / "trainer-directory", state)
    assert rest["global_step"] == STEPS
    made.save(folder / "passed-on", {**rest, **state})
    module = Ordered(start=STEPS, seed=2)
    fitted = trainer("memopt_fsdp", max_steps=2 * STEPS, use_distributed_sampler=False)
    fitted.fit(module, ckpt_path=folder / "passed-on")
    assert fitted.global_step == 2 * STEPS
    assert len(module.losses) == STEPS


def some_of_the_weights(folder: Path) -> None:
    """Filters leave weights out; `strict=False` loads the rest. A file may also hold nothing but weights."""
    for name, distributed in FORMATS.items():
        made, state = start(distributed)
        again, other = start(distributed, seed=1)
        path = folder / f"filtered-{name}"
        before = whole_weights(other["model"].module)
        made.save(path, {"model": state["model"], "counts": {"a": 1, "b": 2}},
                  filter={"model": lambda key, _: "norm" not in key, "counts": lambda key, _: key == "b"})  # fmt: skip
        with raises(RuntimeError, "missing in the checkpoint: 'model.layers.0.input_layernorm.weight'"):
            again.load(path, {"model": other["model"]})
        assert again.load(path, {"model": other["model"]}, strict=False)["counts"] == {"b": 2}
        after, source = whole_weights(other["model"].module), whole_weights(state["model"].module)
        for key in after:
            torch.testing.assert_close(after[key], (before if "norm" in key else source)[key], rtol=0, atol=0)
        with raises(TypeError, "The filter for 'step' needs an object whose state is a dict, got int"):
            made.save(path, {"model": state["model"], "step": 1}, filter={"step": lambda *_: True})
    if dist.get_rank() == 0:
        torch.save(source, folder / "bare.pt")
    dist.barrier()
    for path in ("bare.pt", "trainer-file", "trainer-directory"):
        again, other = start(True, seed=1)
        again.load_raw(folder / path, other["model"])
        loaded = source if path == "bare.pt" else lm.load_weights(folder / path)
        close_weights(whole_weights(other["model"].module), loaded, 0)


def what_is_refused(folder: Path) -> None:
    made, state = start(True)
    model, optimizer, path = state["model"], state["optimizer"], folder / "refused"
    before = whole_weights(model.module)
    with raises(
        ValueError, "one module that was set up with this Fabric, and the state has none: pass {'model': model"
    ):
        made.save(path, {"optimizer": optimizer, "other": nn.Linear(2, 2)})
    with raises(ValueError, "and the state has 'model', 'second'"):
        made.save(path, {**state, "second": made.setup_module(network())})
    with raises(ValueError, "The key 'state_dict' of the state is where", "give the dict another key"):
        made.save(path, {"model": model, "state_dict": {}})
    with raises(TypeError, "`save_checkpoint(..., storage_options=...)` is not supported"):
        made.strategy.save_checkpoint(path, {"model": model.module}, storage_options={})
    with raises(ValueError, "`fabric.load` needs a state", "`lightning_memopt.load_weights(path)`"):
        made.load(folder / "fabric-file", {})
    with raises(NotImplementedError, "AdaPMLean cannot be loaded alone", "{'model': model, 'optimizer': optimizer}"):
        made.load_raw(folder / "fabric-file", optimizer)
    second = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
    with raises(ValueError, "has the states of 1 learning rate schedulers, and the state has 2"):
        made.load(folder / "fabric-directory", {**state, "second": second})
    with raises(ValueError, "has the states of 1 optimizers, but there are 2"):
        made.load(folder / "fabric-directory", {**state, "again": made.setup_optimizers(rates(model)[0])})
    with pytest.raises(RuntimeError, match="does not fit the model") as caught:
        made.load(folder / "fabric-file", {"model": made.setup_module(network())})
    assert "With Fabric, `strict=False` loads only the weights whose names match." in caught.value.__notes__
    close_weights(whole_weights(model.module), before, 0)


# --- on two ranks and on three ---------------------------------------------------------------------------------------


def fabric_continues(folder: Path, source: str, name: str) -> None:
    made, state = start(FORMATS[name], seed=1)
    made.load(folder / f"{source}-{name}", state)
    assert state["optimizer"].snapshot().step == STEPS
    go(made, state, range(STEPS, 2 * STEPS))
    compare(state["model"].module, folder, exact=dist.get_world_size() == 2)


def a_trainer_continues(folder: Path, name: str) -> None:
    module = Ordered(start=STEPS, seed=1)
    made = by_trainer(FORMATS[name], module, ckpt_path=folder / f"fabric-{name}")
    assert made.global_step == STEPS, "it counts its own steps"
    assert made.optimizers[0].snapshot().step == 2 * STEPS
    compare(module, folder, exact=dist.get_world_size() == 2)


CONTINUED: dict[str, Callable[[Path], None]] = {
    **{f"fabric-from-{source}-{name}": partial(fabric_continues, source=source, name=name)
       for source, name in itertools.product(("fabric", "trainer"), FORMATS)},
    **{f"trainer-from-fabric-{name}": partial(a_trainer_continues, name=name) for name in FORMATS},
}  # fmt: skip
ON_TWO = (values_and_objects_come_back, what_a_trainer_kept_is_returned_and_can_be_passed_on, some_of_the_weights,
          what_is_refused)  # fmt: skip
