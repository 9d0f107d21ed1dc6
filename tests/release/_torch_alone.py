"""Take a step with every recipe where torch is the only other package. A program for an environment of its own."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_memopt as lm

OTHERS = ("lightning", "torchmetrics", "jsonargparse", "omegaconf", "rich", "matplotlib", "transformers", "numpy")


class Model(nn.Module):
    """A transformer with one layer.

    Input: tokens ``[batch, length]``. Output: logits ``[batch, length, 64]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)])
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.lm_head(hidden)
        return logits


def step(recipe: str) -> None:
    """Take a step with a recipe, and load its state."""
    torch.manual_seed(0)
    model = Model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=1e-3)
    tokens = torch.randint(64, (2, 8))
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all(), recipe
        assert not torch.equal(old, new), recipe
    optimizer.load_state_dict(optimizer.state_dict())


def main() -> None:
    """Check what is installed, and take the steps."""
    assert Path(lm.__file__).is_relative_to(sys.prefix), f"{lm.__file__} is not in {sys.prefix}"
    assert [name for name in OTHERS if find_spec(name)] == []
    try:
        lm.AdaptiveMomentum  # noqa: B018  needs Lightning
    except ImportError as error:
        assert 'pip install "lightning-memopt[cli]"' in str(error)  # noqa: PT017  there is no pytest
    else:
        raise AssertionError("AdaptiveMomentum was imported without Lightning")
    for recipe in lm.recipe_names():
        step(recipe)
    print(f"{len(lm.recipe_names())} recipes have taken a step with torch {torch.__version__} alone.")


if __name__ == "__main__":
    main()
