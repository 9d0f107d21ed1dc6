"""The page of benchmarks/adaptive.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from _adaptive_models import FAMILIES
from _adaptive_train import POLICIES, REFERENCES, UNIFORM, Comparison
from _curves import loss_or_inf
from _report import markdown, origins

Result = Mapping[str, Any]


def middle(budgets: Iterable[float]) -> float:
    """Return the middle budget, at which all runs use all seeds."""
    ordered = sorted(budgets)
    return ordered[len(ordered) // 2]


def with_ratio(results: Sequence[Result], ratio: float) -> list[Result]:
    """Return the runs with a ratio of rates. Earlier results have none."""
    return [r for r in results if r.get("ratio", 1.0) == ratio]


def tried(results: Sequence[Result], model: str, budget: float) -> dict[float, float]:
    """Return the losses by learning rate of the tuning runs: uniform, at this budget, one rate, the first seed."""
    mine = [r for r in with_ratio(results, 1.0) if (r["model"], r["policy"], r["budget"]) == (model, UNIFORM, budget)]
    first = min((r["seed"] for r in mine), default=None)
    return {r["lr"]: loss_or_inf(r) for r in sorted(mine, key=lambda r: r["lr"]) if r["seed"] == first}


def chosen(results: Sequence[Result], budget: float) -> list[Result]:
    """Return the runs of each model at its learning rate."""
    grids = {model: tried(results, model, budget) for model in FAMILIES}
    best = {model: min(grid, key=lambda lr: grid[lr]) for model, grid in grids.items() if grid}
    return [r for r in results if r["model"] in best and r["lr"] == best[r["model"]]]


def by_seed(results: Sequence[Result], model: str, policy: str, budget: float | None) -> dict[int, Result]:
    """Return the runs of one row, by seed."""
    mine = [r for r in results if (r["model"], r["policy"], r["budget"]) == (model, policy, budget)]
    return {r["seed"]: r for r in sorted(mine, key=lambda r: r["seed"])}


def spread(losses: Sequence[float]) -> float:
    """Return the standard deviation, NaN for a single loss or one that is not finite."""
    return statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else math.nan


def mean_of(runs: Iterable[Result], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def compared(mine: Mapping[int, Result], uniform: Mapping[int, Result]) -> list[str]:
    """Return the mean difference to uniform at equal seeds, the number of seeds with a lower loss, and the verdict."""
    seeds = mine.keys() & uniform.keys()
    pairs = [(loss_or_inf(mine[seed]), loss_or_inf(uniform[seed])) for seed in seeds]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if not pairs:
        return ["", "", ""]
    differences = [one - other for one, other in pairs]
    mean = statistics.fmean(differences)
    noise = max(spread([one for one, _ in pairs]), spread([other for _, other in pairs]))
    verdict = "better" if mean < -noise else "worse" if mean > noise else "tie"
    own = spread(differences)
    shown = f"{mean:+.3f}" + ("" if math.isnan(own) else f" ± {own:.3f}")
    return [shown, f"{sum(d < 0 for d in differences)} of {len(pairs)}", "" if math.isnan(noise) else verdict]


HEAD = [
    "policy",
    "budget",
    "seeds",
    "loss",
    "spread",
    "to uniform",
    "lower in",
    "beyond the spread",
    "momentum at the end",
    "on average",
    "moves",
]


COST_HEAD = ["", "ms", "share of a step"]


def rows_of(results: Sequence[Result], model: str, budgets: Sequence[float]) -> list[list[str]]:
    """Return the rows of one model's table."""
    places = [(policy, None) for policy in REFERENCES] + [(p, b) for b in sorted(budgets) for p in POLICIES]
    rows = []
    for policy, budget in places:
        runs = by_seed(results, model, policy, budget)
        if not runs:
            continue
        losses = [loss_or_inf(run) for run in runs.values()]
        own = spread(losses)
        against = ["", "", ""]
        if budget is not None and policy != UNIFORM:
            against = compared(runs, by_seed(results, model, UNIFORM, budget))
        shares = [f"{mean_of(runs.values(), key):.2%}" for key in ("momentum_end", "momentum_mean")]
        facts = [f"{len(runs)}", f"{statistics.fmean(losses):.3f}", "" if math.isnan(own) else f"{own:.3f}"]
        moves = "" if budget is None else f"{mean_of(runs.values(), 'moves'):.0f}"
        rows.append([policy, "" if budget is None else f"{budget:.1%}", *facts, *against, *shares, moves])
    return rows


def role_rows(results: Sequence[Result], model: str, budget: float) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of each role's mean final rank, over blocks and seeds."""
    found = {policy: list(by_seed(results, model, policy, budget).values()) for policy in POLICIES}
    roles = list(dict.fromkeys(role for runs in found.values() for run in runs for role in run["ranks_by_role"]))
    rows = [
        [policy, *(f"{statistics.fmean(run['ranks_by_role'][role] for run in runs):.1f}" for role in roles)]
        for policy, runs in found.items()
        if runs
    ]
    return ["policy", *(role.replace("_", " ") for role in roles)], rows


