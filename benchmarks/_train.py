"""One training run of benchmarks/quality.py: a small language model in a plain loop on one core."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from _fidelity import Shadow
from _models import build_model
from _report import ROOT
from _variants import VARIANTS
from torch import Tensor, nn
from torch.nn import functional as F

Tokens = dict[str, Tensor]
Forward = Callable[..., Any]
TOKENS: Tokens = {}


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of one comparison share.

    ``max_chars`` bounds the text; more makes other tokens. ``clip`` 0 means no clipping. ``fidelity`` compares momentum
    with full Adam's. ``half`` keeps weights and gradients in bfloat16, and computes with them in float32, which a CPU
    does faster. ``release`` updates in the backward pass, and excludes clipping. ``distinct`` leaves out held-out files
    that repeat training files.
    """

    model: str = "llama"
    steps: int = 600
    batch: int = 4
    length: int = 128
    warmup: float = 0.08
    final_lr: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    hidden: int = 128
    intermediate: int = 344
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    every: int = 100
    validation_tokens: int = 65536
    curve_tokens: int = 8192
    data: str = "python standard library"
    max_chars: int = 4_000_000
    fidelity: bool = False
    half: bool = False
    release: bool = False
    distinct: bool = False


@dataclass(frozen=True)
class Run:
    """Key of one run."""

    variant: str
    lr: float
    seed: int
    ratio: float = 1.0


def load_tokens(settings: Settings, root: str | None) -> Tokens:
    """Return the examples' tokens as two long vectors, ``train`` and ``validation``."""
    if settings.data == "synthetic":
        return {"train": _synthetic(settings, 200_000, 0), "validation": _synthetic(settings, 70_000, 1)}
    sys.path.insert(0, str(ROOT))
    from examples.pretrain.data import TextDataModule
    from examples.pretrain.texts import Texts
    from examples.pretrain.tokens import encode

    options = {} if root is None else {"root": root}
    data = TextDataModule(vocab_size=settings.vocabulary, max_chars=settings.max_chars, **options)
    data.prepare_data()
    data.setup("fit")
    train, validation = data.tokens["train"][:].flatten(), data.tokens["val"][:].flatten()
    if not settings.distinct:
        assert data.tokenizer is not None
        held_out = Texts(data.root, data.pattern, data.val_fraction, data.max_chars).read("val")
        encoded = encode(data.tokenizer.backend_tokenizer, held_out, data.tokenizer.eos_token)
        validation = torch.tensor(list(chain.from_iterable(encoded)))
    return {"train": train, "validation": validation}


def _synthetic(settings: Settings, length: int, seed: int) -> Tensor:
    """Return a random walk over the vocabulary, which a model learns within seconds, to try the script."""
    moves = torch.randint(1, 8, (length,), generator=torch.Generator().manual_seed(seed))
    return moves.cumsum(0).remainder(settings.vocabulary)


def start_worker(path: str) -> None:
    """Prepare a worker process: one thread, and the tokens."""
    torch.set_num_threads(1)
    TOKENS.update(torch.load(path, weights_only=True))


def widened(model: nn.Module, input_ids: Tensor) -> Any:
    """Run a model with its weights in float32. Their gradients are rounded to the dtype of the weights."""
    weights = {name: param.float() for name, param in model.named_parameters()}
    return torch.func.functional_call(model, weights, (), {"input_ids": input_ids})


def loss_of(model: Forward, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def lr_factor(step: int, settings: Settings) -> float:
    """Return the linear warm-up and cosine decay of step 0, 1, ..."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validate(model: Forward, tokens: Tensor, settings: Settings, count: int) -> float:
    """Return the mean loss of the first ``count`` held-out tokens, in consecutive windows."""
    length = settings.length
    windows = min(count // length, (len(tokens) - 1) // length)
    ids = torch.stack([tokens[i * length : (i + 1) * length + 1] for i in range(windows)]).long()
    losses = [loss_of(model, chunk).item() * len(chunk) for chunk in ids.split(32)]
    return sum(losses) / windows


def batches(tokens: Tensor, seed: int, settings: Settings) -> Tensor:
    """Return the start of each window in every step, the same for every optimizer."""
    shape = (settings.steps, settings.batch)
    return torch.randint(len(tokens) - settings.length - 1, shape, generator=torch.Generator().manual_seed(seed))


def train(run: Run, settings: Settings) -> dict[str, Any]:
    """Train once and return the record for the results; the loss of a diverged run is None."""
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = build_model(settings)
    forward: Forward = model
    if settings.half:
        forward = partial(widened, model.bfloat16())
    optimizer = VARIANTS[run.variant].build(model, run.lr, settings.weight_decay, run.ratio)
    if settings.release:
        optimizer.release_gradients(model)  # type: ignore[attr-defined]
    shadow = Shadow(optimizer) if settings.fidelity else None
    tokens, window = TOKENS["train"], torch.arange(settings.length + 1)
    curve: list[tuple[int, float]] = []
    finite = True
    for step, starts in enumerate(batches(tokens, run.seed, settings)):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * lr_factor(step, settings)
        loss_of(forward, tokens[starts[:, None] + window].long()).backward()
        if settings.clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            finite = bool(torch.isfinite(norm))
            if not finite:
                break
        try:
            with shadow.watching(step, settings.steps) if shadow else nullcontext():
                optimizer.step()
        except FloatingPointError:  # of ours, before the weights become infinite
            finite = False
            break
        optimizer.zero_grad()
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            seen = (step + 1) * settings.batch * settings.length
            curve.append((seen, validate(forward, TOKENS["validation"], settings, settings.curve_tokens)))
    loss = validate(forward, TOKENS["validation"], settings, settings.validation_tokens) if finite else math.nan
    result = {"loss": loss if math.isfinite(loss) else None, "curve": curve, **_state(optimizer, model)}
    if shadow:
        result |= {"fidelity": shadow.found, "swings": shadow.swings}
    return {**asdict(run), **result, "seconds": round(time.perf_counter() - started, 1)}


def _state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, int]:
    if not hasattr(optimizer, "snapshot"):
        dense = sum(param.numel() * param.element_size() for param in model.parameters())
        return {"momentum_bytes": dense, "state_bytes": 2 * dense, "adamw_bytes": 2 * dense}
    facts = optimizer.snapshot()
    return {key: getattr(facts, key) for key in ("momentum_bytes", "state_bytes", "adamw_bytes")}
