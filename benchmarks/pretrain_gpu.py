"""Pretrain a LLaMA of 60 million parameters on one GPU, with AdamW and with compressed state.

    python benchmarks/pretrain_gpu.py                     # 8 minutes on an H100; a second call goes on
    python benchmarks/pretrain_gpu.py --report            # only rewrite the page and the plot from the results
    python benchmarks/pretrain_gpu.py --toy               # a minute on a CPU, to try the script

It needs torch and transformers (and matplotlib for the plot, which ``--report`` draws later), and no network: the text
is the Python source code of everything installed. The learning rate of each optimizer is tuned with runs of a tenth of
the length. Then all of them train at AdamW's best rate, and those whose own best rate differs also at that.

Results are appended to ``pretrain_gpu.jsonl`` after every run, and a run recorded there with the same settings, text
and optimizer is not repeated. A run that does not fit into ``--minutes`` any more is skipped; one that is cut off goes
on from its last checkpoint in the next call. Tokens and checkpoints lie in ``--work``.
"""

# ruff: noqa: E402 - the package need not be installed

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import OUTPUT, ROOT, command, commit, date, machine, show

sys.path.insert(0, str(ROOT))

from _curves import loss_or_inf
from _pretrain_page import page, plot, table
from _pretrain_run import Session, checkpoint_of, train
from _pretrain_text import load
from _train import Run, Settings, Tokens
from _variants import REFERENCE, VARIANTS
from quality import definition, read

GRID = (1e-3, 2e-3, 4e-3)
TENTH = 10
MARGIN = 1.1  # on the time that a run will probably take
# GaLore's LLaMA 60M and its sequences of 256 tokens. 1,832 steps see 60 million tokens.
FULL = Settings(
    steps=1832,
    batch=128,
    length=256,
    hidden=512,
    intermediate=1376,
    layers=8,
    heads=8,
    vocabulary=32000,
    every=92,
    validation_tokens=524_288,
    curve_tokens=65_536,
    max_chars=240_000_000,
)
TOY = dataclasses.replace(
    FULL,
    steps=40,
    batch=8,
    length=32,
    hidden=32,
    intermediate=88,
    layers=2,
    heads=2,
    vocabulary=512,
    every=10,
    validation_tokens=2048,
    curve_tokens=1024,
    max_chars=1_000_000,
)
Result = dict[str, Any]
Job = tuple[Settings, Run]


