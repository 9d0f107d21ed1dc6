"""Steps that take as long as their Python: narrow models, and many small matrices."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from _peers import Build
from _step_models import Gradients, build_model, timed
from torch import nn

DEPTHS = (12, 48)
STEPS = 30
Table = tuple[list[str], list[list[str]]]


def host_times(builds: Mapping[str, Build], device: str) -> Table:
    """Time steps of narrow models, which compute almost nothing, in milliseconds."""
    rows = []
    for name, build in builds.items():
        medians = []
        for depth in DEPTHS:
            model = build_model((8, 16, depth, 1, 32), device, torch.float32)
            medians.append(statistics.median(_times(build(model), Gradients(model, device), device)))
        rows.append([name, *(f"{each * 1e3:.1f}" for each in medians)])
    return ["optimizer", *(f"{depth} layers (ms)" for depth in DEPTHS)], rows


def small_matrices(builds: Mapping[str, Build], device: str) -> Table:
    """Time steps of 400 matrices of 64 x 64, as a ratio to torch's ``foreach`` AdamW."""
    model = nn.ModuleDict({f"layer{number}": _layer(device) for number in range(400)})
    gradients = Gradients(model, device)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    rows = []
    for name, build in builds.items():
        theirs, mine = (statistics.median(_times(optimizer, gradients, device)) for optimizer in (base, build(model)))
        rows.append([name, f"{mine / theirs:.2f}", f"{mine * 1e3:.1f}"])
    return ["optimizer", "x foreach AdamW", "ms"], rows


def _layer(device: str) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(64, 64, bias=False, device=device)})})


def _times(optimizer: torch.optim.Optimizer, gradients: Gradients, device: str) -> list[float]:
    for _ in range(3):
        gradients.renew()
        optimizer.step()
    found = []
    for _ in range(STEPS):
        gradients.renew()
        found.append(timed(optimizer, device))
    return found
