"""Train a small LLaMA with each recipe at its best learning rate, and compare validation losses.

    python benchmarks/convergence.py --jobs 2        # everything; can be stopped and started again
    python benchmarks/convergence.py --variants AdamW adapm_lean
    python benchmarks/convergence.py --report        # only rewrite the page and the plot from the results
    python benchmarks/convergence.py --synthetic --steps 40 --lrs 4e-3 --jobs 1 --output /tmp/convergence   # a trial

Results are appended to ``convergence.jsonl`` as they arrive, and a run recorded there with the same settings is not
repeated. For each variant, the grid of learning rates (times the variant's multiplier) runs with the first seed. While
the best rate is at an edge, the grid grows by a factor of two. Then the other seeds run at the best rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _curves import loss_or_inf, page, plot, table
from _pool import train_in_pool
from _report import OUTPUT, command, commit, date, machine, show
from _train import Run, Settings, load_tokens, train
from _variants import DEFAULT, VARIANTS

GRID = (1e-3, 2e-3, 4e-3)
MAX_EXTENSIONS = 6
Result = dict[str, Any]


def rounded(lr: float) -> float:
    """Round off the last bits of a learning rate, so that it can be a key."""
    return float(f"{lr:.4g}")


def needed(variant: str, results: Sequence[Result], grid: Sequence[float], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of a variant that can start now, given the finished ones."""
    done = {(r["lr"], r["seed"]): loss_or_inf(r) for r in results if r["variant"] == variant}
    stated = {rounded(lr * VARIANTS[variant].lr_multiplier) for lr in grid}
    lrs = sorted(stated | {lr for lr, seed in done if seed == seeds[0]})
    for _ in range(MAX_EXTENSIONS + 1):
        if missing := [lr for lr in lrs if (lr, seeds[0]) not in done]:
            return [Run(variant, lr, seeds[0]) for lr in missing]
        best = min(lrs, key=lambda lr: done[lr, seeds[0]])
        if len(lrs) == 1 or lrs[0] < best < lrs[-1]:
            break
        lrs = sorted([*lrs, rounded(best * 2 if best == lrs[-1] else best / 2)])
    return [Run(variant, best, seed) for seed in seeds[1:] if (best, seed) not in done]


def read(path: Path, settings: Settings) -> list[Result]:
    """Return the finished runs with these settings and the variants' current betas."""
    if not path.exists():
        return []
    results = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    wanted = dataclasses.asdict(settings)
    return [
        result
        for result in results
        if result["settings"] == wanted
        and result["variant"] in VARIANTS
        and result["betas"] == list(VARIANTS[result["variant"]].betas)
    ]


def train_all(args: argparse.Namespace, settings: Settings) -> None:
    """Run everything that is missing, in several processes."""
    args.results.parent.mkdir(parents=True, exist_ok=True)
    facts = {"date": date(), "machine": machine(threads=1), "commit": commit(), "command": command()}
    results: list[Result] = read(args.results, settings)

    def todo(found: list[Result]) -> list[Run]:
        return [run for name in args.variants for run in needed(name, found, args.lrs, args.seeds)]

    tokens, started = load_tokens(settings, args.root), time.perf_counter()
    finished = train_in_pool(train, settings, tokens, results=results, needed=todo, jobs=args.jobs)
    for count, result in enumerate(finished, start=1):
        report_progress(results, args, (time.perf_counter() - started) / count)
        betas = list(VARIANTS[result["variant"]].betas)
        record = {**result, "betas": betas, "settings": dataclasses.asdict(settings), **facts}
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")


def report_progress(results: Sequence[Result], args: argparse.Namespace, pace: float) -> None:
    """Print the latest result and the time that the rest takes if no grid grows."""
    latest = results[-1]
    remaining = 0
    for name in args.variants:
        ready = needed(name, results, args.lrs, args.seeds)
        tuning_now = any(run.seed == args.seeds[0] for run in ready)
        remaining += len(ready) + (len(args.seeds) - 1 if tuning_now else 0)
    loss = "diverged" if latest["loss"] is None else f"loss {latest['loss']:.4f}"
    name = f"{latest['variant']:16} lr {latest['lr']:<8g} seed {latest['seed']}"
    left = f"{remaining} runs left, about {remaining * pace / 60:.0f} minutes"
    print(f"{name}  {loss}  {latest['seconds']:.0f} s  ({left})", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--weight-decay", type=float, default=Settings.weight_decay)
    parser.add_argument("--lrs", type=float, nargs="+", default=GRID, help="grid before the variant's multiplier")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first tunes the learning rate")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--root", help="folder of text files to train on instead of Python's standard library")
    parser.add_argument("--synthetic", action="store_true", help="train on made-up tokens, to try the script")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the page, the plot and the results")
    parser.add_argument("--results", type=Path, help="the results; default: convergence.jsonl in --output")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page and the plot")
    args = parser.parse_args()
    args.results = args.results or args.output / "convergence.jsonl"
    return args


def main() -> None:
    args = parse()
    data = "synthetic" if args.synthetic else args.root or Settings.data
    settings = Settings(steps=args.steps, batch=args.batch, weight_decay=args.weight_decay, data=data)
    if not args.report:
        train_all(args, settings)
    results = read(args.results, settings)
    if not results:
        raise SystemExit(f"{args.results} holds no run with these settings: {settings}")
    show("validation loss", *table(results))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "convergence.md").write_text(page(results, settings, args.lrs))
    plot(results, args.output / "convergence.png")


if __name__ == "__main__":
    main()