def cost_rows(seconds: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return the rows of the table of times."""
    step, whole = statistics.median(seconds["step"]), len(seconds["step"])
    decisions = sum(seconds["decisions"]) / whole
    rows = [("training step", step), ("signals", statistics.median(seconds["signals"])), ("decisions", decisions)]
    return [[name, f"{value * 1e3:.2f}", f"{value / step:.1%}"] for name, value in rows]


def model_section(results: Sequence[Result], model: str, comparison: Comparison) -> str:
    """Return the tables of a model, one of each kind per ratio of rates."""
    family, budget = FAMILIES[model], middle(comparison.budgets)
    grid = tried(results, model, budget)
    best = min(grid, key=lambda lr: grid[lr])
    losses = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in grid.items())
    found = f"tried with {UNIFORM}: {losses}" if len(grid) > 1 else "not tuned"
    parts = [f"### {family.title}", f"{family.task[0].upper()}{family.task[1:]}. Learning rate {best:g} ({found})."]
    for ratio in comparison.ratios:
        here = with_ratio(chosen(results, budget), ratio)
        if not any(result["model"] == model for result in here):
            continue
        if ratio != 1.0:
            parts.append(f"Embeddings and norms at {ratio:g} times that rate:")
        parts.append(markdown(HEAD, rows_of(here, model, comparison.budgets)))
        parts.append(f"Mean rank of a role's matrices at the end, at {budget:.1%} (0: no momentum):")
        parts.append(markdown(*role_rows(here, model, budget)))
    return "\n\n".join(parts)


def cost_section(cost: Result | None) -> str:
    if cost is None:
        return "Not measured."
    every = cost["settings"]["every_n_steps"]
    return f"""One training of the LLaMA, {cost["steps"]} steps with the policy `{cost["policy"]}`, on one thread;
a decision every {every} steps, changes of the state included. "signals" is the work after every step of the
optimizer, "decisions" everything else, as a mean over all steps. Matrices as small as these are the worst case: a few
small operations per block beside a short forward and backward of 512 tokens.

{markdown(COST_HEAD, cost_rows(cost["seconds"]))}

{origins([cost])}
"""


def comparison_section(results: Sequence[Result], comparison: Comparison) -> str:
    """Return the section of one setting."""
    settings, budget = comparison.settings, middle(comparison.budgets)
    models = [model for model in comparison.models if tried(results, model, budget)]
    if not models:
        return f"## {comparison.title}\n\nNot measured yet."
    images = " (ViT: 16 images of 37 patches)" if "vit" in models else ""
    stated = ", ".join(f"{each:.1%}" for each in sorted(comparison.budgets))
    tables = "\n\n".join(model_section(results, model, comparison) for model in models)
    return f"""## {comparison.title}

Budgets of {stated}; {settings.steps} steps of {settings.batch} x {settings.length} tokens{images},
{settings.warmup:.0%} linear warm-up, then a cosine to {settings.final_lr:.0%} of the learning rate, weight decay
{settings.weight_decay:g}, gradients clipped to norm {settings.clip:g}; {settings.validation_tokens:,} held-out tokens;
decisions every {settings.every_n_steps} steps from step {settings.start} on, until {settings.freeze_after:.0%} of the
training.

![loss against momentum](adaptive{comparison.suffix}.png)

{tables}

Ranks over the steps on the LLaMA at {budget:.1%}, with the first seed:

![rank of every block over the steps](adaptive_allocation{comparison.suffix}.png)

### Origin

{origins(results)}"""


def page(found: Sequence[tuple[Comparison, Sequence[Result]]], cost: Result | None) -> str:
    """Return the markdown page."""
    settings = found[0][0].settings
    sections = "\n\n".join(comparison_section(results, comparison) for comparison, results in found)
    return f"""# Policies of AdaptiveMomentum

Which blocks deserve momentum, when all of it may take only a few percent of AdamW's? The policies of the callback
`AdaptiveMomentum` at equal bytes, on small models ({settings.layers} layers, width {settings.hidden},
{settings.heads} heads; vocabulary {settings.vocabulary} for text) under the Lightning Trainer. Everything except
momentum is `adapm_lean`'s. The first rows of a table are without the callback; AdamW is torch's, or the recipe `adamw`
where rates differ by role.

At a given seed all runs have the same initial weights and batches. The learning rate is chosen with {UNIFORM} at the
middle budget and the first seed, and then used for all, including AdamW, which is therefore not tuned. "loss" is
the mean over held-out data at the end, "spread" its standard deviation over seeds. "to uniform" is the difference to
{UNIFORM} at the same budget and seed, mean ± standard deviation over seeds; "beyond the spread" says whether its mean
is more than the larger of the two spreads. Momentum is in units of AdamW's; "moves" counts changed
ranks after the first division of the budget. Bytes differ slightly: ranks are whole numbers, `schedule` goes down
to half of the budget, and `paper` gives values twice the rank of the rest where their dense momentum does not fit. The
smallest possible budget of the LLaMA, rank 1 for every matrix, is 1.3%.
Small models and short trainings show what a policy does, not what it is worth at scale.

{sections}

## Time

{cost_section(cost)}
"""
