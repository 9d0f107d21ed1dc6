"""The plots of benchmarks/adaptive.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _adaptive_models import FAMILIES
from _adaptive_report import Result, by_seed, chosen, mean_of, middle, spread, with_ratio
from _adaptive_train import ADAMW, LEAN, PLOTTED, POLICIES, UNIFORM, Comparison

from lightning_memopt.figures.heat_map import figure_size, heat_map
from lightning_memopt.figures.style import COLORS, DPI, SMALL, STRONG, TITLE, finish, new_figure

# Colors and markers of policies do not depend on which of them a figure shows.
_STYLED = (UNIFORM, "energy", "benefit", "schedule", "paper", "fidelity", "roles")
MARKERS = dict(zip(_STYLED, "osD^vPX", strict=True))
LINES = dict(zip(_STYLED, (*COLORS, STRONG), strict=True))


def finished(runs: Mapping[int, Result]) -> list[Result]:
    return [run for run in runs.values() if run["loss"] is not None]


def plot_losses(results: Sequence[Result], comparison: Comparison, path: Path) -> None:
    """Plot loss against momentum, one panel per model and ratio of rates."""
    budgets = comparison.budgets
    here = chosen(results, middle(budgets))
    panels = [(ratio, model) for ratio in comparison.ratios for model in comparison.models]
    panels = [(r, model) for r, model in panels if any(run["model"] == model for run in with_ratio(here, r))]
    if not panels:
        return
    alone = len(panels) == 1
    figure = new_figure(7.2 if alone else 5.6 * len(panels), 5.8 if alone else 5.4)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (ratio, model) in zip(axes[0], panels, strict=True):
        _losses(axis, with_ratio(here, ratio), model, budgets, "" if ratio == 1.0 else f", ratio {ratio:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = 3 if alone else len(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL)
    note = "markers moved apart sideways; bars: deviation over seeds"
    title = f"Held-out loss at equal momentum{chr(10) if alone else ' '}({note})"
    figure.suptitle(title, fontsize=TITLE)
    figure.savefig(path, dpi=DPI)


def _losses(axis: Any, results: Sequence[Result], model: str, budgets: Sequence[float], rates: str) -> None:
    shown = {
        policy: rows
        for policy in POLICIES
        if (rows := [runs for b in sorted(budgets) if (runs := finished(by_seed(results, model, policy, b)))])
    }
    for index, (policy, rows) in enumerate(shown.items()):
        # Equal bytes would put all markers on top of each other.
        shift = 1 + 0.035 * (index - (len(shown) - 1) / 2)
        _points(axis, rows, shift, color=LINES[policy], marker=MARKERS[policy], label=policy, alpha=0.9)
    if lean := finished(by_seed(results, model, LEAN, None)):
        _points(axis, [lean], 1.0, color=STRONG, marker="*", markersize=12, label=f"{LEAN} without callback")
    title = FAMILIES[model].title + rates
    if adamw := [run["loss"] for run in finished(by_seed(results, model, ADAMW, None))]:
        own = f" ± {spread(adamw):.3f}" if len(adamw) > 1 else ""
        title += f"\nAdamW, 100% of the momentum: {statistics.fmean(adamw):.3f}{own}"
    axis.set_xscale("log")
    axis.set_xticks([100 * budget for budget in sorted(budgets)], [f"{budget:.1%}" for budget in sorted(budgets)])
    axis.minorticks_off()
    finish(axis, title=title, x="momentum, average over the training, share of AdamW's", y="held-out loss")


def _points(axis: Any, rows: Sequence[Sequence[Result]], shift: float, **style: Any) -> None:
    means = [mean_of(runs, "loss") for runs in rows]
    bars = [spread([run["loss"] for run in runs]) for runs in rows]
    shares = [100 * shift * mean_of(runs, "momentum_mean") for runs in rows]
    axis.errorbar(shares, means, yerr=bars, capsize=3, linewidth=1.0, **{"markersize": 7, **style})


def plot_allocation(results: Sequence[Result], comparison: Comparison, path: Path) -> None:
    """Plot the rank of each block over the steps at one rate for all, one panel per policy."""
    budget = middle(comparison.budgets)
    here = with_ratio(chosen(results, budget), 1.0)
    runs = {policy: next(iter(by_seed(here, PLOTTED, policy, budget).values()), None) for policy in comparison.shown}
    found = {policy: run["allocation"] for policy, run in runs.items() if run and run["allocation"]}
    if not found:
        return
    width, height = figure_size(max(len(each["blocks"]) for each in found.values()))
    figure = new_figure(width * len(found), height)
    largest = max(rank for each in found.values() for ranks in each["ranks"] for rank in ranks)
    for axis, (policy, each) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        ranks = zip(*each["ranks"], strict=True)
        table = {f"{short(name)}  {row[-1]}": row for name, row in zip(each["blocks"], ranks, strict=True)}
        title = f"{policy}, {FAMILIES[PLOTTED].title} at {budget:.1%} (beside the names: ranks at the end)"
        last = runs[policy]["settings"]["steps"]  # type: ignore[index]
        heat_map(axis, each["steps"], table, until=last, largest=largest, title=title)
    figure.savefig(path, dpi=DPI)


def short(name: str) -> str:
    """Return a block's name without the parts that all names share."""
    parts = [part for part in name.split(".") if part not in ("model", "weight", "self_attn", "mlp", "layers")]
    return ".".join(parts)
