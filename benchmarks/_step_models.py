"""Models without a forward pass for timing optimizers, and their gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import nn

# hidden, intermediate, layers, heads, vocabulary
SIZES = {
    "1b": (2048, 5461, 24, 32, 32000),
    "130m": (768, 2048, 12, 12, 32000),
    "60m": (512, 1376, 8, 8, 32000),
    "tiny": (64, 172, 2, 4, 512),
}


def llama_shapes(size: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, layers, _, vocabulary = size
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def build_model(size: tuple[int, ...], device: str, dtype: torch.dtype) -> nn.Module:
    """Return a module with only a LLaMA's parameters, under transformers' names."""
    hidden, inner, layers, heads, vocabulary = size
    model = nn.Module()
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": hidden // heads}
    model.config = SimpleNamespace(model_type="llama", **sizes, **heads_of)
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in llama_shapes(size):
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        weight = torch.randn(shape, generator=generator, device=device) * 0.02
        parent.register_parameter(leaf, nn.Parameter(weight.to(dtype)))
    return model


class Gradients:
    """Give every parameter a new normal gradient, copied from a pool of noise, which is faster than drawing it."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.params = list(model.parameters())
        self.spare = 1_000_003
        length = max(param.numel() for param in self.params) + self.spare
        self.pool = torch.randn(length, generator=torch.Generator(device).manual_seed(1), device=device) * 1e-3
        self.pool = self.pool.to(self.params[0].dtype)
        self.offsets = torch.Generator().manual_seed(2)

    def renew(self) -> None:
        """Write the next gradients."""
        for param in self.params:
            start = int(torch.randint(self.spare, (1,), generator=self.offsets))
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.view(-1).copy_(self.pool[start : start + param.numel()])


def timed(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Return the seconds of one step."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
