"""The models of benchmarks/adaptive.py, with their data and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _adaptive_images import CLASSES, SIDE, images
from _models import gpt2, llama
from _train import Settings, Tokens, batches, loss_of
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = 16  # per step
PATCH = 4
Batches = Sequence[Tensor] | Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """One model of the comparison.

    Attributes:
        title: Name on the page.
        task: Description of the task and its data.
        build: Returns the model, with weights drawn from torch's global generator.
        training: Takes tokens, settings and a seed, and returns the batches of all steps.
        held_out: Takes tokens and settings, and returns the validation batches.
        loss: Returns the mean loss of a batch. All batches of a list have the same size.
        lrs: Learning rates to try; the best is not at an edge.
    """

    title: str
    task: str
    build: Callable[[Settings], nn.Module]
    training: Callable[[Tokens, Settings, int], Batches]
    held_out: Callable[[Tokens, Settings], Batches]
    loss: Callable[..., Tensor]
    lrs: tuple[float, ...]


def vit(settings: Settings) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def text_batches(tokens: Tokens, settings: Settings, seed: int) -> Batches:
    starts = batches(tokens["train"], seed, settings)
    return list(tokens["train"][starts[..., None] + torch.arange(settings.length + 1)].long())


def held_out_text(tokens: Tokens, settings: Settings) -> Batches:
    """Return consecutive windows."""
    text, length = tokens["validation"].long(), settings.length
    windows = min(settings.validation_tokens // length, (len(text) - 1) // length) // 32 * 32
    return text[: windows * length + 1].unfold(0, length + 1, length).split(32)


def image_batches(tokens: Tokens, settings: Settings, seed: int) -> Batches:
    pixels, labels = images(settings.steps * IMAGES, seed)
    return list(zip(pixels.split(IMAGES), labels.split(IMAGES), strict=True))


def held_out_images(tokens: Tokens, settings: Settings) -> Batches:
    """Return one image per 32 tokens of text."""
    pixels, labels = images(settings.validation_tokens // 32, seed=-1)
    return list(zip(pixels.split(64), labels.split(64), strict=True))


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, labels = batch
    return F.cross_entropy(model(pixel_values=pixels).logits, labels)


_TEXT: dict[str, Any] = {
    "training": text_batches,
    "held_out": held_out_text,
    "loss": loss_of,
    "lrs": (1e-3, 2e-3, 4e-3),
}
_IMAGES: dict[str, Any] = {
    "training": image_batches,
    "held_out": held_out_images,
    "loss": image_loss,
    "lrs": (5e-4, 1e-3, 2e-3),
}
FAMILIES = {
    "llama": Family("LLaMA", "untied head; the next token of Python's standard library", llama, **_TEXT),
    "gpt2": Family("GPT-2", "tied head, query, key and value in one weight; the same tokens", gpt2, **_TEXT),
    "vit": Family("ViT", f"{CLASSES} classes of made images", vit, **_IMAGES),
}
