"""Train small language models with each optimizer at its best learning rate, and compare validation losses.

    python benchmarks/quality.py --jobs 2                   # everything: a day; can be stopped and started again
    python benchmarks/quality.py --studies 512 --variants AdamW adapm_lean
    python benchmarks/quality.py --minutes 60               # start no run after an hour
    python benchmarks/quality.py --cost                     # only the time and the memory of a step: a quiet machine
    python benchmarks/quality.py --report                   # only rewrite the page and the plots from the results
    python benchmarks/quality.py --trial                    # a minute, on made-up tokens, into a temporary folder

Results are appended to ``quality.jsonl`` as they arrive, and a run recorded there with the same settings and the same
optimizer is not repeated. Rows of a study run in their order: first the grid of learning rates with the first seed,
extended by factors of two while the best rate is at an edge, then the other seeds at the best rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import _memory_page as memory
from _pool import train_in_pool
from _quality_cost import costs
from _quality_page import page, table
from _quality_plots import plot_curves, plot_ranks, plot_state
from _quality_rows import needed
from _report import OUTPUT, command, commit, date, machine, show
from _studies import STUDIES, Row, Study
from _train import Run, Settings, load_tokens, train
from _variants import VARIANTS

TRIAL = {"steps": 8, "batch": 2, "every": 4, "validation_tokens": 1024, "curve_tokens": 512, "data": "synthetic"}
Result = dict[str, Any]


def read(path: Path, settings: Settings) -> list[Result]:
    """Return the finished runs with these settings and today's optimizers."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines if line.strip()]
    default = dataclasses.asdict(Settings())  # of settings that earlier records do not know
    wanted = dataclasses.asdict(settings)
    return [
        each
        for each in results
        if "loss" in each
        and {**default, **each["settings"]} == wanted
        and each["optimizer"] == definition(each["variant"])
    ]


def read_costs(path: Path) -> list[Result]:
    """Return the last measurement of the steps' cost."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for record in map(json.loads, lines) if "cost" in record]
    return [record for record in records if record["started"] == records[-1]["started"]]


def definition(variant: str) -> dict[str, Any] | None:
    """Return what defines the optimizer of a run; None if there is none of this name any more.

    It names a recipe, so it does not see that the package changed it: the results must be removed then.
    """
    return VARIANTS[variant].definition() if variant in VARIANTS else None


def train_all(study: Study, rows: Sequence[Row], args: argparse.Namespace, until: float) -> None:
    """Run everything of a study that is missing, in several processes."""
    facts = {"date": date(), "machine": machine(threads=1), "commit": commit(), "command": command()}
    results = read(args.results, study.settings)

    def todo(found: list[Result]) -> list[Run]:
        return [] if time.monotonic() > until else [run for row in rows for run in needed(found, row)]

    if not todo(results):
        return
    tokens = load_tokens(study.settings, args.root)
    for result in train_in_pool(train, study.settings, tokens, results=results, needed=todo, jobs=args.jobs):
        loss = "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}"
        name = f"{study.title}: {result['variant']}, lr {result['lr']:g}, ratio {result['ratio']:g}"
        print(f"{name}, seed {result['seed']}: {loss} ({result['seconds']:.0f} s)", flush=True)
        optimizer, settings = definition(result["variant"]), dataclasses.asdict(study.settings)
        with args.results.open("a") as file:
            file.write(json.dumps({**result, "optimizer": optimizer, "settings": settings, **facts}) + "\n")


def measure_costs(studies: Iterable[Study], args: argparse.Namespace) -> None:
    """Measure the steps of all optimizers of the studies that are recipes, or torch's."""
    rows = {row.variant for study in studies for row in study.rows}
    names = [name for name in args.variants if name in rows and VARIANTS[name].is_whole]
    facts = {"date": date(), "machine": machine(), "commit": commit(), "command": command(), "started": time.time()}
    for record in costs(names):
        print(record, flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps({**record, **facts}) + "\n")


def chosen(args: argparse.Namespace) -> dict[str, Study]:
    """Return the studies to run, as they run."""
    studies = {name: STUDIES[name] for name in args.studies}
    if args.root:
        text = {name: dataclasses.replace(study.settings, data=args.root) for name, study in studies.items()}
        studies = {name: dataclasses.replace(study, settings=text[name]) for name, study in studies.items()}
    if not args.trial:
        return studies
    settings = {name: dataclasses.replace(study.settings, **TRIAL) for name, study in studies.items()}
    rows = {
        name: [dataclasses.replace(row, seeds=row.seeds[:1]) for row in study.rows] for name, study in studies.items()
    }
    return {name: Study(study.title, settings[name], tuple(rows[name])) for name, study in studies.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--root", help="folder of text files to train on instead of Python's standard library")
    parser.add_argument("--output", type=Path, help="folder of the page, the plots and the results")
    parser.add_argument("--cost", action="store_true", help="train nothing, measure steps of the optimizers")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page and the plots")
    parser.add_argument("--trial", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="quality-")) if args.trial else OUTPUT)
    args.output.mkdir(parents=True, exist_ok=True)
    args.results = args.output / "quality.jsonl"
    return args


def finished(studies: Iterable[Study], path: Path) -> list[tuple[Study, list[Result]]]:
    """Return the studies that have results, with them."""
    found = [(study, read(path, study.settings)) for study in studies]
    return [(study, results) for study, results in found if results]


def main() -> None:
    args = parse()
    studies, until = chosen(args), time.monotonic() + 60 * args.minutes
    if args.cost:
        measure_costs(studies.values(), args)
    elif not args.report:
        for study in studies.values():
            train_all(study, [row for row in study.rows if row.variant in args.variants], args, until)
    found = finished(studies.values(), args.results)
    if not found:
        raise SystemExit(f"{args.results} holds no run of these studies: {', '.join(studies)}.")
    for study, results in found:
        show(study.title, *table(study, results))
    by_name = {name: each for name, study in studies.items() for each in found if each[0] is study}
    if memory.FLOAT32 in by_name and "bfloat16" in by_name:
        (args.output / "memory.md").write_text(memory.page(by_name))
        memory.plot(by_name, args.output / "memory.png")
    found = [by_name[name] for name in by_name if name not in memory.STUDIES]
    if found:
        (args.output / "quality.md").write_text(page(found, read_costs(args.results)))
        plot_curves(found[0][1], found[0][0], args.output / "quality.png")
        plot_state(found[0][1], found[0][0], args.output / "quality_state.png")
        plot_ranks(found, args.output / "quality_rank.png")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
