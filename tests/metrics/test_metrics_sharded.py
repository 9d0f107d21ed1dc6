"""Metrics and the monitor on several processes: what all ranks hold together, counted on each of them by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MetricCollection

import lightning_memopt as lm
from lightning_memopt.metrics import MemorySavings, MomentumAllocation, OptimizerStateBytes, PeakMemory
from tests._attempt import attempt
from tests._ranks import run_ranks
from tests.strategy._training import LanguageModule, fit, raises

pytestmark = pytest.mark.slow

OPTIMIZERS: dict[str, Callable[[LightningModule], torch.optim.Optimizer]] = {
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
    "adapm_lean": lambda module: lm.AdaPMLean(module.named_parameters(), lr=1e-3, rank=2),
    "adam_snsm": lambda module: lm.AdamSNSM(module.named_parameters(), lr=1e-3, rank=2),
}
STEPS = 5
Found = dict[str, Any]


def held(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of this rank's memory behind the state, every storage once, without this package's code."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            local = value.to_local() if hasattr(value, "to_local") else value
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(size for address, size in storages.items() if address)


def everyone(number: int) -> list[int]:
    """Return the number of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, number)
    return found


def measured(strategy: str, name: str) -> Found:
    module = LanguageModule(optimizer=OPTIMIZERS[name])
    (optimizer,) = fit(module, strategy, max_steps=2).optimizers
    snapshot = lm.take_snapshot(optimizer, module)
    metrics = MetricCollection([OptimizerStateBytes(), MemorySavings(), PeakMemory()])
    metrics.update(snapshot)
    metrics.update(snapshot)  # counts nothing twice
    found = {key: value.item() for key, value in metrics.compute().items()}
    mine = everyone(held(optimizer))
    counters = everyone(snapshot.counter_bytes)
    params = everyone(sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in module.parameters()))
    assert found["total"] == sum(mine)
    assert found["rank"] == max(mine)
    assert found["counters"] == sum(counters)
    assert found["global"] == snapshot.state_bytes
    replicas = 1 if strategy == "memopt_fsdp" else dist.get_world_size()
    assert sum(mine) - sum(counters) == replicas * snapshot.state_bytes
    assert found["saved"] == pytest.approx(1 - (sum(mine) - sum(counters)) / (8 * sum(params)), abs=1e-6)
    assert found["parameters"] >= 4 * max(params)
    assert found["peak"] > found["parameters"] + found["optimizer_state"]
    allocation = MomentumAllocation()
    allocation.update(snapshot)
    return {**found, "allocation": {name: rank.item() for name, rank in allocation.compute().items()}}


def metrics_are_those_of_all_ranks(rank: int, world: int, folder: str) -> None:
    for name in OPTIMIZERS:
        sharded, replicated = measured("memopt_fsdp", name), measured("ddp", name)
        for key in ("global", "allocation"):
            assert sharded[key] == replicated[key], (name, key)
        assert sharded["saved"] == pytest.approx(replicated["saved"], abs=1e-6)
        assert replicated["momentum"] == world * sharded["momentum"]
        assert replicated["role/mlp"] == world * sharded["role/mlp"]
        assert (sharded["projections"] > 0) == (name == "adam_snsm")


