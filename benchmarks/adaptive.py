"""Compare the policies of AdaptiveMomentum at equal momentum bytes, on three small models.

    python benchmarks/adaptive.py --jobs 2           # everything; can be stopped and started again
    python benchmarks/adaptive.py --models llama --policies uniform benefit
    python benchmarks/adaptive.py --cost             # only the callback's share of a training step
    python benchmarks/adaptive.py --report           # only rewrite the page and the plots from the results
    python benchmarks/adaptive.py --trial            # a minute, on synthetic tokens, into a temporary folder

Results are appended to ``adaptive.jsonl`` as they arrive, and a run recorded there with the same settings is not
repeated. For each model, the grid of learning rates runs with the uniform policy at the middle budget and the first
seed. All other runs use the best of these rates: every policy with all seeds at the middle budget, and with the first
``--few`` seeds at the other budgets, and two references without the callback.
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
from _adaptive_report import COST_HEAD, HEAD, chosen, cost_rows, middle, page, rows_of, tried
from _adaptive_train import POLICIES, REFERENCES, UNIFORM, AdaptiveSettings, Run, cost, train
from _pool import train_in_pool
from _report import OUTPUT, command, commit, date, machine, show
from _train import load_tokens, start_worker

BUDGETS = (0.025, 0.05, 0.1)
TRIAL = {"steps": 24, "every_n_steps": 4, "start": 4, "validation_tokens": 4096, "data": "synthetic"}
COST_STEPS = 120
COSTLY = "energy"  # the policy with most moves
Result = dict[str, Any]


def needed(results: Sequence[Result], args: argparse.Namespace) -> list[Run]:
    """Return the runs that can start now, given the finished ones."""
    done = {Run.of(result) for result in results}
    budget, first = middle(args.budgets), args.seeds[0]
    runs = []
    for model in args.models:
        grid = [Run(model, UNIFORM, budget, lr, first) for lr in args.lrs or FAMILIES[model].lrs]
        losses = tried(results, model, budget)
        wanted = grid if set(grid) - done else planned(args, model, min(losses, key=lambda lr: losses[lr]))
        runs += [run for run in wanted if run not in done]
    return runs


def planned(args: argparse.Namespace, model: str, lr: float) -> list[Run]:
    """Return all runs of a model at its learning rate, the most important first."""
    budget = middle(args.budgets)
    others, few = [each for each in args.budgets if each != budget], args.seeds[: args.few]
    return [
        *(Run(model, policy, budget, lr, seed) for seed in args.seeds for policy in args.policies),
        *(Run(model, policy, None, lr, seed) for seed in args.seeds for policy in REFERENCES),
        *(Run(model, policy, other, lr, seed) for seed in few for other in others for policy in args.policies),
    ]


def read(path: Path, settings: AdaptiveSettings) -> tuple[list[Result], Result | None]:
    """Return the finished runs with these settings, and the last measurement of the cost."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for record in map(json.loads, lines) if record["settings"] == dataclasses.asdict(settings)]
    costs = [record for record in records if "loss" not in record]
    return [record for record in records if "loss" in record], costs[-1] if costs else None


def append(record: Result, args: argparse.Namespace, settings: AdaptiveSettings) -> None:
    """Append a result with its date, machine, commit and command."""
    facts = {"date": date(), "machine": machine(threads=1), "commit": commit(), "command": command()}
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "adaptive.jsonl").open("a") as file:
        file.write(json.dumps({**record, "settings": dataclasses.asdict(settings), **facts}) + "\n")


def train_all(args: argparse.Namespace, settings: AdaptiveSettings) -> None:
    """Run everything that is missing, in several processes."""
    results, _ = read(args.output / "adaptive.jsonl", settings)
    tokens, started = load_tokens(settings, args.root), time.perf_counter()
    finished = train_in_pool(
        train, settings, tokens, results=results, needed=lambda found: needed(found, args), jobs=args.jobs
    )
    for count, result in enumerate(finished, start=1):
        report_progress(results, args, (time.perf_counter() - started) / count)
        append(result, args, settings)


def report_progress(results: Sequence[Result], args: argparse.Namespace, pace: float) -> None:
    """Print the latest result and the time that the rest takes."""
    latest = results[-1]
    whole = {run for model in args.models for run in planned(args, model, 0.0)}
    losers = sum(len(args.lrs or FAMILIES[model].lrs) - 1 for model in args.models)
    left = max(0, len(whole) + losers - len(results))
    loss = "diverged" if latest["loss"] is None else f"loss {latest['loss']:.4f}"
    budget = "" if latest["budget"] is None else f"{latest['budget']:.1%}"
    name = f"{latest['model']:6} {latest['policy']:11} {budget:5} lr {latest['lr']:<6g} seed {latest['seed']}"
    facts = f"{loss}  momentum {latest['momentum_mean']:.2%}  {latest['seconds']:.0f} s"
    print(f"{name}  {facts}  ({left} runs left, about {left * pace / 60:.0f} minutes)", flush=True)


def measure_cost(args: argparse.Namespace, settings: AdaptiveSettings) -> None:
    """Time the steps of the LLaMA, and the callback within them."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokens.pt")
        torch.save(load_tokens(settings, args.root), path)
        start_worker(path)
    run = Run("llama", COSTLY, middle(args.budgets), FAMILIES["llama"].lrs[0], args.seeds[0])
    steps = min(COST_STEPS, settings.steps)
    seconds = {name: [round(each, 6) for each in found] for name, found in cost(run, settings, steps).items()}
    append({"seconds": seconds, "policy": run.policy, "budget": run.budget, "steps": steps}, args, settings)
    show("the callback in a training step", COST_HEAD, cost_rows(seconds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of AdamW's momentum")
    parser.add_argument("--steps", type=int, default=AdaptiveSettings.steps)
    parser.add_argument("--lrs", type=float, nargs="+", help="to try for every model, instead of its own grid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes the learning rate")
    parser.add_argument("--few", type=int, default=1, help="how many seeds at other budgets than the middle one")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--root", help="folder of text files to train on instead of Python's standard library")
    parser.add_argument("--output", type=Path, help="folder of the page, the plots and the results")
    parser.add_argument("--cost", action="store_true", help="train nothing to the end, time training steps")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page and the plots")
    parser.add_argument("--trial", action="store_true", help="a short run of everything")
    args = parser.parse_args()
    if args.trial:
        args.seeds, args.lrs, args.budgets = args.seeds[:1], args.lrs or [1e-3], [middle(args.budgets)]
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="adaptive-")) if args.trial else OUTPUT)
    return args


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = AdaptiveSettings(steps=args.steps, data=args.root or AdaptiveSettings.data)
    if args.trial:
        settings = dataclasses.replace(settings, **TRIAL)
    if not args.report and not args.cost:
        train_all(args, settings)
    if args.cost or args.trial:
        measure_cost(args, settings)
    results, measured = read(args.output / "adaptive.jsonl", settings)
    if args.cost and not results:
        return
    if not results:
        raise SystemExit(f"{args.output / 'adaptive.jsonl'} holds no run with these settings: {settings}")
    budgets = sorted(args.budgets)
    for model in args.models:
        show(FAMILIES[model].title, HEAD, rows_of(chosen(results, middle(budgets)), model, budgets))
    (args.output / "adaptive.md").write_text(page(results, measured, settings, budgets))
    plot_losses(results, budgets, args.output / "adaptive.png")
    plot_allocation(results, middle(budgets), args.output / "adaptive_allocation.png")
    print(f"written: {args.output / 'adaptive.md'}")


if __name__ == "__main__":
    main()
