"""Measure the effect of ``max_update``, the bound on |U / D| per element, where it is needed and where it is not.

    python benchmarks/bound.py --jobs 2
    python benchmarks/bound.py --recipes adapm --seeds 0 --steps 20 --output /tmp/bound     # a trial

The cases are a ReLU net on inputs that are mostly zero, a small LLaMA with one gradient that is a million times too
large, one matrix after 3,000 gradients of zero, a float16 matrix whose gradients are between 1e-12 and 1e4, and an
ordinary training of a small LLaMA, as in ``quality.py``. Each runs without a bound and with 10, 3 and 1, with betas
(0.9, 0.95).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from _hostile import CONTROL, RECIPES, Outcome, magnitudes, silence, sparse_inputs, spike
from _report import OUTPUT, markdown, provenance, show
from _train import TOKENS, Run, Settings, load_tokens, start_worker, train
from _variants import VARIANTS, Variant

BOUNDS = (None, 10.0, 3.0, 1.0)
LR = 2e-3
HEAD = ("recipe", "AdamW", "no bound", "10", "3", "1")
INTRO = """# The bound on one step

`max_update` bounds every element of |U / D|: how far a step moves a weight, in units of the learning rate. This page
shows why the bound exists and why its default is {default:g}. `benchmarks/bound.py` makes this page. Each cell gives
the largest movement of one weight in one step, in units of the learning rate, then the loss, if any. All results are
from {seeds}.
"""
TEXTS = {
    "sparse": """## Inputs that are mostly zero

A ReLU net 256-128-128-128-10 learns 512 random examples in which nine of ten numbers are 0: 200 steps at a learning
rate of 1e-3, after 50 of warm-up. The inner layers have the recipe's kinds for an MLP, the others AdamW's. The loss is
the mean of the last 50 steps.""",
    "spike": """## A spike

A LLaMA of width 64 with two layers in 100 steps; the gradient of one step is multiplied by 1e6, and nothing clips it.
The movement is the largest from this step on; the loss is the mean of the last 20 steps. `adapm`'s embedding (none ×
dense) is not bounded: √(1/(1 − 0.95)) = 4.47.""",
    "silence": """## Silence, then noise

One 96×64 matrix gets 20 gradients of noise, 3,000 of zero, and 40 of noise. The movement is the largest after the
silence.""",
    "magnitudes": """## Elements of all magnitudes in float16

One 96×64 float16 matrix in 60 steps. The elements of its gradients are between 1e-12 and 1e4, each with its own size.
Where a weight would become infinite, the optimizer raises `FloatingPointError`. Torch's AdamW would not notice, so it
is left out. Values slightly above 3 and 1 are rounding of float16.""",
    "ordinary": """## An ordinary training

A LLaMA of width 128 with four layers in {steps} steps of 4 × 128 tokens, learning rate {lr:g}, gradients clipped to a
norm of 1: the validation loss, without the movement.""",
}
CONCLUSION = """
A longer check on 2026-11-26 repeats seed 0 of [convergence.md](convergence.md): 600 steps at the tuned rates, with the
bound of 10. In parentheses is the loss on that page, from before the bound existed; other code has changed since then,
too. `adapm` 3.703 (3.741), `adapm_lean` 3.758 (3.752), `adam_snsm` 3.614 (3.614), `adafactor` 3.813 (3.796).
`adapm_lean` in `make demo`: 4.520 (4.519).

## Conclusion

A bound of 10 removes all extreme movements; in an ordinary run it changes the loss by {low:+.2f} to {high:+.2f}
({seeds}). Bounds of 3 and 1 cost more there.

