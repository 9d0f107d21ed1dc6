"""The tables and the page of benchmarks/quality.py."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence

from _curves import loss_or_inf
from _fidelity import RANKS
from _quality_rows import Result, best_runs, needed, runs_of
from _report import markdown, origins
from _studies import RATIO, Row, Study
from _train import Settings
from _variants import REFERENCE

# AdamW of torch, and of this package for rates by role.
CONTROLS = (REFERENCE, "adamw")
Found = Sequence[tuple[Study, Sequence[Result]]]


def mean_loss(runs: Sequence[Result]) -> float:
    """Return the mean loss over seeds."""
    return statistics.fmean(map(loss_or_inf, runs))


def shares(run: Result) -> tuple[float, float]:
    """Return momentum and state as shares of AdamW's."""
    return 2 * run["momentum_bytes"] / run["adamw_bytes"], run["state_bytes"] / run["adamw_bytes"]


def table(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a study, best mean first. Rows whose rate is not tuned yet are left out."""
    found = [(row, runs) for row in study.rows if (runs := best_runs(results, row))]
    controls = {row.ratio: by_seed(runs) for row, runs in found if row.variant in CONTROLS}
    seeds = sorted({run["seed"] for _, runs in found for run in runs})
    several = ["mean", "std"] if len(seeds) > 1 else []
    against = ["to AdamW"] if controls else []
    head = ["optimizer", "ratio", "lr", *(f"seed {seed}" for seed in seeds), *several, *against, "momentum", "state"]
    lines = []
    for row, runs in sorted(found, key=lambda each: mean_loss(each[1])):
        losses = by_seed(runs)
        finite = [loss for loss in losses.values() if math.isfinite(loss)]
        spread = f"{statistics.stdev(finite):.3f}" if len(finite) > 1 else ""
        mean = [_shown(mean_loss(runs)), spread] if several else []
        cells = [_shown(losses[seed]) if seed in losses else "" for seed in seeds]
        sizes = [f"{share:.1%}" for share in shares(runs[0])]
        other = [relative(losses, controls.get(_control_ratio(study, row), {}))] if controls else []
        lines.append([row.variant, f"{row.ratio:g}", f"{runs[0]['lr']:g}", *cells, *mean, *other, *sizes])
    return head, lines


def _control_ratio(study: Study, row: Row) -> float:
    """Return the ratio of the AdamW that a row is compared with: its own, or else the common one."""
    known = {each.ratio for each in study.rows if each.variant in CONTROLS}
    return row.ratio if row.ratio in known or row.ratio == 1 else RATIO


def by_seed(runs: Sequence[Result]) -> dict[int, float]:
    """Return the losses of a row."""
    return {run["seed"]: loss_or_inf(run) for run in runs}


def relative(losses: Mapping[int, float], control: Mapping[int, float]) -> str:
    """Return how much higher the mean loss is than the control's, over the seeds that both have."""
    seeds = losses.keys() & control.keys()
    means = [statistics.fmean(each[seed] for seed in seeds) for each in (losses, control)] if seeds else [math.inf]
    return f"{means[0] / means[1] - 1:+.1%}" if all(map(math.isfinite, means)) else ""


def _shown(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def tuning(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the table of all learning rates tried with the first seed."""
    lines = []
    for row in study.rows:
        tried = {run["lr"]: loss_or_inf(run) for run in runs_of(results, row) if run["seed"] == row.seeds[0]}
        if len(tried) > 1:
            cells = ", ".join(f"{lr:g}: {_shown(tried[lr])}" for lr in sorted(tried))
            lines.append([row.variant, f"{row.ratio:g}", cells])
    return ["optimizer", "ratio", "loss at each rate, first seed"], lines


def fidelity(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return what the runs of a study kept of full Adam's momentum, as means over moments, roles and seeds."""
    lines = []
    for row in study.rows:
        records = [record for run in best_runs(results, row) for record in run.get("fidelity", [])]
        if records:
            means = [statistics.fmean(record[key] for record in records) for key in ("kept", "cosine", "gradient")]
            lines.append([row.variant, *(f"{mean:.2f}" for mean in means)])
    return ["optimizer", "energy kept", "cosine to full Adam's update", "the same for the gradient"], lines


def spectra(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the share of the full momentum's energy that best approximations would keep, by role and moment."""
    records = [record for run in results for record in run.get("fidelity", [])]
    places = sorted({(record["role"], record["step"]) for record in records})
    lines = []
    for role, step in places:
        best = [record["best"] for record in records if (record["role"], record["step"]) == (role, step)]
        lines.append([role, str(step), *(f"{statistics.fmean(column):.2f}" for column in zip(*best, strict=True))])
    return ["role", "step", *(f"rank {rank}" for rank in RANKS)], lines


def comparison(study: Study, results: Sequence[Result], costs: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return state, time and temporary memory of a step, and the losses of a study, with one rate and by role."""
    losses: dict[tuple[str, bool], float] = {}
    for row in study.rows:
        if runs := best_runs(results, row):
            name = REFERENCE if row.variant == "adamw" else row.variant
            key = name, row.ratio != 1
            losses[key] = min(mean_loss(runs), losses.get(key, math.inf))
    lines = []
    for cost in sorted(costs, key=lambda cost: losses.get((cost["cost"], False), math.inf)):
        found = [losses.get((cost["cost"], ratio)) for ratio in (False, True)]
        cells = ["" if loss is None else f"{loss:.3f}" for loss in found]
        numbers = [f"{cost['state']:.1%}", f"{cost['ratio']:.1f}", f"{cost['temporaries']:.2f}"]
        lines.append([cost["cost"], *numbers, *cells])
    return [
        "optimizer",
        "state",
        "step, x fused AdamW",
        "temporaries",
        "loss, one rate",
        "loss, rates by role",
    ], lines


def swings(study: Study, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the cosines between gradients and the momentum before them, inside and outside of what is kept."""
    lines = []
    for row in study.rows:
        found = [run["swings"] for run in best_runs(results, row) if run.get("swings")]
        for role in found[0] if found else ():
            means = [statistics.fmean(run[role][side] for run in found) for side in ("inside", "outside")]
            lines.append([row.variant, role, *(f"{mean:+.3f}" for mean in means)])
    return ["optimizer", "role", "inside", "outside"], lines


def page(found: Found, costs: Sequence[Result]) -> str:
    """Return the markdown page."""
    parts = [_intro(found[0][0])]
    if costs:
        parts += ["## All optimizers", _COST, markdown(*comparison(*found[0], costs)), origins(costs)]
    for study, results in found:
        parts += [f"## {study.title}", _filled(f"{_setting(study)}{_unfinished(study, results)}")]
        if (lines := table(study, results))[1]:
            parts.append(markdown(*lines))
        if study is found[0][0]:
            parts += [
                "![validation loss against tokens](quality.png)",
                "![validation loss against state](quality_state.png)",
            ]
        if study.settings.fidelity:
            parts += [_FIDELITY, markdown(*fidelity(study, results)), _SPECTRA, markdown(*spectra(study, results))]
            parts += [_SWINGS, markdown(*swings(study, results))]
        if (tried := tuning(study, results))[1]:
            parts += ["Rates tried:", markdown(*tried)]
    everything = [run for _, results in found for run in results]
    return "\n\n".join([*parts, "## Origin", origins(everything)]) + "\n"


def _intro(study: Study) -> str:
    settings = study.settings
    shape = f"{settings.layers} layers, width {settings.hidden}, {settings.heads} heads, {settings.vocabulary:,} tokens"
    about = f"""Small language models ({shape}) trained from scratch on text ({settings.data}), with
{settings.warmup:.0%} linear warm-up, then a cosine to {settings.final_lr:.0%} of the learning rate, betas (0.9, 0.95)
unless a name says otherwise, no weight decay, gradients clipped to norm {settings.clip:g} unless a title says
otherwise. At a given seed, all optimizers share initial weights and batches. Where "rates tried" follows a table, the
rate is tuned for each row with the first seed: half the middle rate, the middle, twice it, and further while the best
is at an edge. The other seeds run at the best rate. Loss: mean over {settings.validation_tokens:,} held-out tokens at
the end; the curves use the first {settings.curve_tokens:,} of them. "to AdamW" compares it with AdamW's at the same
ratio and seeds, or else with AdamW's at the ratio {RATIO:g}. "momentum" and
"state" are shares of AdamW's bytes; the momentum of GaLore, Fira and APOLLO includes their projections and averages of
squares. "ratio" multiplies the rate of embeddings and norms:
`overrides={{"embedding": {{"lr_multiplier": {RATIO:g}}}, "vector": {{"lr_multiplier": {RATIO:g}}}}}`. `adamw` is this
package's AdamW, which equals torch's."""
    return f"# Quality\n\n{_filled(about)}"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120)


def _setting(study: Study) -> str:
    settings = study.settings
    tokens = settings.steps * settings.batch * settings.length
    return (
        f"{'GPT-2' if settings.model == 'gpt2' else 'LLaMA'}, {settings.steps:,} steps of {settings.batch} x "
        f"{settings.length} tokens, {tokens / 1e6:.1f} million in all. {_text(settings)}"
    )


def _text(settings: Settings) -> str:
    """Return which text is read, and what of it is held out."""
    copies = "left out" if settings.distinct else "kept"
    return f"{settings.max_chars / 1e6:g} million characters; held-out files that repeat training files are {copies}."


def _unfinished(study: Study, results: Sequence[Result]) -> str:
    left = [row for row in study.rows if needed(results, row)]
    return f" Runs are still missing for {len(left)} of {len(study.rows)} rows." if left else ""


_COST = """State, time of a step as a multiple of fused AdamW's, and temporary memory of a step as a multiple of the
largest block, on the shapes of a LLaMA with 60 million parameters, from one run on a CPU. Times are medians of
20 steps, without the new subspaces of GaLore and Fira, each an SVD every 200 steps. Losses are those of the next
section, with rates by role at the best ratio tried."""
_FIDELITY = """What the runs kept of full Adam's momentum M, averaged over six moments of the training, all roles of
matrices and all seeds: the share of M's energy in the kept momentum; the cosine between the change of the weights and
full Adam's change; and the same for a step along the gradient."""
_SPECTRA = """The share of M's energy that its best approximation of a rank would keep, averaged over all of these
runs:"""
_SWINGS = """The cosine between a gradient and full Adam's momentum before it, averaged over all steps: inside the
directions that the kept momentum holds (its row and column space), and outside of them. Negative: gradients swing back
and forth there."""
