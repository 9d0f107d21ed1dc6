"""The runs that a row of benchmarks/quality.py needs, and those that its table shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from _curves import loss_or_inf
from _studies import Row
from _train import Run

Result = Mapping[str, Any]
MAX_EXTENSIONS = 4


def runs_of(results: Sequence[Result], row: Row) -> list[Result]:
    """Return all runs of a row. Another row, or study, may have tried the same optimizer at other rates and seeds."""
    return [
        run
        for run in results
        if (run["variant"], run["ratio"]) == (row.variant, row.ratio)
        and run["seed"] in row.seeds
        and (row.tuned or run["lr"] == rounded(row.lr))
    ]


def needed(results: Sequence[Result], row: Row) -> list[Run]:
    """Return the runs of a row that can start now."""
    missing, best = _tuned(results, row)
    if missing:
        return [Run(row.variant, lr, row.seeds[0], row.ratio) for lr in missing]
    done = {(run["lr"], run["seed"]) for run in runs_of(results, row)}
    return [Run(row.variant, best, seed, row.ratio) for seed in row.seeds[1:] if (best, seed) not in done]


def best_runs(results: Sequence[Result], row: Row) -> list[Result]:
    """Return a row's runs at its best learning rate, sorted by seed; nothing while rates are still to be tried."""
    missing, best = _tuned(results, row)
    found = [] if missing else [run for run in runs_of(results, row) if run["lr"] == best]
    return sorted(found, key=lambda run: run["seed"])


def _tuned(results: Sequence[Result], row: Row) -> tuple[list[float], float]:
    """Return the learning rates that are still to be tried with the first seed, and the best one so far."""
    losses = {run["lr"]: loss_or_inf(run) for run in runs_of(results, row) if run["seed"] == row.seeds[0]}
    lrs = sorted({rounded(row.lr * factor) for factor in ((0.5, 1, 2) if row.tuned else (1,))})
    best = lrs[0]
    for _ in range(MAX_EXTENSIONS + 1):
        if missing := [lr for lr in lrs if lr not in losses]:
            return missing, best
        best = min(lrs, key=lambda lr: losses[lr])
        if len(lrs) == 1 or lrs[0] < best < lrs[-1]:
            break
        lrs = sorted([*lrs, rounded(best * 2 if best == lrs[-1] else best / 2)])
    return [], best


def rounded(lr: float) -> float:
    """Round off the last bits of a learning rate, so that it can be a key."""
    return float(f"{lr:.4g}")
