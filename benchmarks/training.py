"""Measure whole training: a step under memopt_fsdp against Lightning's own FSDP2 strategy with fused AdamW.

    python benchmarks/training.py                                      # two CPU processes, about 12 minutes
    python benchmarks/training.py --size tiny --steps 3 --rounds 1 --output /tmp

Each run is one Trainer with two processes: forward, backward and the optimizer's step on random tokens. Runs
take turns for several rounds, the baseline first in each. The table has the median over rounds of the ratio of median
steps in the same round. The first two steps of a run do not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import OUTPUT, ROOT, markdown, provenance, show
from _step_models import SIZES
from _train import Settings, build_model, loss_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_memopt as lm

PROCESSES, WARMUP = 2, 2
BASELINE = "FSDP2, torch.optim.AdamW(fused=True)"
RECIPES = ("adamw", "adafactor", "adapm", "adapm_lean", "adam_snsm")
HEAD = ["optimizer", "x baseline", "ms per step", "tokens / s", "of which optimizer (ms)"]


class Module(LightningModule):
    """A LLaMA on random tokens."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.name, self.settings = build_model(settings), name, settings

    def configure_model(self) -> None:
        """Shard as Lightning's documentation of FSDP2 does; memopt_fsdp shards by itself."""
        if self.name == BASELINE:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        if self.name == BASELINE:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
        return lm.MemOpt(self.named_parameters(), recipe=self.name, lr=1e-3)


class Clock(Callback):
    """Notes the seconds of every step, and of the optimizer in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Time the optimizer."""
        step = trainer.optimizers[0].step

        def timed(closure: Any = None) -> Any:
            loss = closure() if closure is not None else None  # forward and backward
            started = time.perf_counter()
            step()
            self.optimizer.append(time.perf_counter() - started)
            return loss

        trainer.optimizers[0].step = timed  # type: ignore[method-assign]

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.steps.append(time.perf_counter() - self._started)


def work(name: str, settings: Settings) -> None:
    """Train in this process, one of several, and print what the first one measured."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    shape = (settings.steps * settings.batch * PROCESSES, settings.length + 1)
    tokens = torch.randint(settings.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=ModelParallelStrategy(data_parallel_size=PROCESSES, tensor_parallel_size=1)
        if name == BASELINE
        else "memopt_fsdp",
        max_steps=settings.steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[clock],
    )
    trainer.fit(Module(name, settings), DataLoader(tokens, batch_size=settings.batch))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        steps, optimizer = (statistics.median(each[WARMUP:]) for each in (clock.steps, clock.optimizer))
        print(json.dumps({"step": steps, "optimizer": optimizer}), flush=True)


def run(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Start the processes of one run and return what they measured."""
    worker = ["--worker", name, "--size", args.size, "--steps", str(args.steps), "--batch", str(args.batch)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    found = subprocess.run(
        [*launch, __file__, *worker, "--length", str(args.length)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith('{"step"')]
    if found.returncode or not lines:
        raise SystemExit(f"the run {name!r} failed:\n{found.stderr[-3000:]}")
    return json.loads(lines[-1])


def measure(args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    names = [BASELINE, *args.recipes]
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        rounds.append({})
        for name in names:
            rounds[-1][name] = run(name, args)
            print(f"round {number + 1}, {name}: {rounds[-1][name]}", flush=True)
    tokens = args.batch * args.length * PROCESSES
    for name in names:
        ratio = statistics.median(each[name]["step"] / each[BASELINE]["step"] for each in rounds)
        step, optimizer = (statistics.median(each[name][key] for each in rounds) for key in ("step", "optimizer"))
        yield [name, f"{ratio:.3f}", f"{step * 1e3:.0f}", f"{tokens / step:.0f}", f"{optimizer * 1e3:.0f}"]


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the model and the batch."""
    hidden, intermediate, layers, heads, vocabulary = SIZES[args.size]
    sizes = {"hidden": hidden, "intermediate": intermediate, "layers": layers, "heads": heads}
    return Settings(steps=args.steps, batch=args.batch, length=args.length, vocabulary=vocabulary, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--steps", type=int, default=8, help=f"of a run; the first {WARMUP} do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences per process")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for training.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, settings_of(args))
        return
    load = os.getloadavg()[0]
    rows = list(measure(args))
    show(f"training, LLaMA {args.size}", HEAD, rows)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "training.md").write_text(f"""# Time of a training step

A LLaMA {args.size} on {PROCESSES} CPU processes of one thread each, float32, {args.batch} sequences of {args.length}
tokens per process: forward, backward and the optimizer's step. The baseline is Lightning's own FSDP2 strategy
(`ModelParallelStrategy`) with `torch.optim.AdamW(fused=True)`; all others run under `strategy="memopt_fsdp"`. Medians
over {args.rounds} rounds; the ratio compares runs of the same round. Tokens per second are those of both processes.

{markdown(HEAD, rows)}

{provenance()}
- load of the machine before the run: {load:.2f}
""")


if __name__ == "__main__":
    main()
