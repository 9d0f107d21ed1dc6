"""Public language models for planning, as modules with names, shapes and head sizes but without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_memopt._registry import unknown


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a LLaMA, or of a Mixtral if there are experts.

    Attributes:
        hidden: Width of the model.
        intermediate: Width inside an MLP.
        layers: Number of layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        vocabulary: Number of tokens.
        experts: Number of MLPs per layer, stacked behind a router; None for one MLP without a router.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    experts: int | None = None


@dataclass(frozen=True)
class GPT2Sizes:
    """Sizes of a GPT-2."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 50257
    positions: int = 1024


# The four small LLaMAs are from the GaLore and SNSM papers, the others from their public configurations.
MODELS: dict[str, LlamaSizes | GPT2Sizes] = {
    "llama-60m": LlamaSizes(512, 1376, 8, 8, 8),
    "llama-130m": LlamaSizes(768, 2048, 12, 12, 12),
    "llama-350m": LlamaSizes(1024, 2736, 24, 16, 16),
    "llama-1b": LlamaSizes(2048, 5461, 24, 32, 32),
    "llama-2-7b": LlamaSizes(4096, 11008, 32, 32, 32),
    "llama-2-13b": LlamaSizes(5120, 13824, 40, 40, 40),
    "llama-2-70b": LlamaSizes(8192, 28672, 80, 64, 8),
    "llama-3-8b": LlamaSizes(4096, 14336, 32, 32, 8, vocabulary=128256),
    "llama-3-70b": LlamaSizes(8192, 28672, 80, 64, 8, vocabulary=128256),
    "gpt2": GPT2Sizes(768, 12, 12),
    "gpt2-xl": GPT2Sizes(1600, 48, 25),
    "mixtral-8x7b": LlamaSizes(4096, 14336, 32, 32, 8, experts=8),
}
ALIASES = {"llama-7b": "llama-2-7b", "gpt2-124m": "gpt2", "gpt2-1.5b": "gpt2-xl"}


class Skeleton(nn.Module):
    """A module with sizes and without values.

    Args:
        head_dim: Outputs per attention head, for an attention layer.
        **children: Modules, lists of modules, and shapes of parameters.
    """

    def __init__(
        self, *, head_dim: int | None = None, **children: nn.Module | Sequence[nn.Module] | torch.Size
    ) -> None:
        super().__init__()
        if head_dim is not None:
            self.head_dim = head_dim
        for name, child in children.items():
            if isinstance(child, nn.Module):
                self.add_module(name, child)
            elif isinstance(child, torch.Size):
                self.register_parameter(name, nn.Parameter(torch.empty(child, device="meta")))
            else:
                self.add_module(name, nn.ModuleList(child))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: the module has no values to compute with."""
        raise NotImplementedError(
            "This module is made for its sizes only; build the model with transformers to call it."
        )


def model_names() -> list[str]:
    """Return the names that :func:`skeleton` accepts. Case does not matter."""
    return [*MODELS, *ALIASES]


def skeleton(name: str) -> nn.Module:
    """Return a public model on the meta device, with the names and shapes of the transformers model.

    Raises:
        ValueError: If the name is unknown; the message lists the known names.
    """
    key = ALIASES.get(name.lower(), name.lower())
    if key not in MODELS:
        raise ValueError(f"{unknown('model', name, model_names())} Or give the path of a transformers config file.")
    sizes = MODELS[key]
    return gpt2(sizes) if isinstance(sizes, GPT2Sizes) else llama(sizes)


def llama(sizes: LlamaSizes) -> nn.Module:
    """Return a ``LlamaForCausalLM``, or a ``MixtralForCausalLM`` if there are experts."""
    hidden, head_dim = sizes.hidden, sizes.hidden // sizes.heads
    mlp = _mlp if sizes.experts is None else _experts

    def layer() -> nn.Module:
        attention = Skeleton(
            head_dim=head_dim,
            q_proj=_weight(sizes.heads * head_dim, hidden),
            k_proj=_weight(sizes.kv_heads * head_dim, hidden),
            v_proj=_weight(sizes.kv_heads * head_dim, hidden),
            o_proj=_weight(hidden, sizes.heads * head_dim),
        )
        norms: dict[str, Any] = {name: _weight(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        return Skeleton(self_attn=attention, mlp=mlp(sizes), **norms)

    model = Skeleton(
        embed_tokens=_embedding(sizes.vocabulary, hidden), layers=_repeat(layer, sizes.layers), norm=_weight(hidden)
    )
    return Skeleton(model=model, lm_head=_weight(sizes.vocabulary, hidden))


def gpt2(sizes: GPT2Sizes) -> nn.Module:
    """Return a ``GPT2LMHeadModel``. Weights are ``[inputs, outputs]``, and the head is tied to the embedding."""
    hidden = sizes.hidden

    def layer() -> nn.Module:
        attention = Skeleton(
            head_dim=hidden // sizes.heads, c_attn=_biased(hidden, 3 * hidden), c_proj=_biased(hidden, hidden)
        )
        mlp = Skeleton(c_fc=_biased(hidden, 4 * hidden), c_proj=_biased(4 * hidden, hidden))
        return Skeleton(ln_1=_biased(hidden), attn=attention, ln_2=_biased(hidden), mlp=mlp)

    embedding, head = _embedding(sizes.vocabulary, hidden), Skeleton()
    head.weight = embedding.weight
    transformer = Skeleton(
        wte=embedding,
        wpe=_embedding(sizes.positions, hidden),
        h=_repeat(layer, sizes.layers),
        ln_f=_biased(hidden),
    )
    return Skeleton(transformer=transformer, lm_head=head)


def _mlp(sizes: LlamaSizes) -> nn.Module:
    wide: dict[str, Any] = {name: _weight(sizes.intermediate, sizes.hidden) for name in ("gate_proj", "up_proj")}
    return Skeleton(**wide, down_proj=_weight(sizes.hidden, sizes.intermediate))


def _experts(sizes: LlamaSizes) -> nn.Module:
    assert sizes.experts is not None
    experts = Skeleton(
        gate_up_proj=torch.Size((sizes.experts, 2 * sizes.intermediate, sizes.hidden)),
        down_proj=torch.Size((sizes.experts, sizes.hidden, sizes.intermediate)),
    )
    return Skeleton(gate=_weight(sizes.experts, sizes.hidden), experts=experts)


def _embedding(count: int, hidden: int) -> nn.Embedding:
    return nn.Embedding(count, hidden, device="meta")


def _weight(*shape: int) -> nn.Module:
    return Skeleton(weight=torch.Size(shape))


def _biased(*shape: int) -> nn.Module:
    return Skeleton(weight=torch.Size(shape), bias=torch.Size(shape[-1:]))


def _repeat(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    return [make() for _ in range(count)]
