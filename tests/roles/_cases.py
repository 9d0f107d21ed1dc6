"""Tiny models with the truth about their weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.roles._truth import Line, parse

TOKENS, VOCAB = 8, 64


@dataclass(frozen=True)
class Case:
    """A model and the truth about its weights.

    Attributes:
        name: The model's name in tests.
        make: Builds the model.
        truth: Lines, as in ``_truth.py``.
        inputs: Returns the arguments of ``forward``.
        proof: What is proven about fused attention: ``all``; ``values`` where queries and keys meet more than each
            other; ``order`` adds to ``all`` that the gradient of one output position tells queries from keys.
        unproven: A pattern of matrices whose orientation no input or output of a module shows.
        train: Whether the model is trained with every recipe. Others have the same structure as one that is.
    """

    name: str
    make: Callable[[], nn.Module]
    truth: str
    inputs: Callable[[], Mapping[str, Any]]
    proof: str = "order"
    unproven: str = ""
    train: bool = True

    @property
    def lines(self) -> tuple[Line, ...]:
        return parse(self.truth)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()

    def __repr__(self) -> str:
        return self.name


def hf(
    name: str, cls: str, config: Mapping[str, Any], truth: str, inputs: Callable[[], Any] | None = None, **options: Any
) -> Case:
    """Return the case of a class of transformers, which is found when the model is built."""

    def make() -> nn.Module:
        kind = attrgetter(cls)(transformers)
        return kind._from_config(kind.config_class(**config), attn_implementation="eager")

    return Case(name, make, truth, inputs or tokens, **options)


def ids(length: int = TOKENS) -> Tensor:
    # No two positions alike, and none is a padding or end token of a usual config.
    return torch.stack([torch.arange(4, 4 + length), torch.arange(60, 60 - length, -1)])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tokens() -> dict[str, Any]:
    return {"input_ids": ids()}


def encoder_decoder() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def pixels() -> dict[str, Any]:
    return {"pixel_values": noise(2, 3, 16, 16)}


def pairs() -> dict[str, Any]:
    return {**tokens(), **pixels()}


def waves() -> dict[str, Any]:
    return {"input_values": noise(2, 200)}


def hidden_states() -> dict[str, Any]:
    return {"x": noise(2, TOKENS, 32)}


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the outputs of a model that depend on its weights."""
    return [tensor for tensor in _tensors(model(**inputs)) if tensor.requires_grad]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif hasattr(output, "to_tuple"):
        yield from _tensors(output.to_tuple())
    elif isinstance(output, tuple | list):
        for entry in output:
            yield from _tensors(entry)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Return a loss that depends on every output, differently on each of its entries."""
    return torch.stack([(tensor.float() - noise(*tensor.shape)).square().mean() for tensor in outputs]).sum()