class Recorded(CSVLogger):
    """Keeps what it was given."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.given: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.given.append((step or 0, {key: x for key, x in metrics.items() if key.startswith("memopt/")}))
        super().log_metrics(metrics, step)


def the_monitor_reports_once(rank: int, world: int, folder: str) -> None:
    for strategy in ("memopt_fsdp", "ddp"):
        for name, make in OPTIMIZERS.items():
            monitor, logger = lm.OptimizerMemoryMonitor(2, figures=True), Recorded(f"{folder}/{strategy}-{name}")
            module = LanguageModule(optimizer=make)
            made = fit(module, strategy, max_steps=STEPS, callbacks=[monitor], logger=logger)
            expected = [1, 2, 4, 5] if name == "AdamW" else [0, 2, 4, 5]
            assert [entry["step"] for entry in monitor.history] == expected
            last, total = monitor.history[-1], sum(everyone(held(made.optimizers[0])))
            assert last["state_bytes"] == total
            assert everyone(last) == [last] * world  # all ranks know, the first one reports
            assert [step for step, given in logger.given if given] == (expected if rank == 0 else [])
            assert made.progress_bar_metrics["saved %"] == pytest.approx(round(100 * last["saved"], 1), abs=1e-3)
            log_dir = Path(made.log_dir or "")  # a collective
            if rank == 0:
                content = json.loads((log_dir / "memory.json").read_text())
                assert content["world_size"] == world
                assert content["bytes"]["total"] == total
                assert content["history"] == monitor.history
                assert {path.name for path in log_dir.glob("*.png")} == {"memory.png", "momentum.png"}


def snapshots_of_another_job_are_refused(rank: int, world: int, folder: str) -> None:
    path = f"{folder}/facts.pt"
    module = LanguageModule(optimizer=OPTIMIZERS["adapm_lean"])
    (optimizer,) = fit(module, max_steps=1).optimizers
    snapshot = optimizer.snapshot()
    assert snapshot.world_size == world
    if rank == 0:
        torch.save([vars(block) | {"state": 0, "local": 0} for block in snapshot.blocks], path)  # plain facts only
    alone = torch.load(path, weights_only=True) if rank == 0 else []
    assert len(alone) == (len(snapshot.blocks) if rank == 0 else 0)
    import dataclasses

    with raises(ValueError, f"taken in a job of 1 processes, but this one has {world}", "Take a new one here"):
        OptimizerStateBytes().update(dataclasses.replace(snapshot, world_size=1))


class OnOneRank(torch.optim.SGD):
    """Keeps state on the first rank alone, as optimizers do that divide it by parameters."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if dist.get_rank() > 0:
            self.state.clear()
        return loss


def state_on_one_rank_only(rank: int, world: int, folder: str) -> None:
    monitor = lm.OptimizerMemoryMonitor(2)
    module = LanguageModule(optimizer=lambda module: OnOneRank(module.parameters(), lr=1e-3, momentum=0.9))
    made = fit(module, "ddp", max_steps=STEPS, callbacks=[monitor], default_root_dir=folder)
    size = everyone(held(made.optimizers[0]))
    assert size[0] > 0
    assert size[1:] == [0] * (world - 1)
    assert monitor.history[-1]["state_bytes"] == size[0]
    assert [entry["step"] for entry in monitor.history] == [1, 2, 4, 5]


CASES = (
    metrics_are_those_of_all_ranks,
    the_monitor_reports_once,
    snapshots_of_another_job_are_refused,
    state_on_one_rank_only,
)


def on_ranks(rank: int, world: int, folder: str) -> dict[str, str]:
    cases = CASES if world == 2 else CASES[:1]
    found = {}
    for case in cases:
        place = f"{folder}/{case.__name__}"
        Path(place).mkdir(exist_ok=True)
        found[case.__name__] = attempt(case, rank, world, place)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Callable[[Callable[..., None], int], list[str]]:
    """Return a function that says how a case went on every rank; the ranks start once for all cases."""

    @cache
    def run(world: int) -> list[dict[str, str]]:
        return run_ranks(on_ranks, world, str(tmp_path_factory.mktemp("metrics")))

    return lambda case, world: [entry[case.__name__] for entry in run(world) if entry[case.__name__]]


@pytest.mark.parametrize("world", [2, 3])
def test_metrics_are_those_of_all_ranks(outcomes, world):
    wrong = outcomes(metrics_are_those_of_all_ranks, world)
    assert not wrong, wrong[0]


def test_the_monitor_reports_once(outcomes):
    wrong = outcomes(the_monitor_reports_once, 2)
    assert not wrong, wrong[0]


def test_snapshots_of_another_job_are_refused(outcomes):
    wrong = outcomes(snapshots_of_another_job_are_refused, 2)
    assert not wrong, wrong[0]


def test_state_on_one_rank_only_does_not_hang(outcomes):
    wrong = outcomes(state_on_one_rank_only, 2)
    assert not wrong, wrong[0]
