"""Run the examples with AdamW and with compressed state, each at its best learning rate, and compare.

    python benchmarks/examples.py --jobs 2                      # hours; can be stopped and started again
    python benchmarks/examples.py --examples vision pretrain    # 40 minutes of a core
    python benchmarks/examples.py --report                      # only rewrite the page and the plot from the results
    python benchmarks/examples.py --trial                       # a few steps of everything, into a temporary folder

Every run is the example's own command on one CPU process. Results are appended to ``examples.jsonl`` as they arrive,
and a run recorded there is not repeated. The rate of the example's file, half and twice of it are tried with the first
seed, and further ones while the best is at an edge. The other seeds run at the best rate. ``sft``, ``lora``, ``dpo``
and ``remax`` start from the models that their READMEs pretrain, which are kept in ``runs/examples``, a folder each.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from _quality_rows import Result, best_runs, needed
from _report import OUTPUT, ROOT, command, commit, date, machine, markdown, origins, show
from _studies import SEEDS, Row
from _train import Run

RECIPES = ("adamw", "adapm", "adapm_lean", "adam_snsm")


@dataclass(frozen=True)
class Example:
    """A config of the examples.

    Attributes:
        folder: Of the example.
        config: Its file.
        title: For the page.
        second: A metric besides the loss: its name in the log, and its title.
        base: Configs of the pretraining that it continues, the last of which names its folder; empty if it starts from
            nothing.
        has_order: Whether the order of its data has a seed of its own.
        reward: The metric whose distance from 1 is the loss; None for ``val_loss``.
        prefix: What the files of its recipes begin with.
    """

    folder: str
    config: str
    title: str
    second: tuple[str, str]
    base: tuple[str, ...]
    has_order: bool = True
    reward: str | None = None
    prefix: str = ""

    @property
    def loss(self) -> str:
        """What the loss is called."""
        return f"1 - {self.reward}" if self.reward else "validation loss"

    @property
    def base_name(self) -> str:
        """The folder below ``runs`` in which it looks for the model that it continues; empty if there is none."""
        return self.base[-1].split("/")[0] if self.base else ""


PRETRAIN = ("pretrain/pretrain.yaml",)
LONGER = (*PRETRAIN, "preference/pretrain.yaml")
EXAMPLES = {
    "pretrain": Example("pretrain", "pretrain.yaml", "Pretraining", ("val_perplexity", "perplexity"), ()),
    "sft": Example("sft", "sft.yaml", "Supervised fine-tuning", ("parses", "answers that parse"), PRETRAIN),
    "lora": Example("sft", "lora.yaml", "LoRA", ("parses", "answers that parse"), PRETRAIN, prefix="lora_"),
    "dpo": Example("preference", "dpo.yaml", "Preferences (DPO)", ("val_accuracy", "accuracy"), LONGER, prefix="dpo_"),
    "remax": Example(
        "preference",
        "remax.yaml",
        "Rewards (ReMax)",
        ("val_kl", "divergence"),
        LONGER,
        reward="val_reward",
        prefix="remax_",
    ),
    "vision": Example("vision", "vit.yaml", "Images", ("val_accuracy", "accuracy"), (), False),
}
_INTRODUCTION = """# Examples

