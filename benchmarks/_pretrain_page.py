"""The page and the plot of benchmarks/pretrain_gpu.py."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _curves import loss_or_inf
from _report import markdown, origins
from _train import Settings
from _variants import REFERENCE

from lightning_memopt.figures.style import COLORS, DPI, TITLE, finish, new_figure
from lightning_memopt.figures.style import REFERENCE as BLACK

Results = Sequence[Mapping[str, Any]]


def table(final: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the long runs, lowest loss first."""
    head = ["optimizer", "lr", "loss", "to AdamW", "state (MiB)", "of AdamW's", "tokens / s", "peak memory (GiB)"]
    reference = min((run for run in final if run["variant"] == REFERENCE), key=loss_or_inf, default=None)
    rows = []
    for run in sorted(final, key=loss_or_inf):
        relative = f"{loss_or_inf(run) / loss_or_inf(reference) - 1:+.2%}" if reference and reference["loss"] else ""
        share = f"{run['state_bytes'] / reference['state_bytes']:.1%}" if reference else ""
        rate = f"{run['tokens_per_second']:,.0f}" if run["tokens_per_second"] else ""
        peak = f"{run['peak_bytes'] / 2**30:.2f}" if run["peak_bytes"] else "not measured"
        state = f"{run['state_bytes'] / 2**20:.1f}"
        rows.append([run["variant"], f"{run['lr']:g}", _loss(run), relative, state, share, rate, peak])
    return head, rows


def tuned(tuning: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the runs that tune the learning rate."""
    lrs = sorted({run["lr"] for run in tuning})
    found = {(run["variant"], run["lr"]): run for run in tuning}
    rows = []
    for name in dict.fromkeys(run["variant"] for run in tuning):
        runs = [found.get((name, lr)) for lr in lrs]
        best = min((run for run in runs if run), key=loss_or_inf)
        betas = ", ".join(map(str, best["optimizer"]["betas"]))
        edge = ", at the edge" if best["lr"] in (lrs[0], lrs[-1]) else ""
        rows.append([name, betas, *(_loss(run) for run in runs), f"{best['lr']:g}{edge}"])
    return ["optimizer", "betas", *(f"lr {lr:g}" for lr in lrs), "best"], rows


def _loss(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    return f"{run['loss']:.4f}" if run["loss"] else "diverged"


def page(tuning: Results, final: Results, settings: Settings) -> str:
    """Return the markdown page."""
    tokens = settings.batch * settings.length / 1e6
    short = tuning[0]["settings"]["steps"]
    setting = textwrap.fill(
        f"A LLaMA ({settings.layers} layers, width {settings.hidden}, {settings.heads} heads, intermediate width "
        f"{settings.intermediate}, vocabulary {settings.vocabulary:,}, untied head) trained from random weights on "
        f"Python source code: {settings.data}. {tuning[0]['precision']}, {settings.steps:,} steps of "
        f"{settings.batch} x {settings.length} tokens ({settings.steps * tokens:.3g} million), "
        f"{settings.warmup:.0%} linear warm-up, then a cosine to {settings.final_lr:.0%} of the learning rate, weight "
        f"decay {settings.weight_decay:g}, gradients clipped to norm {settings.clip:g}. All runs share initial weights "
        "and batches: one seed.",
        120,
    )
    method = textwrap.fill(
        f"The learning rate of each optimizer is tuned with runs of {short} steps, which may favor a higher rate than "
        "long ones. All of them then train at AdamW's best rate, and those whose own best rate differs also at that. "
        f"Loss: mean over at most {settings.validation_tokens:,} held-out tokens at the end, of files of which no copy "
        f"was trained on; the curves use the first {settings.curve_tokens:,} of them. Tokens per second exclude "
        "evaluations and the first steps of a process. Peak memory is what torch allocated for weights, gradients, "
        "state, activations and logits.",
        120,
    )
    curves = "![validation loss against tokens](pretrain_gpu.png)" if final else "No long run has ended yet."
    return f"""# Pretraining on one GPU

{setting}

{method}

{markdown(*table(final))}

{curves}

## Tuning

Losses after {short} steps, {short * tokens:.3g} million tokens.

{markdown(*tuned(tuning))}

{origins([*tuning, *final])}
"""


def plot(final: Results, path: Path) -> None:
    """Draw the validation loss against tokens, and the second half of it."""
    if find_spec("matplotlib") is None:
        print(f"{path.name} needs matplotlib: --report draws it on a machine that has it", flush=True)
        return
    curves = {f"{run['variant']}, lr {run['lr']:g}": run for run in final if run["curve"]}
    if not curves:
        return
    others = iter(COLORS * len(curves))
    colors = {name: BLACK if run["variant"] == REFERENCE else next(others) for name, run in curves.items()}
    figure = new_figure(12, 5)
    for axis, part, title in zip(figure.subplots(1, 2), (0.0, 0.5), ("Whole run", "The second half"), strict=True):
        for name, run in curves.items():
            points = [(seen / 1e6, loss) for seen, loss in run["curve"] if seen >= part * run["curve"][-1][0]]
            label = f"{name}: {_loss(run)}"
            axis.plot(*zip(*points, strict=True), color=colors[name], label=label)
        finish(axis, title=title, x="tokens (millions)", y="validation loss")
    axis.legend()
    figure.suptitle("A LLaMA on Python source code, one seed", fontsize=TITLE)
    figure.savefig(path, dpi=DPI)
