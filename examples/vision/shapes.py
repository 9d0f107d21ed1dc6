"""Pictures of textured shapes, each a pure function of a seed and its number: nothing is downloaded."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.utils.data import Dataset

SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots")
MOST_CLASSES = len(SHAPES) * len(TEXTURES)
NOISE = 0.1  # standard deviation of a pixel, of a range of 1
CLUTTER = 0.15  # that of the background's soft spots
TURN = math.pi / 9  # the largest angle, in radians
CELLS = 2  # of a texture, from the middle of a shape to its edge


class ShapesDataset(Dataset[tuple[Tensor, int]]):
    """Images of one textured shape each, at a random place, size, angle and color, on a noisy background.

    Classes are pairs of a shape and a texture, and equally frequent.

    Args:
        size: Number of images.
        num_classes: Number of classes, from 2 to 20.
        image_size: Height and width in pixels.
        seed: Two datasets with different seeds have different images.

    Raises:
        ValueError: If ``num_classes`` is out of range.
    """

    def __init__(self, size: int, *, num_classes: int, image_size: int, seed: str) -> None:
        if not 2 <= num_classes <= MOST_CLASSES:
            raise ValueError(
                f"Shapes and textures make 2 to {MOST_CLASSES} classes, got `num_classes` {num_classes}: for others, "
                "give a folder of images as `root`."
            )
        self.size, self.num_classes, self.image_size, self.seed = size, num_classes, image_size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image ``[3, image_size, image_size]`` with values in [-1, 1], and its class."""
        if not 0 <= index < self.size:
            raise IndexError(f"There are {self.size} images, got the index {index}.")
        label = index % self.num_classes
        digest = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        image = draw(label, self.image_size, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))
        return image, label


def draw(label: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Return a random image of a class, ``[3, image_size, image_size]``, with values in [-1, 1].

    Args:
        label: The class: the shape's number plus the texture's times the number of shapes.
        image_size: Height and width in pixels.
        generator: The source of everything random.
    """
    radius, angle, x, y = torch.rand(4, generator=generator).tolist()
    radius = 0.4 + 0.3 * radius  # of half of the image
    room = 1 - radius
    axis = (torch.arange(image_size) + 0.5) / image_size * 2 - 1
    down, right = torch.meshgrid(axis - (2 * y - 1) * room, axis - (2 * x - 1) * room, indexing="ij")
    turn = (2 * angle - 1) * TURN
    u = (math.cos(turn) * right + math.sin(turn) * down) / radius
    v = (math.cos(turn) * down - math.sin(turn) * right) / radius
    inside = shape(SHAPES[label % len(SHAPES)], u, v)
    painted = inside & texture(TEXTURES[label // len(SHAPES)], u, v)

    front, back = colors(generator)
    spots = torch.randn(1, 3, 4, 4, generator=generator) * CLUTTER
    image = back + torch.nn.functional.interpolate(spots, (image_size, image_size), mode="bicubic")[0]
    image = torch.where(painted, front, image)
    image = image + NOISE * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1) * 2 - 1


def shape(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Return which points are inside of a shape that fits into the unit circle."""
    distance = torch.hypot(u, v)
    if name == "disc":
        return distance < 0.9
    if name == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.75
    if name == "triangle":
        slope = math.sqrt(3) / 2
        return torch.maximum(v, torch.maximum(slope * u - v / 2, -slope * u - v / 2)) < 0.5
    if name == "ring":
        return (distance > 0.5) & (distance < 1)
    narrow, wide = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    return (narrow < 0.3) & (wide < 1)  # a cross


def texture(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Return which points of a shape are painted."""
    if name == "plain":
        return torch.ones_like(u, dtype=torch.bool)
    across, along = (torch.sin(math.pi * CELLS * axis) for axis in (u, v))
    if name == "stripes":
        return across > 0
    if name == "checks":
        return across * along > 0
    return across.square() + along.square() > 0.8  # all but dots


def colors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a random light color and a random dark one, ``[3, 1, 1]``."""
    front, back = torch.rand(2, 3, 1, 1, generator=generator)
    return 0.5 + 0.5 * front, 0.5 * back