The examples of [examples/](../../examples/README.md) as their files define them, on one CPU process, with AdamW and
three recipes. The rate is tuned for each: that of the example's file, half and twice of it with the first seed, and
further while the best is at an edge. The other seeds run at the best rate. Loss is that of the validation data at the
end, and for ReMax the distance of the mean reward from 1. The betas are (0.9, 0.95), and (0.9, 0.999) for `adam_snsm`.
The column before the state is a second metric, the mean of
the seeds. Peak is the largest resident memory of the process, most of which is PyTorch and the data. These are short
runs of small models: they show that a recipe works for a task, not what it is worth at scale."""
TRIAL = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2")


def row(example: Example, recipe: str, seeds: tuple[int, ...]) -> Row:
    """Return the runs that an example needs for a recipe; the rate of its file is the middle of the grid."""
    file = ROOT / "examples" / example.folder / f"{example.prefix}{recipe}.yaml"
    content = yaml.safe_load(file.read_text())
    return Row(recipe, float(content["optimizer"]["init_args"]["lr"]), seeds=seeds)


def train(example: Example, run: Run, base: Path, trial: bool) -> Result:
    """Run an example's command in an empty folder, and return what it logs.

    Raises:
        RuntimeError: If the command fails; with the end of what it prints.
    """
    folder = ROOT / "examples" / example.folder
    with tempfile.TemporaryDirectory(prefix="example-") as place:
        if example.base:
            (Path(place) / "runs").mkdir()
            (Path(place) / "runs" / example.base_name).symlink_to(base)
        fit(place, [folder / example.config, folder / f"{example.prefix}{run.variant}.yaml"], [
            f"--optimizer.lr={run.lr}", f"--seed_everything={run.seed}",
            *([f"--data.seed={run.seed}"] if example.has_order else []), f"--trainer.default_root_dir={place}/out",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={place}/log",
            *(TRIAL if trial else ()),
        ])  # fmt: skip
        return {"variant": run.variant, "lr": run.lr, "seed": run.seed, "ratio": 1.0, **logged(Path(place), example)}


def fit(place: str, configs: Sequence[Path], args: Sequence[str]) -> None:
    files = [f"--config={path}" for path in configs]
    always = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_memopt", "fit", *files, *always, *args],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, done.args))} failed:\n{done.stderr[-3000:]}")


def logged(place: Path, example: Example) -> dict[str, Any]:
    """Return losses and memory of a run from the files that it leaves."""
    (metrics,) = place.rglob("metrics.csv")
    with metrics.open() as file:
        key = example.reward or "val_loss"
        lines = [line for line in csv.DictReader(file) if line.get(key)]
    (memory,) = place.rglob("memory.json")
    history = json.loads(memory.read_text())["history"]
    values = [(int(line["step"]) + 1, float(line[key])) for line in lines]
    curve = [(step, 1 - value if example.reward else value) for step, value in values]
    second = [float(line[example.second[0]]) for line in lines if line.get(example.second[0])]
    return {
        "loss": curve[-1][1],
        "curve": curve,
        "second": second[-1],
        "state_bytes": history[-1]["state_bytes"],
        "peak_bytes": max(each["peak_bytes"] for each in history),
    }


def make_base_model(base: Path, example: Example, trial: bool) -> None:
    """Pretrain the model that an example starts from, unless an earlier call has."""
    if (base / "model" / "config.json").is_file():
        return
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="example-", dir=base.parent) as place:
        configs = [ROOT / "examples" / name for name in example.base]
        fit(place, configs, [*TRIAL, "--data.max_chars=1000000"] if trial else ())
        (Path(place) / "runs" / example.base_name).rename(base)


def run_all(names: Iterable[str], path: Path, args: argparse.Namespace) -> None:
    """Run everything that is missing, in several processes."""
    seeds = SEEDS[:1] if args.trial else SEEDS
    folder = path.parent if args.trial else ROOT / "runs" / "examples"
    for name in names:
        example = EXAMPLES[name]
        base = folder / example.base_name
        if example.base:
            make_base_model(base, example, args.trial)
        running: dict[Future[Result], Run] = {}
        with ThreadPoolExecutor(args.jobs) as pool:
            while True:
                results = read(path)[name]
                todo = [run for recipe in args.recipes for run in needed(results, row(example, recipe, seeds))]
                for run in [run for run in todo if run not in running.values()][: args.jobs - len(running)]:
                    running[pool.submit(train, example, run, base, args.trial)] = run
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    facts = {"date": date(), "machine": machine(threads=1), "commit": commit(), "command": command()}
                    result = {"example": name, **future.result(), **facts}
                    print(f"{name}: {result['variant']}, lr {result['lr']:g}, seed {result['seed']}: "
                          f"loss {result['loss']:.4f}", flush=True)  # fmt: skip
                    with path.open("a") as file:
                        file.write(json.dumps(result) + "\n")


def read(path: Path) -> dict[str, list[Result]]:
    """Return the results of every example."""
    found: dict[str, list[Result]] = {name: [] for name in EXAMPLES}
    for line in path.read_text().splitlines() if path.is_file() else ():
        result = json.loads(line)
        found[result["example"]].append(result)
    return found


def table(example: Example, results: Sequence[Result], seeds: tuple[int, ...]) -> tuple[list[str], list[list[str]]]:
    """Return a row per recipe that has a best rate."""
    head = ["recipe", "lr", *(f"seed {seed}" for seed in seeds), "mean", "std", example.second[1], "state", "peak"]
    rows = []
    for recipe in RECIPES:
        runs = best_runs(results, row(example, recipe, seeds))
        if not runs:
            continue
        losses = {run["seed"]: run["loss"] for run in runs}
        rows.append([
            recipe, f"{runs[0]['lr']:g}", *(f"{losses[seed]:.3f}" if seed in losses else "" for seed in seeds),
            f"{statistics.fmean(losses.values()):.3f}",
            f"{statistics.stdev(losses.values()):.3f}" if len(losses) > 1 else "",
            f"{statistics.fmean(run['second'] for run in runs):.3f}", f"{runs[0]['state_bytes'] / 2**20:.2f} MiB",
            f"{max(run['peak_bytes'] for run in runs) / 2**20:.0f} MiB",
        ])  # fmt: skip
    return head, rows


def plot(example: Example, results: Sequence[Result], seeds: tuple[int, ...], path: Path) -> None:
    """Draw the loss against steps, the mean of the seeds at the best rate."""
    from lightning_memopt.figures.style import COLORS, DPI, REFERENCE, SMALL, finish, new_figure

    figure = new_figure(7, 4.2)
    axis = figure.subplots()
    for color, recipe in zip([REFERENCE, *COLORS], RECIPES, strict=False):
        runs = best_runs(results, row(example, recipe, seeds))
        if not runs:
            continue
        points = list(zip(*(run["curve"] for run in runs), strict=False))
        steps = [point[0][0] for point in points]
        means = [statistics.fmean(loss for _, loss in point) for point in points]
        axis.plot(steps, means, marker="o", color=color, label=recipe)
    finish(axis, title=example.title, x="steps", y=example.loss)
    axis.legend(fontsize=SMALL)
    figure.savefig(path, dpi=DPI)


def page(found: Mapping[str, Sequence[Result]], seeds: tuple[int, ...]) -> str:
    """Return the page with a table per example."""
    parts = [_INTRODUCTION]
    for name, results in found.items():
        head, rows = table(EXAMPLES[name], results, seeds)
        if rows:
            picture = f"![{EXAMPLES[name].loss} against steps](examples_{name}.png)"
            parts += [f"## {EXAMPLES[name].title}", picture, markdown(head, rows), origins(results)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", default=list(EXAMPLES), choices=EXAMPLES)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--output", type=Path, help="folder of the page, the plot and the results")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page and the plot")
    parser.add_argument("--trial", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    output = args.output or (Path(tempfile.mkdtemp(prefix="examples-")) if args.trial else OUTPUT)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "examples.jsonl"
    if not args.report:
        run_all(args.examples, path, args)
    seeds, found = SEEDS[:1] if args.trial else SEEDS, read(path)
    if not any(found.values()):
        raise SystemExit(f"{path} holds no run.")
    for name, results in found.items():
        if results:
            head, rows = table(EXAMPLES[name], results, seeds)
            show(EXAMPLES[name].title, head, rows)
            if rows:
                plot(EXAMPLES[name], results, seeds, output / f"examples_{name}.png")
    (output / "examples.md").write_text(page(found, seeds))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
