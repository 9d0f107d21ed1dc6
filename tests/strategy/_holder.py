"""Modules that the tests of units, placement and initialisation share."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule

from lightning_memopt.sharding.wrapping import find_units


class Holder(LightningModule):
    """A LightningModule of given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Layer(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, value):
        return self.linear(value)


class Tower(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.first = nn.Embedding(4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.last = nn.Linear(4, 4)

    def forward(self, value):
        for layer in self.layers:
            value = layer(value)
        return value


def names(model, policy=None):
    return [unit.name for unit in find_units(model, policy)]
