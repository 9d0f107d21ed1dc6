"""One run of benchmarks/pretrain_gpu.py. It can stop at any evaluation, and continue in another process."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _models import build_model
from _pretrain_text import save
from _train import Run, Settings, Tokens, batches, loss_of, lr_factor, validate
from _variants import VARIANTS
from torch import Tensor, nn

Result = dict[str, Any]
FIRST = 3  # steps of a process that are not timed: they allocate, compile and check kernels
SAVE_EVERY = 30.0  # seconds


class Session:
    """What all runs of one call share: the model, which starts each run from the same weights, and the tokens.

    Args:
        settings: Of any of the runs.
        tokens: ``train`` and ``validation``. They stay on the host, so that they do not count as the GPU's memory.
        folder: Where unfinished runs are kept.
        until: When to stop, on the clock of ``time.monotonic``.
        micro: Sequences of a backward pass; None for the whole batch.
        compiled: Whether to compile forward and backward passes.
        save_every: Seconds between two checkpoints.
    """

    def __init__(
        self,
        settings: Settings,
        tokens: Tokens,
        folder: Path,
        *,
        until: float,
        micro: int | None = None,
        compiled: bool = False,
        save_every: float = SAVE_EVERY,
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mixed = self.device == "cuda"  # few CPUs compute in bfloat16
        torch.manual_seed(0)
        self.model = build_model(settings)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.to(self.device)
        self.loss_of: Callable[[nn.Module, Tensor], Tensor] = torch.compile(loss_of) if compiled else loss_of
        self.tokens, self.folder, self.until = tokens, folder, until
        self.micro, self.save_every = micro, save_every

    def precision(self) -> torch.autocast:
        """Return the context of forward passes."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.mixed)

    def wait(self) -> float:
        """Wait for the device, and return the time."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def evaluate(self, settings: Settings, count: int) -> float:
        """Return the mean loss of the first ``count`` held-out tokens."""
        with self.precision():
            return validate(self.model, self.tokens["validation"][: count + 1].to(self.device), settings, count)


@dataclass
class Progress:
    """What a run has done so far. Seconds and tokens that are timed exclude evaluations and the first steps."""

    step: int = 0
    curve: list[list[float]] = field(default_factory=list)
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    def finite(self) -> bool:
        """Return whether the last evaluation found a number."""
        return not self.curve or math.isfinite(self.curve[-1][1])


def checkpoint_of(run: Run, settings: Settings, folder: Path) -> Path:
    """Return where an unfinished run is kept, which depends on all that defines it."""
    key = json.dumps([asdict(run), asdict(settings), VARIANTS[run.variant].definition()], sort_keys=True)
    return folder / f"unfinished-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"


def train(run: Run, settings: Settings, session: Session) -> Result | None:
    """Train, from the last checkpoint if there is one. Return the record, or None if the time is over."""
    gc.collect()
    session.model.load_state_dict(session.start)
    session.model.zero_grad()
    optimizer = VARIANTS[run.variant].build(session.model, run.lr, settings.weight_decay)
    path, progress = checkpoint_of(run, settings, session.folder), Progress()
    if path.exists():
        stored = torch.load(path, map_location=session.device, weights_only=True)
        session.model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        progress = Progress(**stored["progress"])
    started = saved = session.wait()
    before = progress.seconds
    if session.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = progress.step
    while progress.step < settings.steps and progress.finite():
        _advance(run, settings, session, optimizer, progress, first)
        now = session.wait()
        progress.seconds = before + now - started
        if session.device == "cuda":
            progress.peak_bytes = max(progress.peak_bytes, torch.cuda.max_memory_allocated())
        over = time.monotonic() > session.until
        if over or now - saved >= session.save_every:
            for group in optimizer.param_groups:
                group["lr"] = run.lr  # what the run that goes on is built with
            content = {"model": session.model.state_dict(), "optimizer": optimizer.state_dict()}
            save({**content, "progress": asdict(progress)}, path)
            saved = now
        if over and progress.step < settings.steps:
            return None
    loss = session.evaluate(settings, settings.validation_tokens) if progress.finite() else math.nan
    return {
        **asdict(run),
        "loss": loss if math.isfinite(loss) else None,
        "curve": [[seen, value] for seen, value in progress.curve if math.isfinite(value)],
        "precision": "bf16-mixed" if session.mixed else "float32",
        "state_bytes": state_bytes(optimizer),
        "tokens_per_second": progress.timed_tokens / progress.timed_seconds if progress.timed_tokens else None,
        "peak_bytes": progress.peak_bytes or None,
        "seconds": round(progress.seconds, 1),
    }


def _advance(
    run: Run,
    settings: Settings,
    session: Session,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    first: int,
) -> None:
    """Take the steps up to the next evaluation, and evaluate."""
    tokens, window = session.tokens["train"], torch.arange(settings.length + 1)
    end = min(settings.steps, (progress.step // settings.every + 1) * settings.every)
    per_step = settings.batch * settings.length
    since: tuple[int, float] | None = None
    starts = batches(tokens, run.seed, settings)
    loss = math.inf
    for step in range(progress.step, end):
        if since is None and step >= first + FIRST:
            since = step, session.wait()
        for group in optimizer.param_groups:
            group["lr"] = run.lr * lr_factor(step, settings)
        ids = tokens[starts[step][:, None] + window].to(session.device, torch.long)
        for part in ids.split(session.micro or len(ids)):
            with session.precision():
                mean = session.loss_of(session.model, part) * (len(part) / len(ids))
            mean.backward()
        nn.utils.clip_grad_norm_(session.model.parameters(), settings.clip)
        try:
            optimizer.step()
        except FloatingPointError:  # of ours; torch's goes on with weights that are not finite
            break
        optimizer.zero_grad()
    else:
        if since is not None:
            progress.timed_tokens += (end - since[0]) * per_step
            progress.timed_seconds += session.wait() - since[1]
        loss = session.evaluate(settings, settings.curve_tokens)
    progress.step = end
    progress.curve.append([end * per_step, loss])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the state, without the counters of steps."""
    entries: list[Mapping[str, Tensor]] = list(optimizer.state.values())
    return sum(value.nbytes for entry in entries for key, value in entry.items() if key != "step")