Not measured: {unmeasured}.
"""


def ordinary(recipe: str, bound: float | None, seed: int, settings: Settings) -> Outcome:
    """Train as ``quality.py`` does."""
    name = "AdamW"
    if recipe != CONTROL:
        name = f"{recipe} {bound}"
        VARIANTS[name] = Variant(name, recipe, options={"max_update": bound})
    loss = train(Run(name, LR, seed), settings)["loss"]
    return Outcome(None, loss, "" if loss is not None else "diverged")


def measure(task: tuple[str, str, float | None, int, Settings]) -> Outcome:
    """Run one case with one recipe, bound and seed."""
    case, recipe, bound, seed, settings = task
    if case == "ordinary":
        return ordinary(recipe, bound, seed, settings)
    if case == "spike":
        return spike(recipe, bound, seed, TOKENS["train"])
    runs: dict[str, Callable[[str, float | None, int], Outcome]] = {
        "sparse": sparse_inputs,
        "silence": silence,
        "magnitudes": magnitudes,
    }
    return runs[case](recipe, bound, seed)


def cell(outcomes: Sequence[Outcome]) -> str:
    """Return the worst movement, the mean loss and the errors of one recipe under one bound."""
    parts = []
    moves = [outcome.moved for outcome in outcomes if outcome.moved is not None]
    if moves:
        parts.append(f"{max(moves):,.0f}" if max(moves) >= 100 else f"{max(moves):.3g}")
    losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
    if losses:
        parts.append(f"{statistics.fmean(losses):.4f}" if max(losses) < 100 else f"{max(losses):.1e}")
    errors = sorted({outcome.error for outcome in outcomes} - {""})
    return ", then ".join(part for part in ("; ".join(parts), *errors) if part)


def page(results: Mapping[tuple[str, str, float | None], list[Outcome]], args: argparse.Namespace) -> str:
    """Return the page."""
    from lightning_memopt.optim.groups import MAX_UPDATE
    from lightning_memopt.plans.recipes import recipe_names

    seeds = f"one seed ({args.seeds[0]})" if len(args.seeds) == 1 else f"seeds {args.seeds}: mean loss, worst movement"
    losses = {key: [outcome.loss for outcome in found if outcome.loss is not None] for key, found in results.items()}
    pairs = [[losses["ordinary", recipe, bound] for bound in (MAX_UPDATE, None)] for recipe in args.recipes]
    changes = [statistics.fmean(bounded) - statistics.fmean(free) for bounded, free in pairs if bounded and free]
    low, high = (each(changes, default=math.nan) for each in (min, max))
    parts = [INTRO.format(default=MAX_UPDATE, seeds=seeds), provenance(threads=1)]
    for case, text in TEXTS.items():
        control = cell(results.get((case, CONTROL, None), []))
        rows = [
            [f"`{recipe}`", control, *(cell(results[case, recipe, bound]) for bound in BOUNDS)]
            for recipe in args.recipes
        ]
        show(case, HEAD, rows)
        parts += [f"\n{text.format(steps=args.steps, lr=LR)}\n", markdown(HEAD, rows)]
    unmeasured = [f"`{name}`" for name in recipe_names() if name not in ("adamw", *args.recipes)]
    return "\n".join([*parts, CONCLUSION.format(low=low, high=high, seeds=seeds, unmeasured=", ".join(unmeasured))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=250, help="of the ordinary training")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--root", help="folder of text files to train on instead of Python's standard library")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the page")
    args = parser.parse_args()
    settings = Settings(steps=args.steps, validation_tokens=16384, every=10**6)
    # Torch's AdamW, the control, would not notice float16 weights that become infinite.
    pairs = [(case, CONTROL, None) for case in TEXTS if case != "magnitudes"]
    pairs += [(case, recipe, bound) for case in TEXTS for recipe in args.recipes for bound in BOUNDS]
    tasks = [(*pair, seed, settings) for pair in pairs for seed in args.seeds]
    results: dict[tuple[str, str, float | None], list[Outcome]] = {pair: [] for pair in pairs}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokens.pt")
        torch.save(load_tokens(settings, args.root), path)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, context, start_worker, (path,)) as pool:
            for task, outcome in zip(tasks, pool.map(measure, tasks), strict=True):
                results[task[:3]].append(outcome)
                print(*task[:4], cell([outcome]), sep=" | ", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "bound.md").write_text(page(results, args))


if __name__ == "__main__":
    main()
