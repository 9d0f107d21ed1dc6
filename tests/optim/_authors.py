"""The paths that GaLore's, Fira's and APOLLO's own packages take, recorded in ``authors.pt``.

To record them again, install ``galore-torch``, ``apollo-torch`` and ``fira``, and run
``python -m tests.optim._authors``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.kinds.contract.cases import gradient

RANK, GAP, LATER, STEPS, LR, EPS = 4, 3, 200, 12, 1e-2, 1e-6
SHAPES = {"mlp.up_proj.weight": (20, 12), "mlp.down_proj.weight": (12, 20)}
RECORD = Path(__file__).with_name("authors.pt")


@dataclass(frozen=True)
class Authors:
    """An optimizer of a package, and the options of its group."""

    package: str
    module: str
    group: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def build(self, params: list[nn.Parameter]) -> Any:
        """Return the optimizer. The package's ``__init__`` is passed over: it may import what needs a GPU."""
        found = importlib.util.find_spec(self.package)
        assert found is not None
        parent = types.ModuleType(self.package)
        parent.__path__, parent.__spec__ = list(found.submodule_search_locations or []), found
        sys.modules[self.package] = parent
        cls = importlib.import_module(f"{self.package}.{self.module}").AdamW
        return cls([{"params": params, "rank": RANK, "proj_type": "std", **self.group}], LR, eps=EPS, **self.options)


def _cases() -> dict[str, Authors]:
    found = {}
    for recipe, package, module, name in (
        ("galore", "galore_torch", "adamw", "scale"),
        ("fira", "fira", "fira_adamw", "alpha"),
    ):
        for scale, gap in ((0.25, LATER), (1.0, LATER), (0.25, GAP)):
            found[f"{recipe}, {scale}, gap {gap}"] = Authors(package, module, {"update_proj_gap": gap, name: scale})
    for scaling, scale in (("channel", 1.0), ("tensor", 128.0)):
        group = {"proj": "random", "scale_type": scaling, "scale": scale, "update_proj_gap": GAP}
        for front in (False, True):
            key = f"apollo, {scaling}, {'front' if front else 'back'}"
            found[key] = Authors("apollo_torch", "apollo", group, {"scale_front": front})
    return found


CASES = _cases()


def weights() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(gradient(shape, 100 + place)) for place, (name, shape) in enumerate(SHAPES.items())}


def gradients(step: int) -> dict[str, Tensor]:
    """Return the gradients of a step, which have a common part."""
    return {
        name: gradient(shape, 7 * step + place) + gradient(shape, 50 + place)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def path(case: Authors) -> dict[str, Any]:
    """Take the steps with a package, and return the projection of every step and the weights at the end, by name."""
    torch.manual_seed(0)  # of APOLLO's projections
    params = weights()
    optimizer, bases = case.build(list(params.values())), []
    for step in range(STEPS):
        for name, grad in gradients(step).items():
            params[name].grad = grad
        optimizer.step()
        bases.append({name: _basis(optimizer.state[param]["projector"]) for name, param in params.items()})
    return {"bases": bases, "weights": {name: param.detach() for name, param in params.items()}}


def _basis(projector: Any) -> Tensor:
    matrix = projector.ortho_matrix
    return (matrix if matrix.shape[-1] == RANK else matrix.T).clone()


def recorded(key: str) -> dict[str, Any]:
    """Return what a package did."""
    return torch.load(RECORD, weights_only=True)[key]


if __name__ == "__main__":
    torch.save({key: path(case) for key, case in CASES.items()}, RECORD)
    for package in ("galore-torch", "apollo-torch", "fira"):
        print(package, importlib.metadata.version(package))
