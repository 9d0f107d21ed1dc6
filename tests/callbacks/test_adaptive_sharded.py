"""AdaptiveMomentum on several processes: the decisions of one process, the same on all, one budget for all of them."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, Trainer
from torch.distributed.tensor import DTensor

from lightning_memopt import AdaptiveMomentum, MemOptFSDPStrategy, OptimizerMemoryMonitor
from lightning_memopt.sharding.tensors import local_tensor
from tests._attempt import attempt
from tests._ranks import run_ranks
from tests.callbacks import _adaptive as single
from tests.strategy._training import raises, trainer, whole_weights

pytestmark = pytest.mark.slow

STEPS, SAVED = 11, 8
STRATEGIES = ("memopt_fsdp", "ddp")
RUNS: dict[str, tuple[str, str, Any]] = {
    "energy": ("adapm_lean", "energy", 0.25),
    "benefit": ("adam_snsm", "benefit", 0.3),
    "quality": ("adapm", "energy", None),
}


class Module(single.Module):
    """Every rank sees its part of the batch of a step: twelve sequences on all of them together."""

    def loss(self, seed: int) -> Tensor:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        batch = single.tokens(seed, 12)[rank::world]
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class Watch(Callback):
    """Checks that what all ranks hold is what the plan says, and within the budget."""

    def __init__(self, budget: int | None) -> None:
        self.budget, self.local = budget, 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        optimizer, replicas, held = trainer.optimizers[0], 1, 0
        for _, param, block in optimizer.blocks():
            replicas = 1 if isinstance(param, DTensor) else trainer.world_size
            for key in block.recipe.momentum.keys:
                held += local_tensor(optimizer.state[param][block.prefix + key]).untyped_storage().nbytes()
        self.local = held
        everyone = torch.tensor(held)
        dist.all_reduce(everyone)
        assert int(everyone) == replicas * optimizer.snapshot().momentum_bytes
        assert self.budget is None or int(everyone) <= replicas * self.budget


class Saves(Callback):
    def __init__(self, path: Path, *, stop: bool = False) -> None:
        self.path, self.stop = path, stop

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop


def adaptive(run: str, kind: type[AdaptiveMomentum] = AdaptiveMomentum) -> AdaptiveMomentum:
    _, policy, budget = RUNS[run]
    return kind(budget, policy, every_n_steps=3, start=2, freeze_after=None, max_moves=4)


def fit(run: str, callback: AdaptiveMomentum, *others: Callback, strategy: Any, ckpt_path: Any = None) -> Module:
    module = Module(RUNS[run][0])
    made = trainer(strategy, max_steps=STEPS, limit_val_batches=0, callbacks=[callback, *others])
    made.fit(module, ckpt_path=ckpt_path)
    return module


def same_decisions(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare what was decided exactly, and why up to the rounding of sums in another order."""
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("step", "moves", "ranks", "momentum_bytes"):
            assert ours[key] == theirs[key], f"step {theirs['step']}, {key}: {ours[key]}, expected {theirs[key]}"
        for key in ("oscillation", "residual"):
            far = {name: (ours[key][name], x) for name, x in theirs[key].items() if abs(ours[key][name] - x) > 1e-3}
            assert not far, f"step {theirs['step']}, {key}: {far}"


Expected = dict[str, tuple[list[dict[str, Any]], dict[str, Tensor]]]


def as_on_one_process(folder: Path, expected: Expected) -> None:
    for run, (history, weights) in expected.items():
        budget = RUNS[run][2]
        for strategy in STRATEGIES if run == "energy" else STRATEGIES[:1]:
            callback = adaptive(run)
            watch = Watch(None if budget is None else int(budget * single.dense_bytes(Module())))
            module = fit(run, callback, watch, strategy=strategy)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, callback.history)
            assert everyone == [callback.history] * len(everyone), "bit by bit the same on every rank"
            same_decisions(callback.history, history)
            for name, value in whole_weights(module).items():
                torch.testing.assert_close(value, weights[name], rtol=0, atol=2e-3, msg=f"{run}, {strategy}: {name}")
            if strategy == "memopt_fsdp":
                assert 0.3 * history[-1]["momentum_bytes"] < watch.local < 0.7 * history[-1]["momentum_bytes"]


class Disagrees(AdaptiveMomentum):
    """The last rank wants more, or all but the first want nothing at all."""

    nothing = False

    def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
        rank = dist.get_rank()
        return {"model.lm_head.weight": {"rank": 1 + rank}} if rank == 0 or not self.nothing else {}


def ranks_that_disagree_all_raise(folder: Path, expected: Expected) -> None:
    for strategy in STRATEGIES:
        for nothing in (False, True):
            callback = adaptive("energy", Disagrees)
            callback.nothing = nothing
            first = "rank 0 has \"model.lm_head.weight: {'rank': 1}\", rank 1 has "
            second = "'nothing'" if nothing else "\"model.lm_head.weight: {'rank': 2}\""
            with raises(RuntimeError, f"Ranks disagree about AdaptiveMomentum's changes: {first}{second}"):
                fit("energy", callback, strategy=strategy)
            assert [entry["step"] for entry in callback.history] == [0]