def short(settings: Settings) -> Settings:
    """Return the settings of the runs that tune the learning rate."""
    steps = max(1, settings.steps // TENTH)
    return dataclasses.replace(settings, steps=steps, every=max(1, steps // 4))


def needed(variants: Sequence[str], lrs: Sequence[float], settings: Settings, path: Path) -> Iterator[Job]:
    """Yield the runs that are missing and whose rates are known."""
    tuning, final = read(path, short(settings)), read(path, settings)
    done = [(result["variant"], result["lr"]) for result in tuning]
    missing = [(name, lr) for name in variants for lr in lrs if (name, lr) not in done]
    if missing:
        yield from ((short(settings), Run(name, lr, 0)) for name, lr in missing)
        return
    best = {name: best_lr(tuning, name, lrs) for name in variants}
    done = [(result["variant"], result["lr"]) for result in final]
    wanted = dict.fromkeys([*((name, best[REFERENCE]) for name in variants), *best.items()])
    yield from ((settings, Run(name, lr, 0)) for name, lr in wanted if (name, lr) not in done)


def best_lr(tuning: Sequence[Result], variant: str, lrs: Sequence[float]) -> float:
    """Return the rate with the lowest loss; the lowest rate if all runs diverged."""
    losses = {each["lr"]: loss_or_inf(each) for each in tuning if each["variant"] == variant}
    return min(sorted(lrs), key=lambda lr: losses[lr])


def train_all(args: argparse.Namespace, settings: Settings, tokens: Tokens) -> None:
    """Run everything that is missing and fits into the time."""
    options = {"micro": args.micro, "compiled": args.compile, **({"save_every": 0.0} if args.toy else {})}
    session = Session(settings, tokens, args.work, until=args.until, **options)
    facts = {"date": date(), "machine": machine(session.device), "commit": commit(), "command": command()}
    skipped: list[Job] = []
    started = False
    while jobs := [job for job in needed(args.variants, args.lrs, settings, args.results) if job not in skipped]:
        now, run = jobs[0]
        name = f"{run.variant}, lr {run.lr:g}, {now.steps} steps"
        # A call trains at least once, so that every call brings a run forward, however long it is.
        if started and time.monotonic() + expected_seconds(now, run, settings, args.results) > args.until:
            print(f"{name}: skipped, does not fit into the time that is left", flush=True)
            skipped.append(jobs[0])
            continue
        started = True
        result = train(run, now, session)
        if result is None:
            print(f"{name}: out of time; call again to go on", flush=True)
            return
        with args.results.open("a") as file:
            known = {"optimizer": definition(run.variant), "settings": dataclasses.asdict(now)}
            file.write(json.dumps({**result, **known, **facts}) + "\n")
        checkpoint_of(run, now, args.work).unlink(missing_ok=True)
        loss = "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}"
        rate = f"{result['tokens_per_second'] or 0:,.0f} tokens/s"
        print(f"{name}: {loss}, {rate}, {result['seconds']:.0f} s", flush=True)


def expected_seconds(now: Settings, run: Run, settings: Settings, path: Path) -> float:
    """Return what a run will take, from the latest one of its optimizer or else of any; 0 if nothing is known."""
    known = [each for each in [*read(path, short(settings)), *read(path, settings)] if each["tokens_per_second"]]
    mine = [each for each in known if each["variant"] == run.variant] or known
    if not mine:
        return 0.0
    return MARGIN * now.steps * now.batch * now.length / mine[-1]["tokens_per_second"]


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [REFERENCE, "adapm_lean"]
    parser.add_argument("--variants", nargs="+", default=names, choices=VARIANTS, help=f"besides {REFERENCE}")
    parser.add_argument("--lrs", type=float, nargs="+", default=GRID, help="learning rates to try")
    parser.add_argument("--steps", type=int, help="of a long run")
    parser.add_argument("--minutes", type=float, default=7.5, help="for the whole call")
    parser.add_argument("--micro", type=int, help="sequences of a backward pass, where a batch does not fit")
    parser.add_argument("--compile", action="store_true", help="compile forward and backward passes (a minute)")
    parser.add_argument("--roots", type=Path, nargs="+", help="folders of Python files instead of all installed ones")
    parser.add_argument("--output", type=Path, help="folder of the page, the plot and the results")
    parser.add_argument("--work", type=Path, help="folder of the tokens and of unfinished runs")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page and the plot")
    parser.add_argument("--toy", action="store_true", help="a tiny model and a few steps; its numbers mean nothing")
    args = parser.parse_args(given)
    args.until = time.monotonic() + 60 * args.minutes
    args.variants = list(dict.fromkeys([REFERENCE, *args.variants]))
    args.work = args.work or ROOT / "runs" / ("pretrain_toy" if args.toy else "pretrain_gpu")
    args.output = args.output or (args.work if args.toy else OUTPUT)
    for folder in (args.work, args.output):
        folder.mkdir(parents=True, exist_ok=True)
    args.results = args.output / "pretrain_gpu.jsonl"
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = parse(given)
    settings = TOY if args.toy else FULL
    if args.toy:
        torch.set_num_threads(1)  # more take longer for so little
    if args.steps:
        settings = dataclasses.replace(settings, steps=args.steps, every=max(1, args.steps // 20))
    if args.report:
        lines = args.results.read_text().splitlines() if args.results.exists() else []
        about = json.loads(lines[-1])["settings"]["data"] if lines else ""
    else:
        tokens, about = load(settings, args.roots, args.work)
    settings = dataclasses.replace(settings, data=about)
    if not args.report:
        train_all(args, settings, tokens)
    tuning, final = read(args.results, short(settings)), read(args.results, settings)
    if not tuning:
        raise SystemExit(f"{args.results} holds no run with these settings: {settings}.")
    (args.output / "pretrain_gpu.md").write_text(page(tuning, final, settings))
    print(f"written: {args.output / 'pretrain_gpu.md'}", flush=True)
    plot(final, args.output / "pretrain_gpu.png")
    show("validation loss", *table(final))


if __name__ == "__main__":
    main()
