"""Snapshots of a small model under many optimizers, and the metrics of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from torchmetrics import Metric

import lightning_memopt as lm
from lightning_memopt.metrics import (
    MemorySavings,
    MomentumAllocation,
    OptimizerStateBytes,
    PeakMemory,
    memory_savings,
    momentum_allocation,
    optimizer_state_bytes,
    peak_memory,
)
from tests._models import fill_grads

FUNCTIONS: dict[type[Metric], Callable[[lm.Snapshot], dict[str, Any]]] = {
    OptimizerStateBytes: optimizer_state_bytes,
    MemorySavings: memory_savings,
    PeakMemory: peak_memory,
    MomentumAllocation: momentum_allocation,
}
METRICS = list(FUNCTIONS)


class Network(nn.Module):
    def __init__(self, layers: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(40, 24)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 56) for _ in range(layers))
        self.lm_head = nn.Linear(24, 40, bias=False)
        self.to(dtype)


MODEL = Network()


def ours(recipe: str = "adapm_lean", model: nn.Module | None = None, **options: Any) -> lm.MemOpt:
    return lm.MemOpt((MODEL if model is None else model).named_parameters(), recipe, **options)


def adamw(model: nn.Module | None = None, **options: Any) -> torch.optim.AdamW:
    model = Network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    fill_grads(list(model.parameters()), seed=0)
    optimizer.step()
    return optimizer


def snapshot(recipe: str = "adapm_lean", **options: Any) -> lm.Snapshot:
    return lm.take_snapshot(ours(recipe, **options), MODEL)


def values(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in result.items()}


def updated(kind: type[Metric], *snapshots: lm.Snapshot, **options: Any) -> Any:
    metric = kind(**options)
    for entry in snapshots:
        metric.update(entry)
    return metric


def computed(kind: type[Metric], *snapshots: lm.Snapshot) -> dict[str, Any]:
    return values(updated(kind, *snapshots).compute())


def history(metric: Any) -> dict[str, list[int]]:
    """Return the ranks of every block, also where one entry has made them a number."""
    return {name: ranks.reshape(-1).tolist() for name, ranks in metric.compute().items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(first[key] == pytest.approx(second[key], rel=1e-6) for key in first)


SNAPSHOTS: dict[str, Callable[[], lm.Snapshot]] = {
    **{recipe: (lambda recipe=recipe: snapshot(recipe)) for recipe in lm.recipe_names()},
    "torch's AdamW": lambda: lm.take_snapshot(adamw(MODEL), MODEL),
    "torch's Adafactor": lambda: lm.take_snapshot(other(torch.optim.Adafactor), MODEL),
    "RMSprop": lambda: lm.take_snapshot(other(torch.optim.RMSprop, centered=True, momentum=0.9), MODEL),
    "two optimizers": lambda: lm.take_snapshot([ours("adam_snsm"), other(torch.optim.SGD, momentum=0.9)], MODEL),
}


def other(kind: Any, **options: Any) -> torch.optim.Optimizer:
    model = MODEL
    optimizer = kind(model.parameters(), lr=0.0, **options)
    fill_grads(list(model.parameters()), seed=0)
    optimizer.step()
    return optimizer


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes under every key of the state, from the number of elements."""
    found: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            key = key.rpartition(".")[2]
            found[key] = found.get(key, 0) + value.numel() * value.element_size()
    return found


HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def at(optimizer: lm.MemOpt, step: int) -> lm.Snapshot:
    return replace(optimizer.snapshot(), step=step)


def changed_over_steps() -> tuple[lm.MemOpt, Any]:
    """Rank 6, at step 3 rank 2, at step 7 none, at step 9 dense."""
    optimizer, metric = ours(rank=6), MomentumAllocation()
    metric.update(at(optimizer, 0))
    for step, change in ((3, {"rank": 2}), (7, {"momentum": "none"}), (9, {"momentum": "dense"})):
        metric.update(at(optimizer, step - 1))
        optimizer.reformat({HEAD: change})
        metric.update(at(optimizer, step))
    return optimizer, metric
