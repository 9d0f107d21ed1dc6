"""The page and the plot of benchmarks/convergence.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _report import markdown, origins
from _train import Settings
from _variants import REFERENCE, VARIANTS

from lightning_memopt.figures.style import COLORS, DPI, SMALL, TITLE, finish, new_figure
from lightning_memopt.figures.style import REFERENCE as BLACK

Results = Sequence[Mapping[str, Any]]


def loss_or_inf(result: Mapping[str, Any]) -> float:
    """Return the loss of a run; infinity if it diverged."""
    return math.inf if result["loss"] is None else result["loss"]


def best_runs(results: Results, variant: str) -> list[Mapping[str, Any]]:
    """Return a variant's runs at the best learning rate of the first seed, sorted by seed."""
    mine = sorted((result for result in results if result["variant"] == variant), key=lambda result: result["seed"])
    if not mine:
        return []
    lr = min((result for result in mine if result["seed"] == mine[0]["seed"]), key=loss_or_inf)["lr"]
    return [result for result in mine if result["lr"] == lr]


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the main table, best mean first."""
    found = {name: best_runs(results, name) for name in VARIANTS}
    means = {name: statistics.fmean(map(loss_or_inf, runs)) for name, runs in found.items() if runs}
    seeds = sorted({run["seed"] for runs in found.values() for run in runs})
    head = ["optimizer", "betas", "lr", *(f"seed {seed}" for seed in seeds), "mean", "std", "to AdamW"]
    rows = []
    for name in sorted(means, key=lambda name: means[name]):
        runs = {run["seed"]: run for run in found[name]}
        first = found[name][0]
        losses = [f"{loss_or_inf(runs[seed]):.3f}" if seed in runs else "" for seed in seeds]
        spread = f"{statistics.stdev(map(loss_or_inf, runs.values())):.3f}" if _measurable(runs) else ""
        other = f"{means[name] / means[REFERENCE] - 1:+.2%}" if REFERENCE in means else ""
        momentum, state = (
            2 * first["momentum_bytes"] / first["adamw_bytes"],
            first["state_bytes"] / first["adamw_bytes"],
        )
        betas = "{}, {}".format(*VARIANTS[name].betas)
        numbers = [f"{means[name]:.3f}", spread, other, f"{momentum:.1%}", f"{state:.1%}"]
        rows.append([name, betas, f"{first['lr']:.3g}", *losses, *numbers])
    return [*head, "momentum", "state"], rows


def _measurable(runs: Mapping[int, Mapping[str, Any]]) -> bool:
    return len(runs) > 1 and all(run["loss"] is not None for run in runs.values())


def tuning(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the table of all learning rates tried with the first seed."""
    head = ["optimizer", "lr x", "loss at each lr (seed of the tuning)"]
    rows = []
    for name, variant in VARIANTS.items():
        seeds = [result["seed"] for result in results if result["variant"] == name]
        mine = [result for result in results if result["variant"] == name and result["seed"] == min(seeds)]
        tried = sorted((result["lr"], loss_or_inf(result)) for result in mine)
        if tried:
            cells = ", ".join(f"{lr:.3g}: {loss:.3f}" for lr, loss in tried)
            rows.append([name, f"{variant.lr_multiplier:g}", cells])
    return head, rows


