"""What the contract is checked on: every registered kind × values of its options, and shapes of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.momentum.apollo import SCALINGS
from lightning_memopt.kinds.momentum.projections import HANDOVERS, PROJECTIONS
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.kinds.second_moment.normalized import SIDES
from lightning_memopt.kinds.second_moment.orthogonal import ADJUSTMENTS
from lightning_memopt.kinds.second_moment.subset_norm import REDUCTIONS
from lightning_memopt.kinds.tick import Tick, block_key
from lightning_memopt.sharding.layout import Layout

# Options have one meaning each, whatever the kind: values to try are listed by option. Options that are true or false
# need no entry; an option that is not listed is tried at its default.
OPTION_VALUES: dict[str, list[Any]] = {
    "rank": [2, 1, 0.5, 1000],
    "gap": [3, 1],
    "projection": PROJECTIONS.names(),
    "handover": HANDOVERS.names(),
    "reduction": list(REDUCTIONS),
    "subset_size": [None, 5, 1, 1000],
    "outputs_per_number": [None, 4],
    "per": list(SIDES),
    "ns_coefficients": [(2.0, -1.5, 0.5)],
    "ns_steps": [3],
    "adjust_lr_fn": list(ADJUSTMENTS),
    "scale": [0.25, 1.0],
    "scaling": list(SCALINGS),
}
BAD_OPTION_VALUES: dict[str, list[Any]] = {
    "rank": [0, -1, 1.5, 0.0, float("nan"), True, "4", None],
    "gap": [0, -3, 2.5, True, "10", None],
    "projection": ["pca", "", None, 3],
    "handover": ["forget", None],
    "reduction": ["max", None, 2],
    "subset_size": [0, -1, 2.5, True, "128"],
    "outputs_per_number": [0, -1, 2.5, True, "64"],
    "per": ["head", None, 1],
    "ns_coefficients": [
        (3.4, -4.8),
        (1.0, "2", 3.0),
        (0.0, 0.0, 0.0),
        (9.0, 1.0, 1.0),
        (float("nan"), 1.0, 1.0),
        3.4,
        None,
    ],
    "ns_steps": [0, 11, 2.5, True, "5", None],
    "adjust_lr_fn": ["rms", None, 0.2],
    "scale": [0, -0.5, float("nan"), True, "1", None],
    "scaling": ["row", "", None, 1],
    "growth": [1, 0.9, float("inf"), True, "1.01", None],
}

SHAPES: list[tuple[int, ...]] = [(12, 20), (20, 12), (8, 8), (1, 9), (9, 1), (3, 12, 20), (5, 3, 2, 2)]
FEW_SHAPES: list[tuple[int, ...]] = [(20, 12), (3, 4, 9)]
VECTOR_SHAPES: list[tuple[int, ...]] = [(9,), (1,), ()]
BETAS = (0.9, 0.99)
EPS = 1e-8


def variants(cls: type[Kind]) -> list[Kind]:
    """Return a small basic instance of a kind and, one option at a time, its other values."""
    basic = cls(**{name: OPTION_VALUES[name][0] for name in ("rank", "gap") if name in cls.options()})
    found = [basic]
    for entry in (entry for entry in fields(cls) if entry.name in cls.options()):
        values = OPTION_VALUES.get(entry.name, [])
        if isinstance(getattr(basic, entry.name), bool):
            values = [True, False]
        found += [replace(basic, **{entry.name: value}) for value in values if value != getattr(basic, entry.name)]
    return found


def all_momenta() -> list[Kind]:
    return [kind for name in MOMENTA.names() for kind in variants(MOMENTA.get(name))]


def all_second_moments() -> list[Kind]:
    return [kind for name in SECOND_MOMENTS.names() for kind in variants(SECOND_MOMENTS.get(name))]


def without_repetition(kinds: list[Kind]) -> list[Kind]:
    """Return the kinds for checks of properties.

    Where several kinds inherit an option from one class, which also has the code that reads it, the first of them has
    all of its values. Each is compared with its reference under all of them.
    """
    found, varied = [], {}
    for kind in kinds:
        basic = variants(type(kind))[0]
        changed = [entry.name for entry in fields(kind) if getattr(kind, entry.name) != getattr(basic, entry.name)]
        owners = [(next(cls for cls in type(kind).__mro__ if name in vars(cls)), name) for name in changed]
        if all(varied.setdefault(owner, type(kind)) is type(kind) for owner in owners):
            found.append(kind)
    return found


def all_pairs(keep: Callable[[Kind], bool]) -> list[tuple[Kind, Kind]]:
    """Return the kinds that go together: a momentum that averages squares has no second moment beside it."""
    return [
        (momentum, second)
        for momentum in filter(keep, all_momenta())
        for second in filter(keep, all_second_moments())
        if second.name == "none" or not momentum.averages_squares
    ]


def label(case: object) -> str | None:
    """Return the name of a case in pytest's output."""
    if isinstance(case, Kind):
        changed = [f"{e.name}={getattr(case, e.name)}" for e in fields(case) if getattr(case, e.name) != e.default]
        return "-".join([case.name, *changed])
    if isinstance(case, tuple):
        return "x".join(map(str, case)) or "scalar"
    return getattr(case, "__name__", None)


def is_basic(kind: Kind) -> bool:
    return kind == variants(type(kind))[0]


def changes_a_switch(kind: Kind) -> bool:
    """Return whether it differs from the basic instance by an option that is true or false."""
    basic = variants(type(kind))[0]
    return any(getattr(kind, each.name) is not getattr(basic, each.name) for each in fields(kind)
               if isinstance(each.default, bool))  # fmt: skip


def shapes_for(kind: Kind) -> list[tuple[int, ...]]:
    """Return the shapes to check a kind on: all of them for the basic instance, a few for each further option value."""
    shapes = SHAPES if is_basic(kind) else FEW_SHAPES
    return shapes if kind.needs_matrix else shapes + VECTOR_SHAPES


def layout_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **facts: Any) -> Layout:
    return Layout.of(torch.empty(shape, dtype=dtype), **facts)


def gradient(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return a gradient that depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def tick_at(step: int, name: str = "block", index: int = 0) -> Tick:
    return Tick(step, block_key(0, name), index)
