"""Compare the policies of AdaptiveMomentum at equal momentum bytes, on small models, in two settings.

    python benchmarks/adaptive.py --jobs 2           # everything; can be stopped and started again
    python benchmarks/adaptive.py --settings 4096    # the LLaMA at 4,096 tokens a step: 84 runs of minutes
    python benchmarks/adaptive.py --settings 512 --models llama --policies uniform benefit
    python benchmarks/adaptive.py --cost             # only the callback's share of a training step
    python benchmarks/adaptive.py --report           # only rewrite the page and the plots from the results
    python benchmarks/adaptive.py --trial            # a minute, on synthetic tokens, into a temporary folder

Results are appended to ``adaptive.jsonl`` as they arrive, and a run recorded there with the same settings is not
repeated. In each setting and for each model, the learning rates run with the uniform policy at the middle budget and
the first seed. All other runs use the best of these rates: seed after seed, every policy at every budget, and two
references without the callback.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _adaptive_models import FAMILIES
from _adaptive_plots import plot_allocation, plot_losses
from _adaptive_report import COST_HEAD, HEAD, chosen, cost_rows, middle, page, rows_of, tried, with_ratio
from _adaptive_train import COMPARISONS, POLICIES, REFERENCES, UNIFORM, AdaptiveSettings, Comparison, Run, cost, train
from _pool import train_in_pool
from _report import OUTPUT, command, commit, date, machine, show
from _train import load_tokens, start_worker

TRIAL = {"steps": 24, "every_n_steps": 4, "start": 4, "validation_tokens": 4096, "data": "synthetic"}
COST_STEPS = 120
COSTLY = "energy"  # the policy with most moves
Result = dict[str, Any]


def needed(results: Sequence[Result], comparison: Comparison, seeds: Sequence[int]) -> list[Run]:
    """Return the runs that can start now, given the finished ones."""
    done = {Run.of(result) for result in results}
    budget, runs = middle(comparison.budgets), []
    for model in comparison.models:
        grid = [Run(model, UNIFORM, budget, lr, seeds[0]) for lr in comparison.lrs or FAMILIES[model].lrs]
        losses = tried(results, model, budget)
        wanted = grid if set(grid) - done else planned(comparison, seeds, model, min(losses, key=lambda lr: losses[lr]))
        runs += [run for run in wanted if run not in done]
    return runs


def planned(comparison: Comparison, seeds: Sequence[int], model: str, lr: float) -> list[Run]:
    """Return all runs of a model at its learning rate, the most informative first."""
    middle_first = sorted(comparison.budgets, key=lambda each: each != middle(comparison.budgets))
    return [
        Run(model, policy, budget, lr, seed, ratio)
        for seed in seeds
        for budget in (*middle_first, None)
        for ratio in comparison.ratios
        for policy in (REFERENCES if budget is None else comparison.policies)
    ]


def read(path: Path, settings: AdaptiveSettings) -> tuple[list[Result], Result | None]:
    """Return the finished runs with these settings, and the last measurement of the cost."""
    lines = path.read_text().splitlines() if path.exists() else []
    default = dataclasses.asdict(AdaptiveSettings())  # of settings that earlier records do not know
    wanted = dataclasses.asdict(settings)
    records = [record for record in map(json.loads, lines) if {**default, **record["settings"]} == wanted]
    costs = [record for record in records if "loss" not in record]
    return [record for record in records if "loss" in record], costs[-1] if costs else None


def append(record: Result, args: argparse.Namespace, settings: AdaptiveSettings) -> None:
    """Append a result with its date, machine, commit and command."""
    facts = {"date": date(), "machine": machine(threads=1), "commit": commit(), "command": command()}
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "adaptive.jsonl").open("a") as file:
        file.write(json.dumps({**record, "settings": dataclasses.asdict(settings), **facts}) + "\n")


def train_all(args: argparse.Namespace, comparison: Comparison) -> None:
    """Run everything that is missing, in several processes."""
    settings = comparison.settings
    results, _ = read(args.output / "adaptive.jsonl", settings)
    tokens, started = load_tokens(settings, args.root), time.perf_counter()

    def todo(found: Sequence[Result]) -> list[Run]:
        return needed(found, comparison, args.seeds)

    finished = train_in_pool(train, settings, tokens, results=results, needed=todo, jobs=args.jobs)
    for count, result in enumerate(finished, start=1):
        append(result, args, settings)
        left = len(todo(results))
        minutes = left * (time.perf_counter() - started) / count / 60
        print(f"{progress(result)}  ({left} runs can start, about {minutes:.0f} minutes)", flush=True)


def progress(latest: Result) -> str:
    """Return a line about a result."""
    loss = "diverged" if latest["loss"] is None else f"loss {latest['loss']:.4f}"
    budget = "" if latest["budget"] is None else f"{latest['budget']:.1%}"
    rates = f"lr {latest['lr']:<6g} ratio {latest['ratio']:<4g} seed {latest['seed']}"
    facts = f"{loss}  momentum {latest['momentum_mean']:.2%}  {latest['seconds']:.0f} s"
    return f"{latest['model']:6} {latest['policy']:11} {budget:5} {rates}  {facts}"


def measure_cost(args: argparse.Namespace, comparison: Comparison) -> None:
    """Time the steps of the LLaMA, and the callback within them."""
    settings = comparison.settings
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokens.pt")
        torch.save(load_tokens(settings, args.root), path)
        start_worker(path)
    run = Run("llama", COSTLY, middle(comparison.budgets), FAMILIES["llama"].lrs[0], args.seeds[0])
    steps = min(COST_STEPS, settings.steps)
    seconds = {name: [round(each, 6) for each in found] for name, found in cost(run, settings, steps).items()}
    append({"seconds": seconds, "policy": run.policy, "budget": run.budget, "steps": steps}, args, settings)
    show("the callback in a training step", COST_HEAD, cost_rows(seconds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(COMPARISONS), choices=COMPARISONS, help="tokens a step")
    parser.add_argument("--models", nargs="+", choices=FAMILIES, help="instead of all of the setting, like the rest")
    parser.add_argument("--policies", nargs="+", choices=POLICIES)
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of AdamW's momentum")
    parser.add_argument("--ratios", type=float, nargs="+", help="of the rate of embeddings and norms to that of others")
    parser.add_argument("--lrs", type=float, nargs="+", help="to try for every model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes the learning rate")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--root", help="folder of text files to train on instead of Python's standard library")
    parser.add_argument("--output", type=Path, help="folder of the page, the plots and the results")
    parser.add_argument("--cost", action="store_true", help="train nothing to the end, time training steps")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page and the plots")
    parser.add_argument("--trial", action="store_true", help="a short run of everything")
    args = parser.parse_args()
    if args.trial:
        args.seeds, args.lrs = args.seeds[:1], args.lrs or [1e-3]
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="adaptive-")) if args.trial else OUTPUT)
    return args


def asked(args: argparse.Namespace, name: str) -> Comparison:
    """Return a comparison, cut to what the arguments ask for."""
    comparison = COMPARISONS[name]
    for key in ("models", "policies", "budgets", "ratios", "lrs"):
        if given := getattr(args, key):
            comparison = dataclasses.replace(comparison, **{key: tuple(given)})
    changes: dict[str, Any] = {"data": args.root} if args.root else {}
    if args.trial:
        changes |= {**TRIAL, "batch": min(comparison.settings.batch, 8)}
        comparison = dataclasses.replace(comparison, budgets=(middle(comparison.budgets),))
    return dataclasses.replace(comparison, settings=dataclasses.replace(comparison.settings, **changes))


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    comparisons = [asked(args, name) for name in args.settings]
    small = asked(args, "512")
    if not args.report and not args.cost:
        for comparison in comparisons:
            train_all(args, comparison)
    if args.cost or args.trial:
        measure_cost(args, small)
    path = args.output / "adaptive.jsonl"
    # The page holds all settings, whatever was run now.
    found = [(each, read(path, each.settings)[0]) for each in (asked(args, name) for name in COMPARISONS)]
    measured = read(path, small.settings)[1]
    if not any(results for _, results in found):
        if args.cost:
            return
        raise SystemExit(f"{path} holds no run with these settings: {', '.join(COMPARISONS)}")
    for comparison, results in found:
        here = chosen(results, middle(comparison.budgets))
        for ratio in comparison.ratios:
            for model in comparison.models:
                title = f"{FAMILIES[model].title}, {comparison.title}, ratio {ratio:g}"
                if rows := rows_of(with_ratio(here, ratio), model, comparison.budgets):
                    show(title, HEAD, rows)
        plot_losses(results, comparison, args.output / f"adaptive{comparison.suffix}.png")
        plot_allocation(results, comparison, args.output / f"adaptive_allocation{comparison.suffix}.png")
    (args.output / "adaptive.md").write_text(page(found, measured))
    print(f"written: {args.output / 'adaptive.md'}")


if __name__ == "__main__":
    main()
