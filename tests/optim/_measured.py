"""A small network with one of everything, and what tests ask of its snapshot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lightning_memopt as lm
from tests._models import fill_grads


class Network(nn.Module):
    """One of everything: an embedding, fused attention, vectors, a convolution, a number, a head."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(40, 24)
        self.layer = nn.TransformerEncoderLayer(24, 2, 56)
        self.conv = nn.Conv2d(3, 10, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(24, 40, bias=False)
        self.register_buffer("positions", torch.zeros(7))
        self.to(dtype)


def stepped(model: nn.Module, make: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    optimizer = make(model.parameters(), **options)
    fill_grads([param for param in model.parameters() if param.requires_grad], seed=0)
    optimizer.step()
    return optimizer


def numel(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def by_name(snapshot: lm.Snapshot) -> dict[str, lm.BlockFacts]:
    found = {block.name: block for block in snapshot.blocks}
    assert len(found) == len(snapshot.blocks), "names are unique"
    return found
