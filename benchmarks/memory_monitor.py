"""Time OptimizerMemoryMonitor within a training step.

    python benchmarks/memory_monitor.py                              # about 3 minutes
    python benchmarks/memory_monitor.py --steps 30 --output /tmp

A LLaMA with a million parameters trains on random tokens, on one process and sharded over two. Timers inside the
callback's hooks measure their time, including the wait for the other process.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _report import OUTPUT, markdown, provenance, show
from _train import Settings, build_model, loss_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader

import lightning_memopt as lm

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch.optim.AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
    "adapm_lean": lambda module: lm.AdaPMLean(module.named_parameters(), lr=1e-3),
}
WARM_UP = 5
HEAD = ["optimizer", "processes", "step (ms)", "a measurement (ms)", "other steps (ms)", "share at every 100 steps"]


class Module(LightningModule):
    """A small LLaMA."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.model, self.optimizer = build_model(Settings()), optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return OPTIMIZERS[self.optimizer](self)


class Clock(Callback):
    """Record when batches start, before any other callback."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the time."""
        self.starts.append(time.perf_counter())


def run(optimizer: str, processes: int, steps: int, every: int) -> dict[str, float]:
    """Train, and return medians in ms: a step without the callback, the callback in a measuring step and in others."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spent = [0.0]
    monitor, clock = lm.OptimizerMemoryMonitor(every_n_steps=every), Clock()
    for hook in HOOKS:
        setattr(monitor, hook, _timed(getattr(monitor, hook), spent))
    per_step: list[float] = []

    class Ledger(Callback):
        """Record the hooks' time of each step."""

        def on_train_batch_end(self, *args: Any) -> None:
            per_step.append(spent[0])
            spent[0] = 0.0

    settings = Settings()
    tokens = torch.randint(settings.vocabulary, (steps * processes * settings.batch, settings.length))
    data = DataLoader(tokens, batch_size=settings.batch)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="memopt_fsdp" if processes > 1 else "auto",
            max_steps=steps,
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[clock, monitor, Ledger()],
        ).fit(Module(optimizer), data)
    whole = [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)]
    measured = {step for step in range(len(per_step)) if (step + 1) % every == 0}
    quiet = [step for step in range(WARM_UP, len(whole)) if step not in measured]
    return {
        "step": 1e3 * statistics.median(whole[step] - per_step[step] for step in quiet),
        "measurement": 1e3 * statistics.median(per_step[step] for step in measured),
        "else": 1e3 * statistics.median(per_step[step] for step in quiet),
    }


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - started

    return wrapper


def _rank(rank: int, environment: Mapping[str, str], queue: Any, arguments: tuple[Any, ...]) -> None:
    """Run as one of several processes."""
    os.environ.update(environment, LOCAL_RANK=str(rank), NODE_RANK="0")
    found = run(*arguments)
    if rank == 0:
        queue.put(found)


def measure(optimizer: str, processes: int, steps: int, every: int) -> dict[str, float]:
    """Run in new processes and return the first one's result."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    context = get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, environment, queue, (optimizer, processes, steps, every)))
        for rank in range(processes)
    ]
    for each in ranks:
        each.start()
    found = queue.get(timeout=600)
    for each in ranks:
        each.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write the page")
    args = parser.parse_args()
    rows = []
    for optimizer in OPTIMIZERS:
        for processes in (1, 2):
            found = measure(optimizer, processes, args.steps, args.every)
            share = (found["measurement"] / 100 + found["else"]) / found["step"]
            numbers = (f"{found[name]:.2f}" for name in ("step", "measurement", "else"))
            rows.append([f"`{optimizer}`", f"{processes}", *numbers, f"{share:.2%}"])
    show("What OptimizerMemoryMonitor takes", HEAD, rows)
    text = f"""# What OptimizerMemoryMonitor takes of a step

A LLaMA of 1.05 million parameters, 4 x 128 tokens a step and process, {args.steps} steps, on one process and sharded
over two by `memopt_fsdp`. Medians; a measurement every {args.every} steps. "a measurement" is all that the callback
does in such a step: reading the memory, the metrics with their collectives, writing to TensorBoard. "other steps" is
its work in all other steps. The share of a step is for the default of one measurement every 100 steps.

{markdown(HEAD, rows)}

{provenance(threads=1)}
"""
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "memory_monitor.md").write_text(text)


if __name__ == "__main__":
    main()
