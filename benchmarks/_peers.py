"""Optimizers from other packages, each optional and built as its README says."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

Build = Callable[[nn.Module], torch.optim.Optimizer]
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peers() -> Iterator[tuple[str, str, Build]]:
    """Yield the name, PyPI package and builder of each peer, installed or not."""
    yield "galore_authors", "galore-torch", _galore
    yield "apollo_authors", "apollo-torch", _apollo
    yield "apollo_mini_authors", "apollo-torch", _apollo_mini
    yield "adam_mini_authors", "adam-mini", _adam_mini
    yield "adamw_8bit", "torchao", _adamw_8bit
    yield "torch_muon", "torch", _muon


def installed(package: str) -> bool:
    """Return whether a peer can be imported."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _module(package: str, name: str) -> types.ModuleType:
    # The packages' __init__ imports 8-bit variants that need bitsandbytes; the classes used here do not.
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        shell = types.ModuleType(package)
        shell.__path__ = list(spec.submodule_search_locations or []) if spec else []
        sys.modules[package] = shell
    return importlib.import_module(f"{package}.{name}")


def _groups(model: nn.Module, **options: object) -> list[dict[str, object]]:
    """Return the two groups that GaLore and APOLLO expect: attention and MLP weights with a rank, the rest without."""
    named = list(model.named_parameters())
    adapted = [param for name, param in named if any(part in name for part in _ADAPTED)]
    rest = [param for name, param in named if not any(part in name for part in _ADAPTED)]
    return [{"params": rest}, {"params": adapted, **options}]


def _galore(model: nn.Module) -> torch.optim.Optimizer:
    # The authors' settings for LLaMA-130M: a third of the short side, an exact SVD every 200 steps.
    options = {"rank": model.config.hidden_size // 3, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return _module("galore_torch", "adamw").AdamW(_groups(model, **options), lr=1e-3, no_deprecation_warning=True)


def _apollo(model: nn.Module) -> torch.optim.Optimizer:
    options = {"rank": model.config.hidden_size // 4, "proj": "random", "scale_type": "channel", "scale": 1}
    groups = _groups(model, update_proj_gap=200, proj_type="std", **options)
    return _module("apollo_torch", "apollo").AdamW(groups, lr=1e-3)


def _apollo_mini(model: nn.Module) -> torch.optim.Optimizer:
    options = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128}
    groups = _groups(model, update_proj_gap=200, proj_type="std", **options)
    return _module("apollo_torch", "apollo").AdamW(groups, lr=1e-3)


def _adam_mini(model: nn.Module) -> torch.optim.Optimizer:
    build = importlib.import_module("adam_mini").Adam_mini
    heads = {"dim": model.config.hidden_size, "n_heads": model.config.num_attention_heads}
    return build(list(model.named_parameters()), lr=1e-3, verbose=False, **heads)


def _adamw_8bit(model: nn.Module) -> torch.optim.Optimizer:
    return importlib.import_module("torchao.optim").AdamW8bit(model.parameters(), lr=1e-3)


class _Both(torch.optim.Optimizer):
    """Two optimizers that step together."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = (first, second)

    @property
    def state(self) -> dict[torch.Tensor, dict[str, object]]:  # type: ignore[override]
        return {**self.parts[0].state, **self.parts[1].state}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _muon(model: nn.Module) -> torch.optim.Optimizer:
    # Muon is for hidden matrices; its authors leave all other parameters to AdamW.
    named = list(model.named_parameters())
    hidden = [param for name, param in named if any(part in name for part in _ADAPTED)]
    rest = [param for name, param in named if not any(part in name for part in _ADAPTED)]
    return _Both(torch.optim.Muon(hidden, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, fused=True))
