"""AdaptiveMomentum, a callback that adapts the momentum of each block during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_memopt._registry import unknown
from lightning_memopt.callbacks import adaptive_report as report
from lightning_memopt.callbacks.allocation import adaptable, compressed_kind
from lightning_memopt.callbacks.allocation_figure import add_figure, allocation_figure, log_folder
from lightning_memopt.callbacks.allocator import Allocator, lines
from lightning_memopt.callbacks.budget import parse_budget
from lightning_memopt.callbacks.console import say, warn_on_failed_write
from lightning_memopt.callbacks.policies import POLICIES, Policy
from lightning_memopt.callbacks.policies.base import decides_once
from lightning_memopt.callbacks.timing import Timing, check_freeze, length_of
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.optim.release import DROPPED
from lightning_memopt.optim.signals import BlockSignals, Probe
from lightning_memopt.sharding.consensus import decided_alike


class AdaptiveMomentum(Callback):
    """Changes the momentum of each block during training, within a budget over all blocks.

    Before the first step, the budget is divided evenly. Every `every_n_steps` optimizer steps, the policy reads
    statistics of the gradients (:class:`~lightning_memopt.optim.signals.BlockSignals`) and may change a few blocks,
    until the allocation freezes. Works with every strategy and with every recipe that has momentum.

    With `log`, the loggers get three scalars of every block at every decision, at the trainer's ``global_step``:

    - ``memopt/rank/<block>``: Rank of its momentum: 0 for none; for dense momentum, the smallest rank whose factors
      would take as many bytes.
    - ``memopt/oscillation/<block>``: Cosine between its gradient and the average of those before it, from -1 to 1:
      negative if gradients swing back and forth, positive if they drift.
    - ``memopt/residual/<block>``: Share of its momentum's energy that its rank does not hold, from 0 to 1.

    With an `optimizer_idx` of 1, their names start with ``memopt/rank_1/`` and so on.

    Args:
        budget: Bytes of momentum over all ranks, projections included: a fraction of AdamW's momentum, a number of
            bytes, or text such as ``"512MiB"`` or ``"5%"``. None selects the smallest allocation that keeps `quality`.
        policy: ``uniform``, ``energy``, ``benefit``, ``fidelity``, ``schedule``, ``paper``, ``roles``, or a
            function (:data:`~lightning_memopt.callbacks.policies.base.Policy`).
        every_n_steps: Number of steps between two decisions.
        start: Step after which the first decision is made; None means `every_n_steps`.
        freeze_after: When the allocation freezes: a fraction of the training in (0, 1], or a number of steps from 2 on;
            None means never. The integer 1 could mean both, and is refused.
        quality: The share of momentum's energy to keep; with ``fidelity``, the cosine that the update of every block
            must reach. Only used without a budget.
        min_rank: The smallest rank of a block that has momentum.
        max_moves: Maximum number of blocks that change in one decision.
        dropped: How to treat momentum that does not fit into a smaller rank: ``release`` or ``discard``, as in
            :meth:`~lightning_memopt.MemOpt.reformat`.
        optimizer_idx: Index of the optimizer to adapt. Required if several of the module's optimizers can be adapted.
        log: Whether to log ``memopt/rank/<block>`` and the two other scalars of every block at every decision.
        figures: Whether to draw the allocation over time when training ends or is interrupted, to ``allocation.png``
            (with an `optimizer_idx` of 1, ``allocation_1.png``) in the log directory and to loggers that accept
            figures.

    Attributes:
        history: One entry per decision: ``step``, ``moves`` (block → ranks before and after), ``ranks`` (of all
            blocks), ``dense`` (names of the blocks with dense momentum), ``momentum_bytes``, ``oscillation`` and
            ``residual`` (of all blocks). Rank 0 means no momentum.

    Raises:
        ValueError: If an argument is invalid; the message says which values are valid. At the start of fit, if no
            optimizer can be adapted or the budget is too small.
    """

    def __init__(
        self,
        budget: int | float | str | None = 0.05,
        policy: str | Policy = "uniform",
        *,
        every_n_steps: int = 100,
        start: int | None = None,
        freeze_after: int | float | None = 0.3,
        quality: float = 0.5,
        min_rank: int = 1,
        max_moves: int = 8,
        dropped: str = "release",
        optimizer_idx: int | None = None,
        log: bool = False,
        figures: bool = False,
    ) -> None:
        parse_budget(budget, 1 << 40)
        start = every_n_steps if start is None else start
        whole = {"every_n_steps": every_n_steps, "start": start, "min_rank": min_rank, "max_moves": max_moves}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if isinstance(quality, bool) or not isinstance(quality, int | float) or not 0 < quality <= 1:
            raise ValueError(f"`quality` must be a share of momentum's energy in (0, 1], got {quality!r}.")
        if optimizer_idx is not None and (type(optimizer_idx) is not int or optimizer_idx < 0):
            raise ValueError(f"`optimizer_idx` must be an index from 0 on, or None, got {optimizer_idx!r}.")
        check_freeze(freeze_after)
        if dropped not in DROPPED:
            raise ValueError(unknown("value of `dropped`", dropped, list(DROPPED)))
        if figures and find_spec("matplotlib") is None:  # fail now, not after days of training
            raise ImportError("figures=True needs matplotlib: pip install matplotlib.")
        if not (isinstance(policy, str) or callable(policy)):
            raise TypeError(f"`policy` must be a function or one of {', '.join(POLICIES.names())}, got {policy!r}.")
        self.policy: Policy = POLICIES.get(policy) if isinstance(policy, str) else policy
        self.budget, self.every_n_steps, self.start, self.freeze_after = budget, every_n_steps, start, freeze_after
        self.quality, self.min_rank, self.max_moves, self.dropped = quality, min_rank, max_moves, dropped
        self.optimizer_idx, self.log, self.figures = optimizer_idx, log, figures
        self.history: list[dict[str, Any]] = []
        self._loaded: Mapping[str, Any] | None = None
        self._is_fitting = True
        self._allocator: Any = None
        self._probe: Any = None
        self._names: set[str] = set()
        self._timing: Any = None
        self._seen, self._frozen, self._running = 0, False, False
        self._folder: Path | None = None

    # ------------------------------------------------------------------ what a subclass may override

    def propose(self, snapshot: Snapshot, signals: Mapping[str, BlockSignals]) -> Mapping[str, Any]:
        """Return changes of the plan for :meth:`MemOpt.reformat`. Every rank must return the same changes.

        Args:
            snapshot: The blocks and their state.
            signals: Statistics of the gradients, by block name.
        """
        return self._allocator.moves(signals, self.history, self._until_frozen())

    # ------------------------------------------------------------------ Lightning's hooks

    @property
    def state_key(self) -> str:
        """Key of the saved state, one per optimizer."""
        return self._generate_state_key(optimizer_idx=self.optimizer_idx)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that no training has continued from. Lightning loads one after this, also to validate."""
        self._is_fitting = stage == "fit"
        if self._is_fitting:
            self._loaded = self._probe = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer.

        Raises:
            ValueError: If no optimizer can be adapted, or several can, or another callback adapts it.
        """
        optimizer = adaptable(trainer.optimizers, self.optimizer_idx)
        others = [each for each in trainer.callbacks if isinstance(each, AdaptiveMomentum) and each is not self]  # type: ignore[attr-defined]
        if any(adaptable(trainer.optimizers, each.optimizer_idx) is optimizer for each in others):
            raise ValueError(
                "Two AdaptiveMomentum callbacks adapt the same optimizer: remove one, or give each another "
                "`optimizer_idx`."
            )
        self._allocator = Allocator(
            optimizer,
            compressed_kind(optimizer),
            policy=self.policy,
            budget=self.budget,
            quality=self.quality,
            min_rank=self.min_rank,
            max_moves=self.max_moves,
            dropped=self.dropped,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume from a checkpoint, or divide the budget.

        Raises:
            ValueError: If the budget is too small, or the policy needs the length of training and it is unknown.
        """
        self._trainer, self._probe = trainer, Probe(self._allocator.optimizer)
        self._frozen, self._seen = False, 0
        steps = 0 if self._loaded is None else self._loaded["probe"]["steps"]
        before = trainer.global_step // len(trainer.optimizers) - steps
        timing = self.every_n_steps, self.start, self.freeze_after, length_of(trainer), len(trainer.optimizers), before
        self._timing, self._folder = Timing(*timing), log_folder(trainer)
        if isinstance(self.freeze_after, float) and not self._timing.is_known:
            rank_zero_warn(
                f"`freeze_after` {self.freeze_after:g} is a fraction of the training, but its length is unknown: the "
                "allocation never freezes. Set max_steps or max_epochs, or give a number of steps."
            )
        if self._loaded is None:
            self.history, self._names = [], set()
            blocks = len(self._allocator.trained())
            say(f"{report.aim(self.policy, self._allocator.budget_bytes(), self.quality, blocks)}; {self._later()}.")
            self._allocate()
            self._running = True
            return
        saved, self._loaded = self._loaded, None
        self._probe.load_state_dict(saved["probe"])
        self._seen = saved.get("seen", self._probe.steps)
        self._names = {name for entry in self.history for name in entry["ranks"]}
        self._frozen = self._is_over()
        if self._frozen:
            self._probe.rest()
        divides = not self._is_same_aim(saved) or self._allocator.exceeds_budget()
        rest = "frozen" if self._frozen else f"policy {report.policy_name(self.policy)} {self._later()}"
        rest += "; the budget is divided again" * divides
        say(f"AdaptiveMomentum resumes after step {self._probe.steps} with {self._allocator.size()}; {rest}.")
        if divides:
            self._allocate()
        self._running = True
        self._catch_up()  # a callback before this one may have saved when a decision was due

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Divide the budget again if parameters start training later, just before they get momentum."""
        self._make_room()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Change the allocation if a decision is due."""
        self._catch_up()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a summary, and draw the allocation if ``figures`` is set."""
        self._close(trainer, "ends")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print and draw as at the end, without the other ranks, which may wait for this one elsewhere."""
        if self._running:
            self._close(trainer, f"stops at step {self._probe.steps} ({type(exception).__name__})")
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from the optimizer, which may outlive the training."""
        if self._probe is not None:
            self._probe.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return history and signals as numbers and tensors, equal on every rank. All ranks must call this method."""
        if self._probe is None or self._loaded is not None:  # training has not started
            return dict(self._loaded or {})
        # Before this callback's turn at the end of a batch, the last steps have not been seen yet.
        budget = float(self.budget) if isinstance(self.budget, float) else self.budget  # NumPy's cannot be loaded
        aim = {"budget": budget, "quality": float(self.quality), "policy": report.policy_name(self.policy)}
        return {"history": list(self.history), "seen": self._seen, **aim, "probe": self._probe.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`. The allocation itself is part of the optimizer's state."""
        if not self._is_fitting:
            return
        self._loaded = state_dict or None
        # Earlier versions did not record what was dense.
        self.history = [{"dense": [], **entry} for entry in state_dict.get("history", [])]

    # ------------------------------------------------------------------ pictures

    def plot(self, value: str = "rank") -> Any:
        """Return a matplotlib figure of ``rank``, ``oscillation`` or ``residual`` of all blocks over the steps."""
        run = f"AdaptiveMomentum, policy {report.policy_name(self.policy)}"
        if self._probe is None:
            return allocation_figure(self.history, value, run=run)
        return allocation_figure(self.history, value, until=self._probe.steps, run=f"{run}; {self._allocator.size()}")

    def _close(self, trainer: Trainer, how: str) -> None:
        """Print a summary and draw the allocation. No rank waits for another one."""
        self._running = False
        self._probe.stop()
        was_due = not self._frozen and self._timing.decisions(self._seen) > 0
        missed = "" if self._decides_once() or was_due else report.too_early(self.start, self._frozen)
        say(f"AdaptiveMomentum {how} with {self._allocator.size()}: {report.closing(self.history, missed)}.")
        if self.figures and self.history and self._folder is not None:
            with warn_on_failed_write(self, self._folder):
                add_figure(trainer, self._folder, f"allocation{self._suffix()}", self.plot)

    # ------------------------------------------------------------------ deciding

    def _is_same_aim(self, saved: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint was written with this budget, or without one and with this quality.

        A policy that changes nothing later must have divided the budget itself.
        """
        # Earlier versions did not save them.
        if not self._allocator.is_budget(saved.get("budget", self.budget)):
            return False
        policy = report.policy_name(self.policy)
        if self._decides_once() and saved.get("policy", policy) != policy:
            return False
        return self.budget is not None or saved.get("quality", self.quality) == self.quality

    def _until_frozen(self) -> float | None:
        return self._timing.until_frozen(self._probe.steps, self._trainer.global_step)

    def _is_over(self) -> bool:
        return self._timing.is_over(self._probe.steps, self._trainer.global_step)

    def _catch_up(self) -> None:
        """Decide what the steps so far ask for."""
        self._make_room()  # steps without Lightning's optimizer wrapper call no hook
        before, self._seen = self._timing.decisions(self._seen), self._probe.steps
        if self._frozen:
            return
        if self._is_over():
            self._freeze()
        elif self._timing.decisions(self._seen) > before:
            signals = self._probe.read()
            self._change(lambda: self.propose(self._allocator.optimizer.snapshot(), signals), signals)

    def _make_room(self) -> None:
        """Divide the budget again if parameters have started training."""
        if not self._allocator.trained() <= self._names:
            self._allocate()

    def _allocate(self) -> None:
        """Change all blocks to the policy's target at once."""
        self._names |= self._allocator.trained()
        signals = self._probe.read()
        self._change(lambda: self._allocator.division(signals, self._until_frozen()), signals)

    def _change(self, decide: Callable[[], Mapping[str, Any]], signals: Mapping[str, BlockSignals]) -> None:
        """Decide on all ranks, carry the decision out, and report it."""
        self.history.append(self._allocator.carry_out(self._agreed(decide), signals, self._probe.steps))
        self._report(self.history[-1])

    def _agreed(self, decide: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the changes after checking that all processes have decided the same, even without sharding."""
        several = self._trainer.world_size > 1 and dist.is_available() and dist.is_initialized()
        return decided_alike(
            "AdaptiveMomentum's changes",
            decide,
            lines,
            [dist.group.WORLD] if several else [],
            self._trainer.strategy.root_device,
        )

    def _freeze(self) -> None:
        self._frozen = True
        self._probe.rest()
        say(f"AdaptiveMomentum: frozen after step {self._probe.steps} with {self._allocator.size()}.")

    # ------------------------------------------------------------------ words

    def _decider(self) -> Policy | None:
        """Return the policy, or None if a subclass decides."""
        return self.policy if type(self).propose is AdaptiveMomentum.propose else None

    def _decides_once(self) -> bool:
        return decides_once(self._decider(), self._allocator.budget_bytes())

    def _later(self) -> str:
        """Return what this callback does after the start, in words."""
        if self._is_over():
            return "changes nothing later: training is past `freeze_after`"
        end, freezes = self._timing.end
        timing: dict[str, Any] = {"every": self.every_n_steps, "start": self.start, "end": end, "freezes": freezes}
        return report.later(self._decider(), self._allocator.budget_bytes(), **timing, max_moves=self.max_moves)

    def _suffix(self) -> str:
        """Return what tells apart the figures and scalars of several callbacks, one per optimizer."""
        return "" if self.optimizer_idx is None else f"_{self.optimizer_idx}"

    def _report(self, entry: Mapping[str, Any]) -> None:
        size = self._allocator.size()
        if len(self.history) == 1:
            say(f"AdaptiveMomentum starts with {size}, in {len(self._names)} blocks.")
        elif entry["moves"]:
            say(f"AdaptiveMomentum, step {entry['step']}, new ranks: {report.changes(self.history)}; {size}.")
        if self.log:
            values = {"rank": entry["ranks"], "oscillation": entry["oscillation"], "residual": entry["residual"]}
            scalars = {
                f"memopt/{key}{self._suffix()}/{name}": float(x)
                for key, table in values.items()
                for name, x in table.items()
            }
            for logger in self._trainer.loggers:
                logger.log_metrics(scalars, step=self._trainer.global_step)
