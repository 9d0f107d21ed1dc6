"""Synthetic images for benchmarks/adaptive.py, which need no download."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 24
ORIENTATIONS = 8
FREQUENCIES = (0.1, 0.14, 0.2, 0.28)  # cycles per pixel
CLASSES = ORIENTATIONS * len(FREQUENCIES)
NOISE = 0.5


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pixels ``[count, 1, side, side]`` and labels.

    Each image is a grating with any phase and contrast, behind a disc of any size, place and brightness, under noise.
    The grating has one of eight orientations and four frequencies, which together are the class.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels % ORIENTATIONS).view(-1, 1, 1) * (math.pi / ORIENTATIONS) + uniform(-0.1, 0.1)
    frequency = torch.tensor(FREQUENCIES)[labels // ORIENTATIONS].view(-1, 1, 1)
    line = torch.arange(SIDE, dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    wave = 2 * math.pi * frequency * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi)
    distance = ((x - uniform(0, SIDE)) ** 2 + (y - uniform(0, SIDE)) ** 2).sqrt()
    pixels = torch.where(distance < uniform(2, 8), uniform(-1.5, 1.5), uniform(0.4, 1.0) * wave.sin())
    return (pixels + NOISE * torch.randn(pixels.shape, generator=generator)).unsqueeze(1), labels
