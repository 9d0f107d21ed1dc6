"""The page and the plot of benchmarks/quality.py about bfloat16 weights and gradient release."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from _quality_page import by_seed, mean_loss, table
from _quality_rows import Result, best_runs
from _report import markdown, origins
from _studies import BITS, Row, Study

from lightning_memopt.figures.style import COLORS, DPI, TITLE, finish, new_figure

STUDIES = ("bfloat16", "no clipping", "release")
FLOAT32 = "4k"
OPTIMIZERS = ("adamw", "adapm_lean")
LABELS = {"": "stochastic", ", to nearest": "to nearest", ", 24 bits": "24 bits", ", 32 bits": "32 bits"}
BYTES = {"to nearest": 2, "stochastic": 2, "24 bits": 3, "32 bits": 4}
Found = Mapping[str, tuple[Study, Sequence[Result]]]
Losses = dict[str, dict[int, float]]


def losses(found: Found, optimizer: str) -> Losses:
    """Return the losses by seed in float32 and in bfloat16 with every number of bits."""
    study, results = found["bfloat16"]
    known = {LABELS[bits]: best_runs(results, _row(study, optimizer + bits)) for bits in BITS}
    lr = _row(study, optimizer).lr
    # torch's AdamW stands for ours, which equals it.
    name = "AdamW" if optimizer == "adamw" else optimizer
    whole = [run for run in found[FLOAT32][1] if (run["variant"], run["ratio"], run["lr"]) == (name, 1.0, lr)]
    return {"float32": by_seed(whole), **{label: by_seed(known[label]) for label in BYTES if known[label]}}


def _row(study: Study, variant: str) -> Row:
    return next(row for row in study.rows if row.variant == variant)


def gains(all_losses: Losses) -> dict[str, list[float]]:
    """Return how much higher each loss is than float32's at the same seed, as a share."""
    whole = all_losses["float32"]
    return {
        label: [loss / whole[seed] - 1 for seed, loss in sorted(mine.items()) if seed in whole]
        for label, mine in all_losses.items()
    }


def page(found: Found) -> str:
    """Return the markdown page."""
    known = {name: losses(found, name) for name in OPTIMIZERS}
    rows = []
    for label in ("float32", *BYTES):
        cells = [label, str(BYTES.get(label, 4))]
        for name in OPTIMIZERS:
            mine = known[name].get(label, {})
            shown = f"{statistics.fmean(mine.values()):.3f}" if mine else ""
            gain = gains(known[name]).get(label, [])
            other = f" ({statistics.fmean(gain):+.1%})" if gain and label != "float32" else ""
            cells.append(shown + other)
        rows.append(cells)
    study, results = found["bfloat16"]
    torch_runs = best_runs(results, _row(study, "AdamW"))
    sections = [
        part
        for name in STUDIES
        for part in (f"## {found[name][0].title}", markdown(*table(*found[name])))
        if name in found
    ]
    runs = [run for name in STUDIES if name in found for run in found[name][1]]
    text = _INTRO.format(torch=f"{mean_loss(torch_runs):.3f}")
    head = ["weights", "bytes per weight", *(f"`{name}`" for name in OPTIMIZERS)]
    parts = ["# bfloat16 weights and gradient release", text, markdown(head, rows), _PLOT, *sections]
    return "\n\n".join([*parts, "## Origin", origins(runs)]) + "\n"


def plot(found: Found, path: Path) -> None:
    """Draw the losses of every seed relative to float32 weights."""
    figure = new_figure(8, 4.2)
    axis = figure.subplots()
    for number, name in enumerate(OPTIMIZERS):
        shares = gains(losses(found, name))
        labels = [label for label in BYTES if label in shares]
        places = [place + 0.16 * (number - 0.5) for place in range(len(labels))]
        for place, label in zip(places, labels, strict=True):
            axis.plot([place] * len(shares[label]), [100 * each for each in shares[label]], "o", color=COLORS[number])
        means = [100 * statistics.fmean(shares[label]) for label in labels]
        axis.plot(places, means, "_", markersize=26, markeredgewidth=2, color=COLORS[number], label=name)
    axis.axhline(0, color="black", linewidth=1)
    axis.set_xticks(range(len(BYTES)), [f"{label}\n{size} bytes per weight" for label, size in BYTES.items()])
    axis.set_xlim(-0.45, len(BYTES) - 0.55)
    finish(axis, y="loss above float32 weights (%)")
    axis.legend(frameon=False)
    figure.suptitle("bfloat16 weights: dots are seeds, bars their means", fontsize=TITLE)
    figure.savefig(path, dpi=DPI)


_INTRO = """What bfloat16 weights and gradient release cost in loss, on the small LLaMA of [quality.md](quality.md): 300
steps of 4,096 tokens, learning rate 2e-3 for all. Weights and gradients are in bfloat16, everything between them in
float32, which a CPU does faster. Means of three seeds; in parentheses the difference to float32 weights at the same
seeds. `torch.optim.AdamW` on these weights, which rounds to nearest and keeps its state in bfloat16, ends at {torch}.
[bfloat16.md](../bfloat16.md) and [gradient_release.md](../gradient_release.md) say how to use both."""
_PLOT = "![Losses relative to float32 weights](memory.png)"
