"""The plots of benchmarks/adaptive.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _adaptive_models import FAMILIES
from _adaptive_report import Result, by_seed, chosen, mean_of, middle, spread
from _adaptive_train import ADAMW, LEAN, PLOTTED, POLICIES

MARKERS = dict(zip(POLICIES, "osD^v", strict=True))
COLORS = dict(zip(POLICIES, ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
STEPS_OF_COLOR = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 24, 40)
SHOWN = ("benefit", "energy")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def finished(runs: Mapping[int, Result]) -> list[Result]:
    return [run for run in runs.values() if run["loss"] is not None]


def plot_losses(results: Sequence[Result], budgets: Sequence[float], path: Path) -> None:
    """Plot loss against momentum, one panel per model."""
    here = chosen(results, middle(budgets))
    models = [model for model in FAMILIES if any(run["model"] == model for run in here)]
    if not models:
        return
    plt = pyplot()
    figure, axes = plt.subplots(1, len(models), figsize=(5.6 * len(models), 5.4), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        _losses(axis, here, model, budgets)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Held-out loss at equal momentum (markers moved apart sideways; bars: deviation over seeds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Any, results: Sequence[Result], model: str, budgets: Sequence[float]) -> None:
    for index, policy in enumerate(POLICIES):
        rows = [runs for b in sorted(budgets) if (runs := finished(by_seed(results, model, policy, b)))]
        # Equal bytes would put all markers on top of each other.
        shift = 1 + 0.035 * (index - (len(POLICIES) - 1) / 2)
        _points(axis, rows, shift, color=COLORS[policy], marker=MARKERS[policy], label=policy, alpha=0.9)
    if lean := finished(by_seed(results, model, LEAN, None)):
        _points(axis, [lean], 1.0, color="#888888", marker="*", markersize=12, label=f"{LEAN} without callback")
    title = FAMILIES[model].title
    if adamw := [run["loss"] for run in finished(by_seed(results, model, ADAMW, None))]:
        own = f" ± {spread(adamw):.3f}" if len(adamw) > 1 else ""
        title += f"\nAdamW, 100% of the momentum: {statistics.fmean(adamw):.3f}{own}"
    axis.set(title=title, xscale="log", xlabel="momentum, average over the training, % of AdamW's")
    axis.set_ylabel("held-out loss")
    axis.set_xticks([100 * budget for budget in sorted(budgets)], [f"{budget:.1%}" for budget in sorted(budgets)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _points(axis: Any, rows: Sequence[Sequence[Result]], shift: float, **style: Any) -> None:
    means = [mean_of(runs, "loss") for runs in rows]
    bars = [spread([run["loss"] for run in runs]) for runs in rows]
    shares = [100 * shift * mean_of(runs, "momentum_mean") for runs in rows]
    axis.errorbar(shares, means, yerr=bars, capsize=3, linewidth=1.0, **{"markersize": 7, **style})


def plot_allocation(results: Sequence[Result], budget: float, path: Path) -> None:
    """Plot the rank of each block over the steps, one panel per policy."""
    here = chosen(results, budget)
    runs = {policy: next(iter(by_seed(here, PLOTTED, policy, budget).values()), None) for policy in SHOWN}
    found = {policy: run["allocation"] for policy, run in runs.items() if run and run["allocation"]}
    if not found:
        return
    plt = pyplot()
    height = 1.6 + 0.21 * max(len(each["blocks"]) for each in found.values())
    figure, axes = plt.subplots(1, len(found), figsize=(7.5 * len(found), height), layout="constrained", squeeze=False)
    for axis, (policy, each) in zip(axes[0], found.items(), strict=True):
        image = _allocation(axis, each, plt, runs[policy]["settings"]["steps"])  # type: ignore[index]
        axis.set_title(f"{policy}, {FAMILIES[PLOTTED].title} at {budget:.1%} (numbers: at the end)")
    figure.colorbar(
        image, ax=axes, label="rank; white: no momentum", ticks=STEPS_OF_COLOR, spacing="uniform", aspect=40
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _allocation(axis: Any, each: Mapping[str, Any], plt: Any, last: int) -> Any:
    from matplotlib.colors import BoundaryNorm

    colors = plt.get_cmap("viridis").with_extremes(under="white")
    norm = BoundaryNorm(STEPS_OF_COLOR, colors.N, extend="both")
    ranks = [list(column) for column in zip(*each["ranks"], strict=True)]
    edges = [*each["steps"], max(last, each["steps"][-1] + 1)]
    image = axis.pcolormesh(edges, range(len(ranks) + 1), ranks, cmap=colors, norm=norm)
    axis.set_yticks([row + 0.5 for row in range(len(ranks))], [short(name) for name in each["blocks"]], fontsize=8)
    for row, values in enumerate(ranks):
        axis.text(1.01, row + 0.5, f"{values[-1]}", transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("step")
    return image


def short(name: str) -> str:
    """Return a block's name without the parts that all names share."""
    parts = [part for part in name.split(".") if part not in ("model", "weight", "self_attn", "mlp", "layers")]
    return ".".join(parts)
