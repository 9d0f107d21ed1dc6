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
    model = nn.Module()
    for layer in range(400):
        parent = nn.Module()
        parent.up_proj = nn.Linear(64, 64, bias=False, device=device)
        mlp = nn.Module()
        mlp.mlp = parent
        model.add_module(f"layers_{layer}", mlp)
    gradients = Gradients(model, device)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    rows = []
    for name, build in builds.items():
        both = zip(_times(base, gradients, device), _times(build(model), gradients, device), strict=True)
        pairs = [(theirs, mine) for theirs, mine in both]
        ratio = statistics.median(mine for _, mine in pairs) / statistics.median(theirs for theirs, _ in pairs)
        rows.append([name, f"{ratio:.2f}", f"{statistics.median(mine for _, mine in pairs) * 1e3:.1f}"])
    return ["optimizer", "x foreach AdamW", "ms"], rows


def _times(optimizer: torch.optim.Optimizer, gradients: Gradients, device: str) -> list[float]:
    for _ in range(3):
        gradients.renew()
        optimizer.step()
    found = []
    for _ in range(STEPS):
        gradients.renew()
        found.append(timed(optimizer, device))
    return found
