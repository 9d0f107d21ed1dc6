"""Metrics where shards are uneven, over repeated updates, and from jobs of other sizes."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("lightning.pytorch")

import lightning_memopt as lm
from lightning_memopt.metrics import MemorySavings, MomentumAllocation, OptimizerStateBytes, PeakMemory
from tests._ranks import run_ranks
from tests.strategy._training import LanguageModule, Network, fit, raises

pytestmark = pytest.mark.slow

RECIPES = ("adapm_lean", "adam_snsm", "adamw")


class Uneven(Network):
    """Its head has one row more than ranks divide, its bias fewer entries than there are ranks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.lm_head = nn.Linear(8, 13, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return super().forward(batch) + self.bias


def module_of(recipe: str) -> LanguageModule:
    def make(module: Any) -> torch.optim.Optimizer:
        return lm.MemOpt(module.named_parameters(), recipe, lr=1e-3, **({"rank": 2} if recipe != "adamw" else {}))

    return LanguageModule(Uneven(), make)


def computed(*metrics: Any, snapshot: lm.Snapshot) -> dict[str, Any]:
    found = {}
    for metric in metrics:
        metric.update(snapshot)
        found |= {key: value.tolist() for key, value in metric.compute().items()}
    return found


def on_ranks(rank: int, world: int, alone: dict[str, Any], folder: str) -> bytes:
    kept = b""
    for recipe in RECIPES:
        for strategy, copies in (("memopt_fsdp", 1), ("ddp", world)):
            made = fit(module_of(recipe), strategy, max_steps=2)
            snapshot = lm.take_snapshot(made.optimizers, made.lightning_module)
            found = computed(OptimizerStateBytes(), MemorySavings(), MomentumAllocation(), snapshot=snapshot)
            expected, place = alone[recipe], f"{recipe}, {strategy}, {rank} of {world}"
            for key, value in expected.items():
                if key in ("counters", "total", "rank"):
                    continue
                if key == "global" or key.endswith((".weight", ".bias")):
                    assert found[key] == value, f"{place}: {key}"
                elif key.startswith("saved"):
                    assert found[key] == pytest.approx(value, abs=1e-6), f"{place}: {key}"
                else:
                    assert found[key] == copies * value, f"{place}: {key}"
            counters = [0] * world
            dist.all_gather_object(counters, 4 * len(made.optimizers[0].state))
            assert found["total"] == copies * expected["global"] + sum(counters), place
            if strategy == "ddp":
                assert found["rank"] == expected["rank"], place
                assert found["saved"] == pytest.approx(snapshot.saved, abs=1e-6)
                # One process's own view is what the function returns.
                own = lm.metrics.optimizer_state_bytes(snapshot)
                assert own["total"] == expected["rank"]
            kept = pickle.dumps(snapshot)
    peak = PeakMemory()
    memory = replace(snapshot.memory, parameters=10 * (rank + 1), gradients=5 if rank else 7, peak=1000 + rank)
    peak.update(replace(snapshot, memory=memory))
    found = {key: int(value) for key, value in peak.compute().items()}
    assert (found["parameters"], found["gradients"], found["peak"]) == (10 * world, 7, 1000 + world - 1)
    assert int(peak.most[0]) == 10 * (rank + 1), "what this process has seen is as it was after compute()"
    # The metric is alive after a compute(): the next update replaces, in every process.
    metric = OptimizerStateBytes()
    for _ in range(3):
        metric.update(snapshot)
        assert int(metric.compute()["global"]) == snapshot.state_bytes
    assert int(metric(snapshot)["global"]) == snapshot.state_bytes
    with raises(ValueError, f"taken in a job of 7 processes, but this one has {world}", "Take a new one here"):
        metric.update(replace(snapshot, world_size=7))
    return kept


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = {}
    for recipe in RECIPES:
        module = module_of(recipe)
        optimizer = module.configure_optimizers()
        found[recipe] = computed(
            OptimizerStateBytes(), MemorySavings(), MomentumAllocation(), snapshot=optimizer.snapshot()
        )
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_shards_are_measured_as_on_one_process_and_their_snapshots_refused_there(alone, world, tmp_path):
    for content in run_ranks(on_ranks, world, alone, str(tmp_path)):
        snapshot = pickle.load(io.BytesIO(content))
        assert snapshot.world_size == world
        for kind in (OptimizerStateBytes, MemorySavings, PeakMemory, MomentumAllocation):
            with pytest.raises(ValueError, match=rf"job of {world} processes, but this one has 1.*Take a new one here"):
                kind().update(snapshot)
        assert lm.metrics.optimizer_state_bytes(snapshot)["total"] > 0, "the function reads it"