def page(results: Results, settings: Settings, grid: Sequence[float]) -> str:
    """Return the markdown page."""
    shape = (
        f"{settings.layers} layers, width {settings.hidden}, {settings.heads} heads, vocabulary {settings.vocabulary}"
    )
    stated = ", ".join(f"{lr:g}" for lr in grid)
    return f"""# Convergence

A LLaMA ({shape}, untied head) trained from scratch on tokens of the {settings.data}: {settings.steps} steps of
{settings.batch} x {settings.length} tokens, {settings.warmup:.0%} linear warm-up, then a cosine to
{settings.final_lr:.0%} of the learning rate, weight decay {settings.weight_decay:g}, gradients clipped to norm
{settings.clip:g}. At a given seed, all optimizers share initial weights and batches. The learning rate is tuned
for each optimizer with the first seed on the grid {stated} (times "lr x" below; extended by factors of two while the
best is at its edge). The other seeds then run at the best rate. Loss: mean over {settings.validation_tokens:,} held-out
tokens at the end; the curves use the first {settings.curve_tokens:,} of them. "momentum" and "state" are shares of
AdamW's bytes. Differences under about 0.4% are ties. One small model and one corpus show whether there is parity, no
more.

"ratio 11.3" gives embeddings and norms 11.3 times the learning rate of linear weights:
`overrides={{"embedding": {{"lr_multiplier": 11.3}}, "vector": {{"lr_multiplier": 11.3}}}}`. The runs shown used groups
made by hand: over 40 steps of each variant and two seeds, both ways give the same losses, bit for bit.

All runs but those of 2026-11-27 predate the bound on updates. A check with the bound of 10 (2026-11-26, seed 0, the
rates of the table) found 3.813 for adafactor ([bound.md](bound.md)). adapm, adapm_lean and adam_snsm ran again at their
best rates on 2026-11-27, after steps of equal blocks were combined: their means moved by -0.2%, +0.4% and +0.6%, within
the spread of the seeds.

{markdown(*table(results))}

![validation loss against tokens](convergence.png)

## Tuning

{markdown(*tuning(results))}

{origins(results)}
"""


def plot(results: Results, path: Path) -> None:
    """Draw the mean validation loss of each variant against tokens, with a second panel for the last quarter."""
    curves = {name: curve for name in VARIANTS if (curve := _mean_curve(best_runs(results, name)))}
    if not curves:
        return
    order = sorted(curves, key=lambda name: curves[name][-1][1])
    others = [name for name in VARIANTS if name != REFERENCE]
    dashes = [(color, dash) for dash in ("-", "--", ":") for color in COLORS]
    styles = {REFERENCE: (BLACK, "-"), **dict(zip(others, dashes, strict=False))}
    figure = new_figure(14, 6.5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    for name in order:
        tokens = [seen / 1e6 for seen, _ in curves[name]]
        losses = [loss for _, loss in curves[name]]
        color, line = styles[name]
        for axis in (left, right):
            axis.plot(tokens, losses, line, color=color, linewidth=2.2 if name == REFERENCE else 1.6, label=name)
    for axis, title in ((left, "Whole run"), (right, "The last quarter")):
        finish(axis, title=title, x="tokens (millions)", y="validation loss")
    _zoom(right, curves, order, styles)
    figure.suptitle("Validation loss, learning rate tuned for each optimizer, mean of seeds", fontsize=TITLE)
    figure.savefig(path, dpi=DPI)


def _zoom(axis: Any, curves: Mapping[str, list[tuple[int, float]]], order: Sequence[str], styles: Any) -> None:
    """Show the last quarter and label the end of each line, without overlaps."""
    last = max(curve[-1][0] for curve in curves.values()) / 1e6
    tail = [loss for curve in curves.values() for seen, loss in curve if seen / 1e6 >= 0.75 * last]
    low, high = min(tail), max(tail)
    pad = 0.04 * (high - low or 1)
    axis.set(xlim=(0.75 * last, last), ylim=(low - pad, high + pad))
    gap = (high - low + 2 * pad) / 24
    place = -math.inf
    for name in order:
        end = curves[name][-1][1]
        place = max(end, place + gap)
        axis.annotate(
            f"{name}  {end:.3f}",
            xy=(last, end),
            xytext=(1.04, place),
            textcoords=("axes fraction", "data"),
            color=styles[name][0],
            va="center",
            fontsize=SMALL,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": styles[name][0], "linewidth": 0.7},
        )


def _mean_curve(runs: Results) -> list[tuple[int, float]]:
    finished = [run["curve"] for run in runs if run["loss"] is not None]
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*finished, strict=True)]
