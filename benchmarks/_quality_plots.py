"""The plots of benchmarks/quality.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _quality_page import CONTROLS, Found, mean_loss, shares
from _quality_rows import Result, best_runs
from _studies import Study
from _variants import REFERENCE
from matplotlib.transforms import Bbox

from lightning_memopt.figures.style import COLORS, DPI, SMALL, TITLE, finish, new_figure
from lightning_memopt.figures.style import REFERENCE as BLACK

Curve = list[tuple[int, float]]
SHOWN = 12  # curves
# Of the optimizers in the plot of state. The package's own recipes keep their names.
NAMES = {name: name for name in ("adapm", "adapm_lean", "adapm_mini", "adam_sn", "adam_snsm", "snsm_lean", "muon_lean")}
NAMES |= {
    "AdamW": "AdamW",
    "adamw": "AdamW",
    "AdamW, beta1 0.8": "AdamW, β₁ 0.8",
    "adamw, beta1 0.8": "AdamW, β₁ 0.8",
    "adafactor": "Adafactor",
}
NAMES |= {"adam_mini": "Adam-mini", "scale": "SCALE", "apollo": "APOLLO", "apollo_mini": "APOLLO-Mini"}
NAMES |= {"galore": "GaLore", "fira": "Fira", "muon": "Muon", "muon, beta1 0.9": "Muon, β₁ 0.9"}


class Dot(NamedTuple):
    """A row in the plot of state."""

    loss: float
    share: float
    name: str
    seeds: int


def plot_curves(results: Sequence[Result], study: Study, path: Path) -> None:
    """Draw the mean validation loss against tokens, and the last quarter of it."""
    found = {(row.variant, row.ratio): best_runs(results, row) for row in study.rows}
    curves = {_label(*key): curve for key, runs in found.items() if (curve := _mean_curve(runs))}
    if not curves:
        return
    best = sorted(curves, key=lambda name: curves[name][-1][1])
    order = [name for name in best if name in best[: SHOWN - 1] or name == REFERENCE]
    dashes = [(color, dash) for dash in ("-", "--", ":") for color in COLORS]
    styles = {**dict(zip(order, dashes, strict=False)), REFERENCE: (BLACK, "-")}
    figure = new_figure(14, 6.5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    for name in order:
        tokens, losses = [seen / 1e6 for seen, _ in curves[name]], [loss for _, loss in curves[name]]
        color, line = styles[name]
        for axis in (left, right):
            axis.plot(tokens, losses, line, color=color, linewidth=2.2 if name == REFERENCE else 1.6, label=name)
    for axis, title in ((left, "Whole run"), (right, "The last quarter")):
        finish(axis, title=title, x="tokens (millions)", y="validation loss")
    _zoom(right, curves, order, styles)
    rest = f"; the best {SHOWN - 1} and AdamW" if len(curves) > len(order) else ""
    title = f"Validation loss, rate tuned for each optimizer, mean of seeds{rest}"
    figure.suptitle(title, fontsize=TITLE)
    figure.savefig(path, dpi=DPI)


def plot_state(results: Sequence[Result], study: Study, path: Path) -> None:
    """Draw loss against the bytes of state, for one rate and for rates by role. Circles have one seed."""
    figure = new_figure(11, 5)
    axes = figure.subplots(1, 2, sharey=True)
    points: dict[Any, list[Dot]] = {}
    for axis, by_role, title in ((axes[0], False, "One learning rate"), (axes[1], True, "Learning rates by role")):
        rows = [row for row in study.rows if (row.ratio != 1) is by_role]
        found = [(row.variant, runs) for row in rows if (runs := best_runs(results, row))]
        dots = [
            Dot(mean_loss(runs), 100 * shares(runs[0])[1], name, len(runs)) for name, runs in found if name in NAMES
        ]
        axis.set_xscale("log")
        axis.set_xticks([1, 3, 10, 30, 100], ["1%", "3%", "10%", "30%", "100%"])
        axis.minorticks_off()
        axis.set_xlim(0.5, 130)
        finish(axis, title=title, x="optimizer state, share of AdamW's", y="" if by_role else "validation loss")
        points[axis] = dots
    for axis, dots in points.items():  # the axes share their limits, which the last one decides
        for dot in dots:
            fill = "none" if dot.seeds == 1 else _color(dot.name)
            axis.plot(dot.share, dot.loss, "o", color=_color(dot.name), markerfacecolor=fill, markersize=8)
    figure.draw_without_rendering()
    for axis, dots in points.items():
        _label_dots(axis, sorted(dots))
    title = "Rates tuned for each optimizer; blue: this package's recipes; circles: one seed"
    figure.suptitle(title, fontsize=TITLE)
    figure.savefig(path, dpi=DPI)


def _color(name: str) -> str:
    return BLACK if "AdamW" in NAMES[name] else COLORS[0] if NAMES[name] == name else COLORS[1]


def _label_dots(axis: Any, dots: Sequence[Dot]) -> None:
    """Write names beside the dots: at the first side where nothing else is."""
    sides = {(9, 0): "left", (-9, 0): "right", (0, -13): "center", (0, 13): "center"}
    centers = [axis.transData.transform((dot.share, dot.loss)) for dot in dots]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centers]
    for at, dot in enumerate(dots):
        for offset, anchor in sides.items():
            label = axis.annotate(
                NAMES[dot.name], (dot.share, dot.loss), xytext=offset, textcoords="offset points",
                color=_color(dot.name), fontsize=SMALL, va="center", ha=anchor,
            )  # fmt: skip
            box = label.get_window_extent()
            others = [other for number, other in enumerate(taken) if number != at]
            free = box.count_overlaps(others) == 0 and axis.bbox.containsx(box.x1)
            if free or offset == (0, 13):  # the last side, come what may
                taken.append(box)
                break
            label.remove()


def plot_ranks(found: Found, path: Path) -> None:
    """Draw loss against state for the studies of the rank."""
    studies = [(study, results) for study, results in found if study.settings.fidelity]
    if not studies:
        return
    figure = new_figure(5.4 * len(studies), 4.6)
    for axis, (study, results) in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies, strict=True):
        found_rows = [(row.variant, runs) for row in study.rows if (runs := best_runs(results, row))]
        points = [(shares(runs[0])[1], mean_loss(runs)) for name, runs in found_rows if name not in CONTROLS]
        axis.plot([100 * share for share, _ in points], [loss for _, loss in points], marker="o", color=COLORS[0])
        for _, runs in (each for each in found_rows if each[0] in CONTROLS):
            axis.axhline(mean_loss(runs), color=BLACK, linestyle="--", label="AdamW")
            axis.legend(fontsize=SMALL)
        axis.set_xscale("log")
        axis.set_xticks([100 * share for share, _ in points], [f"{share:.1%}" for share, _ in points], rotation=30)
        axis.minorticks_off()
        finish(axis, title=study.title, x="state, share of AdamW's", y="validation loss")
    figure.suptitle("Rank of adapm_lean: 1, 2, 4, 8, 16, 32 of 128", fontsize=TITLE)
    figure.savefig(path, dpi=DPI)


def _label(variant: str, ratio: float) -> str:
    return variant if ratio == 1 else f"{variant}, ratio {ratio:g}"


def _mean_curve(runs: Sequence[Result]) -> Curve:
    finished = [run["curve"] for run in runs if run["loss"] is not None]
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*finished, strict=True)]


def _zoom(axis: Any, curves: Mapping[str, Curve], order: Sequence[str], styles: Any) -> None:
    """Show the last quarter and label the end of each line, without overlaps."""
    last = max(curve[-1][0] for curve in curves.values()) / 1e6
    tail = [loss for name in order for seen, loss in curves[name] if seen / 1e6 >= 0.75 * last]
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
            arrowprops={"arrowstyle": "-", "color": styles[name][0], "linewidth": 0.7, "relpos": (0, 0.5)},
        )