class Fails(AdaptiveMomentum):
    """Reads what only the other ranks can read."""

    def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise OSError("no such file")
        return {}


def what_one_rank_raises_all_do(folder: Path, expected: Expected) -> None:
    text = "Rank 1 could not decide about AdaptiveMomentum's changes: OSError: no such file. Nothing has changed."
    for strategy in STRATEGIES:
        callback = adaptive("energy", Fails)
        with raises(*((OSError, "no such file") if dist.get_rank() == 1 else (RuntimeError, text))):
            fit("energy", callback, strategy=strategy)
        assert [entry["step"] for entry in callback.history] == [0]


class Overspends(AdaptiveMomentum):
    def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
        return {name: {"momentum": "dense"} for name in signals}


def the_budget_is_that_of_all_ranks(folder: Path, expected: Expected) -> None:
    for strategy in STRATEGIES:
        with raises(ValueError, "requested changes that need", "Nothing has changed"):
            fit("energy", adaptive("energy", Overspends), strategy=strategy)


def goes_on_from_three_ranks(folder: Path, expected: Expected) -> None:
    callback = adaptive("energy")
    fit("energy", callback, strategy="memopt_fsdp", ckpt_path=folder / "three")
    same_decisions(callback.history, expected["energy"][0])


def saves_for_one_process(folder: Path, expected: Expected) -> None:
    """A file each: what a single device reads."""
    for name in STRATEGIES:
        strategy = MemOptFSDPStrategy(save_distributed_checkpoint=False) if name == "memopt_fsdp" else name
        fit("energy", adaptive("energy"), Saves(folder / f"two, {name}.ckpt", stop=True), strategy=strategy)


def figures_and_early_ends(folder: Path, expected: Expected) -> None:
    """Only the first rank draws, and none waits for it."""
    for strategy in STRATEGIES:
        place, callback = folder / f"figures, {strategy}", adaptive("energy")
        callback.figures = True
        made = trainer(strategy, max_steps=3, limit_val_batches=0, callbacks=[callback], default_root_dir=place)
        made.fit(Module())
        dist.barrier()
        assert (place / "allocation.png").stat().st_size > 5000


class Interrupts(Callback):
    """Stops one rank, as with Ctrl-C, at the end of a batch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            raise KeyboardInterrupt


def an_interrupted_run_draws_and_no_rank_waits(folder: Path, expected: Expected) -> None:
    for strategy in STRATEGIES:
        place, first, second = folder / f"interrupted, {strategy}", adaptive("energy"), OptimizerMemoryMonitor(2)
        first.figures = second.figures = True
        callbacks: Any = [Interrupts(0), first, second, Interrupts(1)]
        made = trainer(strategy, max_steps=9, limit_val_batches=0, callbacks=callbacks, default_root_dir=place)
        with raises(SystemExit, "1"):
            made.fit(Module())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        dist.barrier()
        assert {path.name for path in place.iterdir()} == {
            "allocation.png",
            "memory.json",
            "memory.png",
            "momentum.png",
        }


CASES = (
    an_interrupted_run_draws_and_no_rank_waits,
    as_on_one_process,
    ranks_that_disagree_all_raise,
    what_one_rank_raises_all_do,
    the_budget_is_that_of_all_ranks,
    goes_on_from_three_ranks,
    saves_for_one_process,
    figures_and_early_ends,
)


def quietly() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def on_two(rank: int, world: int, folder: Path, expected: Expected) -> dict[str, str]:
    quietly()
    return {case.__name__: attempt(case, folder, expected) for case in CASES}


def on_three(rank: int, world: int, folder: Path, expected: Expected) -> dict[str, str]:
    """Save a directory."""
    quietly()

    def run() -> None:
        callback = adaptive("energy")
        strategy = MemOptFSDPStrategy(save_distributed_checkpoint=True)
        fit("energy", callback, Saves(folder / "three"), strategy=strategy)
        same_decisions(callback.history, expected["energy"][0])

    return {"on_three": attempt(run)}


@pytest.fixture(scope="module")
def expected() -> Expected:
    found = {}
    for run, (recipe, _, _) in RUNS.items():
        module, callback = Module(recipe), adaptive(run)
        single.fit(module, callback, max_steps=STEPS)
        found[run] = (callback.history, single.weights(module))
        assert sum(single.moved(callback)) > 0, run
    return found


@pytest.fixture(scope="module")
def outcomes(expected, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("adaptive")
    found = {"on_three": [entry["on_three"] for entry in run_ranks(on_three, 3, folder, expected)]}
    two = run_ranks(on_two, 2, folder, expected, timeout=200)
    return folder, found | {name: [entry[name] for entry in two] for name in two[0]}


@pytest.mark.parametrize("case", ["on_three", *(case.__name__ for case in CASES)])
def test_on_ranks(outcomes, case):
    wrong = [error for error in outcomes[1][case] if error]
    assert not wrong, wrong[0]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_goes_on_from_two(outcomes, expected, strategy):
    callback = adaptive("energy")
    single.fit(Module(), callback, max_steps=STEPS, ckpt_path=outcomes[0] / f"two, {strategy}.ckpt")
    same_decisions(callback.history, expected["energy"][0])
