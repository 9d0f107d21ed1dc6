"""Training that drives U / D up: inputs that are mostly zero, a spike, a long silence, elements of all magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from _train import Settings, batches, build_model, loss_of, lr_factor
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_memopt as lm

# The recipes with blocks whose denominator does not bound the direction.
RECIPES = ("adapm", "adapm_mini", "adapm_lean", "adam_sn", "adam_snsm", "adam_mini", "adafactor")
CONTROL = "AdamW"


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        moved: The largest distance that one step moved one weight, in units of the learning rate; None if not measured.
        loss: Loss at the end, or the largest loss if training ended in an error; None without a loss.
        error: The error that ended the run.
    """

    moved: float | None
    loss: float | None = None
    error: str = ""


class Moves:
    """Take steps and record the largest distance of one weight, in units of the learning rate."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Watch all parameters of the model."""
        self.params, self.optimizer, self.largest = list(model.parameters()), optimizer, 0.0

    @torch.no_grad()
    def step(self, *, note: bool = True) -> None:
        """Take a step."""
        before = [param.clone() for param in self.params] if note else []
        self.optimizer.step()
        for param, old in zip(self.params, before, strict=bool(before)):
            moved = (param.double() - old.double()).abs().max().item() / self.optimizer.param_groups[0]["lr"]
            self.largest = max(self.largest, moved if math.isfinite(moved) else math.inf)


def optimizer_of(
    model: nn.Module, recipe: str, bound: float | None, lr: float, **options: Any
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer with this bound, or torch's AdamW; betas (0.9, 0.95)."""
    if recipe == CONTROL:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return lm.MemOpt(model.named_parameters(), recipe, lr, (0.9, 0.95), max_update=bound, **options)


def sparse_inputs(recipe: str, bound: float | None, seed: int, steps: int = 200) -> Outcome:
    """Train a ReLU net on inputs that are mostly zero; inner layers get the recipe's kinds for an MLP."""
    torch.manual_seed(seed)
    layers = [nn.Linear(256, 128), nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 10)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
    options: dict[str, Any] = {}
    if recipe != CONTROL:
        options["overrides"] = {f"{name}.weight": lm.load_plan(recipe).roles["mlp"] for name in ("2", "4")}
    optimizer = optimizer_of(model, recipe, bound, 1e-3, **options)
    moves, losses = Moves(model, optimizer), []
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(512, 256, generator=generator) * (torch.rand(512, 256, generator=generator) < 0.1)
    labels = torch.randint(10, (512,), generator=generator)
    for step in range(steps):
        chosen = torch.randint(512, (64,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
        loss.backward()
        try:
            moves.step()
        except FloatingPointError:
            return Outcome(moves.largest, max(losses), f"gradients overflow in step {step + 1}")
    return Outcome(moves.largest, sum(losses[-50:]) / 50)


def spike(recipe: str, bound: float | None, seed: int, tokens: Tensor, steps: int = 100, at: int = 40) -> Outcome:
    """Train a small LLaMA with one gradient that is a million times too large."""
    settings = Settings(steps=steps, length=64, hidden=64, intermediate=172, layers=2)
    torch.manual_seed(seed)
    model = build_model(settings)
    optimizer = optimizer_of(model, recipe, bound, 2e-3)
    moves, losses, window = Moves(model, optimizer), [], torch.arange(settings.length + 1)
    for step, starts in enumerate(batches(tokens, seed, settings)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * lr_factor(step, settings)
        optimizer.zero_grad()
        loss = loss_of(model, tokens[starts[:, None] + window].long())
        losses.append(loss.item())
        loss.backward()
        if step == at:
            for param in model.parameters():
                param.grad *= 1e6  # type: ignore[operator]
        try:
            moves.step(note=step >= at)
        except FloatingPointError:
            return Outcome(moves.largest, max(losses), f"gradients overflow in step {step + 1}")
    return Outcome(moves.largest, sum(losses[-20:]) / 20)


def silence(recipe: str, bound: float | None, seed: int, steps: int = 3000) -> Outcome:
    """Give one matrix gradients of noise, then zeros for thousands of steps, then noise again."""
    model, draw = _matrix(torch.float32), torch.Generator().manual_seed(seed)
    optimizer = optimizer_of(model, recipe, bound, 1e-3)
    moves = Moves(model, optimizer)
    for step in range(steps + 40):
        scale = 0.0 if 20 <= step < steps + 20 else 1.0
        for param in model.parameters():
            param.grad = scale * torch.randn(param.shape, generator=draw) if scale else torch.zeros_like(param)
        moves.step(note=step >= steps + 20)
    return Outcome(moves.largest)


def magnitudes(recipe: str, bound: float | None, seed: int, steps: int = 60) -> Outcome:
    """Give a float16 matrix gradients with elements between 1e-12 and 1e4, each with its own size."""
    model, draw = _matrix(torch.float16), torch.Generator().manual_seed(seed)
    optimizer = optimizer_of(model, recipe, bound, 1e-3)
    moves = Moves(model, optimizer)
    sizes = [10.0 ** (torch.rand(param.shape, generator=draw) * 16 - 12) for param in model.parameters()]
    for _ in range(steps):
        for param, size in zip(model.parameters(), sizes, strict=True):
            param.grad = (torch.randn(param.shape, generator=draw) * size).to(param.dtype)
        try:
            moves.step()
        except FloatingPointError:
            return Outcome(moves.largest, error="`FloatingPointError`")
        if not all(bool(param.isfinite().all()) for param in model.parameters()):
            return Outcome(moves.largest, error="infinite weights")
    return Outcome(moves.largest)


def _matrix(dtype: torch.dtype) -> nn.Module:
    """Return a model whose only matrix belongs to an MLP."""
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.up_proj = nn.Linear(64, 96, bias=False)
    return model.to(dtype)
