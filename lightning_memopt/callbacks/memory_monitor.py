"""OptimizerMemoryMonitor, a callback that measures and reports the memory of optimizer state during training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_memopt.callbacks.allocation_figure import add_figure, log_folder
from lightning_memopt.callbacks.console import say, warn_on_failed_write
from lightning_memopt.callbacks.memory_report import SCALARS, block_table, show_plan, summary, write_json
from lightning_memopt.figures.heat_map import figure_size
from lightning_memopt.figures.style import new_figure
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.memory.temporaries import StepMemory
from lightning_memopt.metrics import (
    MemorySavings,
    MomentumAllocation,
    OptimizerStateBytes,
    PeakMemory,
    momentum_allocation,
)
from lightning_memopt.metrics.base import SnapshotMetric
from lightning_memopt.optim.measuring import take_snapshot
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.tracing import trace_step

PROGRESS_BAR = "saved %"
FILE = "memory.json"
TRACED = 2  # first steps: in the first one, all subspaces are chosen; other optimizers have state in the second one
SECONDS = 60.0  # between two writes of the file, which grows with the history


class OptimizerMemoryMonitor(Callback):
    """Measures optimizer state and peak memory, with any strategy and any optimizer.

    It measures when state first exists (at the start of training, or after the first step), every `every_n_steps` of
    the trainer's steps, after a change of the plan, and at the end. All processes measure together. The first process
    reports: a table when state exists, one line when training ends, fails or is interrupted, scalars to the loggers,
    the saved percentage in the progress bar, and the file ``memory.json`` in the log directory (the root directory
    without a logger). It writes the file with the first measurement, at most once a minute, and when training ends or
    fails. If it cannot write the file, it warns.

    Scalars are logged at the trainer's ``global_step``, in bytes over all processes unless noted:

    - ``memopt/state_bytes`` and ``memopt/state_bytes_rank`` (the maximum of one rank), both with step counters,
    - ``memopt/state_bytes_global`` (one full copy of the state), ``memopt/momentum_bytes`` (without projections),
      ``memopt/projection_bytes``, ``memopt/second_moment_bytes``, ``memopt/other_bytes``,
    - ``memopt/saved``, ``memopt/saved_momentum``, ``memopt/saved_second_moment`` (fractions of AdamW's),
    - ``memopt/peak_bytes``, ``memopt/parameter_bytes``, ``memopt/gradient_bytes``, ``memopt/buffer_bytes``,
      ``memopt/unsharded_bytes``, ``memopt/scratch_bytes``, ``memopt/rest_bytes`` (the maximum of one rank so far,
      :class:`~lightning_memopt.metrics.PeakMemory`).

    Unsharded units and scratch are traced (:func:`~lightning_memopt.trace_step`) in the first two steps and in every
    step before a measurement, and in no other one.

    Args:
        every_n_steps: Number of the trainer's steps (over all optimizers) between two measurements.
        figures: Whether to draw, when training ends or fails, the bytes by role and kind (``memory.png``) and the
            momentum of all blocks over the steps (``momentum.png``), in the log directory and in loggers that accept
            figures.

    Attributes:
        history: One entry per measurement: ``step`` and the scalars without ``memopt/``.

    Raises:
        ValueError: If `every_n_steps` is not a positive integer.
        ImportError: If `figures` is set and matplotlib is missing.
    """

    def __init__(self, every_n_steps: int = 100, *, figures: bool = False) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be an integer of at least 1, got {every_n_steps!r}.")
        if figures and find_spec("matplotlib") is None:  # fail now, not after days of training
            raise ImportError("figures=True needs matplotlib: pip install matplotlib.")
        self.every_n_steps, self.figures = every_n_steps, figures
        self._loaded: Mapping[str, Any] = {}
        self._is_fitting = True
        self._begin()

    def _begin(self) -> None:
        self.history: list[dict[str, float]] = []
        self._state, self._savings = OptimizerStateBytes(), MemorySavings()
        # All processes have the same allocation, and only the first one draws it, so no synchronization is needed.
        self._peak, self._allocation = PeakMemory(), MomentumAllocation(sync_on_compute=False)
        self._found: dict[str, Tensor] = {}
        self._plan: dict[str, tuple[str, int]] = {}
        self._momenta: list[Any] = []
        self._run = ""
        self._shown, self._logged, self._measured, self._next = 0, False, -1, 0
        self._tracing, self._step, self._traced = ExitStack(), StepMemory(), 0
        self._folder: Path | None = None
        self._running = False
        self._content: dict[str, Any] = {}
        self._written = 0.0

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that no training has continued from. Lightning loads one after this, also to validate."""
        self._is_fitting = stage == "fit"
        if self._is_fitting:
            self._loaded = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume from a checkpoint."""
        self._begin()
        self.history = [dict(entry) for entry in self._loaded.get("history", [])]
        for metric in (self._state, self._savings, self._peak, self._allocation):
            metric.to(trainer.strategy.root_device)
        if self._loaded:
            self._allocation.load_state_dict(self._loaded["allocation"])
        self._loaded, self._next = {}, trainer.global_step
        self._traced = trainer.global_step + TRACED * max(1, len(trainer.optimizers))
        self._folder, self._running = log_folder(trainer), True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure before the first batch, after all callbacks have started."""
        if self._measured < 0:
            complete = all(optimizer.state for optimizer in trainer.optimizers)
            if trainer.strategy.reduce_boolean_decision(complete):
                self._measure(trainer, pl_module)
            else:
                self._measured, self._next = trainer.global_step, trainer.global_step + 1
        elif self.history and _momenta(trainer.optimizers) != self._momenta:  # a callback has changed the plan
            self._measure(trainer, pl_module)
        self._trace(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure gradients, which may be freed after the step."""
        if trainer.global_step + 1 >= self._next:
            self._peak.update(take_snapshot([], pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if a measurement is due."""
        self._tracing.close()
        if trainer.global_step >= self._next:
            self._measure(trainer, pl_module)
        if self._shown and not self._logged and not trainer.barebones:  # the progress bar keeps the last value
            saved = round(100 * self.history[-1]["saved"], 1) + 0.0  # no -0.0
            pl_module.log(PROGRESS_BAR, saved, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
            self._logged = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure for the last time, and print and draw the results."""
        self._tracing.close()
        # Callbacks that run after this one may have changed the plan.
        changed = momentum_allocation(take_snapshot(trainer.optimizers, pl_module)) != self._plan
        if trainer.strategy.reduce_boolean_decision(changed or trainer.global_step != self._measured, all=False):
            self._measure(trainer, pl_module)
        if not self.history:
            # Lightning uses a mock optimizer if the module returns none.
            given = (entry for entry in trainer.optimizers if not type(entry).__module__.startswith("lightning."))
            say(
                f"OptimizerMemoryMonitor: there was no optimizer state to measure ({_titles(given) or 'no optimizer'})."
            )
            return
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report the measurements so far, without the other ranks, which may wait for this one elsewhere."""
        self._tracing.close()
        if self._running and self.history:
            step = int(self.history[-1]["step"])
            say(f"OptimizerMemoryMonitor, stopped by {type(exception).__name__}; last measurement at step {step}:")
            self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements so far."""
        if self._loaded:  # training has not begun
            return dict(self._loaded)
        return {"history": self.history, "allocation": dict(self._allocation.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`."""
        if not self._is_fitting:
            return
        self._loaded = state_dict
        self.history = [dict(entry) for entry in state_dict["history"]]

    # ------------------------------------------------------------------ pictures

    def plot(self) -> Any:
        """Return a matplotlib figure of the bytes by role and kind."""
        return self._figure(self._state, self._found, (8, 5))

    def plot_allocation(self) -> Any:
        """Return a matplotlib figure of the momentum of all blocks over the steps."""
        size = figure_size(len(self._allocation.matrices))
        return self._figure(self._allocation, self._allocation.compute(), size)

    def _figure(self, metric: SnapshotMetric, value: Mapping[str, Tensor], size: tuple[float, float]) -> Any:
        figure = new_figure(*size)
        axes = figure.add_subplot()
        metric.plot(value, axes)
        axes.set_title(f"{axes.get_title()}\n{self._run}")
        return figure

    def _close(self, trainer: Trainer) -> None:
        """Print, write and draw what has been measured. No rank waits for another one."""
        self._running = False
        say(summary(self.history[-1], trainer.world_size))
        self._write()
        if self.figures and self._folder is not None:
            with warn_on_failed_write(self, self._folder):
                add_figure(trainer, self._folder, "memory", self.plot)
                if self._allocation.matrices:
                    add_figure(trainer, self._folder, "momentum", self.plot_allocation)

    # ------------------------------------------------------------------ measuring

    def _trace(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the next batch, if a measurement may be due after it."""
        self._tracing.close()  # of a batch that a callback or the module has skipped
        soon = trainer.global_step + len(trainer.optimizers)
        if self._measured >= 0 and (soon >= self._next or soon <= self._traced):
            self._tracing.enter_context(trace_step(trainer.optimizers, pl_module, into=self._step))

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, together with all other processes."""
        # Not all optimizers count their steps, and loggers use the trainer's steps.
        snapshot = take_snapshot(trainer.optimizers, pl_module, step=self._step)
        snapshot = replace(snapshot, step=trainer.global_step)
        self._measured, self._plan = trainer.global_step, momentum_allocation(snapshot)
        self._momenta = _momenta(trainer.optimizers)
        self._next = (self._measured // self.every_n_steps + 1) * self.every_n_steps
        self._peak.update(snapshot)
        if not trainer.strategy.reduce_boolean_decision(snapshot.has_state, all=False):
            return
        for metric in (self._state, self._savings, self._allocation):
            metric.update(snapshot)
        self._found = self._state.compute()
        found = {**self._found, **self._savings.compute(), **self._peak.compute()}
        scalars = {name: float(found[key]) for name, key in SCALARS.items()}
        entry = {"step": trainer.global_step, **scalars}
        while self.history and self.history[-1]["step"] >= entry["step"]:  # measured before a restart
            self.history.pop()
        self.history.append(entry)
        processes = f", {snapshot.world_size} processes" if snapshot.world_size > 1 else ""
        self._run = f"{_titles(trainer.optimizers)}, step {trainer.global_step}{processes}"
        if trainer.is_global_zero:
            self._report(trainer, snapshot)
        self._shown, self._logged = _complete(snapshot), False

    def _report(self, trainer: Trainer, snapshot: Snapshot) -> None:
        """Print, log and write the last measurement, on the first process."""
        scalars = {f"memopt/{name}": x for name, x in self.history[-1].items() if name != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        self._content = {
            "optimizers": list(map(_title, trainer.optimizers)),
            "world_size": snapshot.world_size,
            "bytes": {name: int(size) for name, size in self._found.items()},
            "history": self.history,
            "blocks": block_table(snapshot),
        }
        if _complete(snapshot) > self._shown:  # some optimizers create state at a parameter's first gradient
            many = f", held once ({snapshot.world_size} processes)" if snapshot.world_size > 1 else ""
            show_plan(snapshot, f"Optimizer state of {_titles(trainer.optimizers)}{many}")
        if time.monotonic() > self._written + SECONDS:
            self._write()

    def _write(self) -> None:
        if self._content and self._folder is not None:
            self._written = time.monotonic()
            with warn_on_failed_write(self, self._folder):
                write_json(self._folder / FILE, self._content)


def _complete(snapshot: Snapshot) -> int:
    """Return the number of blocks whose state is complete."""
    return sum(not block.pending for block in snapshot.blocks)


def _momenta(optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """Return the momentum kinds of all blocks of this package's optimizers."""
    ours = (optimizer for optimizer in optimizers if isinstance(optimizer, MemOpt))
    return [block.recipe.momentum for optimizer in ours for _, _, block in optimizer.blocks()]


def _titles(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    return ", ".join(map(_title, optimizers))


def _title(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer's class, with its recipe if it has one."""
    recipes = dict.fromkeys(group["recipe"] for group in optimizer.param_groups if "recipe" in group)
    return f"{type(optimizer).__name__} ({', '.join(recipes)})" if recipes else type(optimizer).__name__
