"""GaLore, Fira and APOLLO take the steps of their authors' packages, where these are installed.

What differs, and why:

- The packages renew all projections at steps 1, gap + 1, 2 gap + 1; here blocks take turns. A block whose position is
  gap − 1 renews its own at the same steps, so these tests put other parameters before it.
- Singular vectors have LAPACK's signs in the packages, and fixed ones here. Until the second subspace that changes
  nothing; after it, M continues with other signs. The tests give both the same basis.
- Random projections come from torch's generator in the package, and from a hash here. The tests give both the same.
- The packages add 1e-8 to norms before they divide by them. Gradients here have norms of about 1.
- In a package, `scale` of APOLLO is the square of the factor; here it is the factor.
- `max_update` does not exist in the packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kinds.momentum import apollo, projections
from tests._compare import relative_error
from tests.kinds.contract.cases import gradient

RANK, GAP, STEPS, LR, EPS = 4, 3, 12, 1e-2, 1e-6
SHAPES = {"mlp.up_proj.weight": (20, 12), "mlp.down_proj.weight": (12, 20)}
TOLERANCE = 1e-5  # in single precision; measured 1e-6, and 6e-6 where the package's own decomposition is used


@pytest.fixture
def theirs(monkeypatch):
    """Import a module of a package without its ``__init__``, which may import what needs a GPU."""

    def imported(package: str, module: str) -> Any:
        pytest.importorskip("transformers")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"{package} is not installed")
        parent = types.ModuleType(package)
        parent.__path__ = list(spec.submodule_search_locations)
        monkeypatch.setitem(sys.modules, package, parent)
        return importlib.import_module(f"{package}.{module}")

    return imported


def weights() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(gradient(shape, 100 + place)) for place, (name, shape) in enumerate(SHAPES.items())}


def ours(params: dict[str, nn.Parameter], recipe: str, gap: int, **options: Any) -> lm.MemOpt:
    """Return an optimizer in which every weight is at a position of gap − 1 (of each gap), if it renews a basis."""
    named: list[tuple[str, nn.Parameter]] = []
    for name, param in params.items():
        named += [(f"{name}.{place}.bias", nn.Parameter(torch.zeros(2))) for place in range(gap - 1) if gap < STEPS]
        named.append((name, param))
    return lm.MemOpt(named, recipe, lr=LR, eps=EPS, rank=RANK, gap=gap, max_update=None, **options)


def differences(optimizer: Any, params: dict[str, nn.Parameter], package: Any, **group: Any) -> list[float]:
    """Take the same steps with both, and return how far each weight's path is from the package's, by its length."""
    expected = weights()
    reference = package([{"params": list(expected.values()), "rank": RANK, "proj_type": "std", **group}], LR, eps=EPS)
    BASES.clear()
    for step in range(STEPS):
        for place, (name, shape) in enumerate(SHAPES.items()):
            grad = gradient(shape, 7 * step + place) + gradient(shape, 50 + place)  # with a common part
            expected[name].grad, params[name].grad = grad.clone(), grad.clone()
        reference.step()
        for param in expected.values():
            BASES[tuple(param.shape)] = reference.state[param]["projector"].ortho_matrix
        optimizer.step()
    start = weights()
    return [
        relative_error((params[name] - start[name]).detach(), (expected[name] - start[name]).detach())
        for name in SHAPES
    ]


# The projection of the package at the last step, by the shape of the weight.
BASES: dict[tuple[int, ...], torch.Tensor] = {}


def their_basis(layout: Any) -> torch.Tensor:
    basis = BASES[tuple(layout.shape)]
    return basis if basis.shape[-1] == RANK else basis.T


def same_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    def injected(grad, basis, layout, long, short, tick):
        yield from ()
        return their_basis(layout)

    monkeypatch.setitem(projections.PROJECTIONS._entries, "svd", injected)


CASES = {"galore": ("galore_torch", "adamw", "scale"), "fira": ("fira", "fira_adamw", "alpha")}


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("recipe", CASES)
def test_the_first_subspace(theirs, recipe, scale):
    package, module, name = CASES[recipe]
    cls, params = theirs(package, module).AdamW, weights()
    optimizer = ours(params, recipe, 200, scale=scale)
    assert max(differences(optimizer, params, cls, update_proj_gap=200, **{name: scale})) <= TOLERANCE


@pytest.mark.parametrize("recipe", CASES)
def test_later_subspaces(theirs, monkeypatch, recipe):
    package, module, name = CASES[recipe]
    cls, params = theirs(package, module).AdamW, weights()
    same_subspace(monkeypatch)
    optimizer = ours(params, recipe, GAP)
    assert max(differences(optimizer, params, cls, update_proj_gap=GAP, **{name: 0.25})) <= TOLERANCE


@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize(("scaling", "scale"), [("channel", 1.0), ("tensor", 128.0)])
def test_random_projections(theirs, monkeypatch, scaling, scale, scale_front):
    package, params = theirs("apollo_torch", "apollo"), weights()
    monkeypatch.setattr(apollo, "projection", lambda layout, short, rank, tick: their_basis(layout))
    optimizer = ours(params, "apollo", GAP, scaling=scaling, scale=scale**0.5)
    group = {"proj": "random", "scale_type": scaling, "scale": scale, "update_proj_gap": GAP}
    made = lambda *args, **options: package.AdamW(*args, scale_front=scale_front, **options)  # noqa: E731
    assert max(differences(optimizer, params, made, **group)) <= TOLERANCE
