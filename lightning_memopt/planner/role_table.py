"""The roles of a model's weights, as rows of a table. Equal layers are one row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_memopt.plans.roles import ROLES, canonical_names, classify


@dataclass(frozen=True)
class RoleRow:
    """Blocks that differ in nothing but the numbers in their names.

    Attributes:
        name: Their common name, with ``*`` in place of numbers that differ.
        count: How many they are.
        role: Their role.
        shape: The shape of each.
        split: Which rows or columns of its parameter each is, as text; empty for a whole parameter.
        head_dim: Outputs per attention head, for queries and keys, if known.
        why: What decided the role, in a few words.
    """

    name: str
    count: int
    role: str
    shape: tuple[int, ...]
    split: str
    head_dim: int | None
    why: str

    @property
    def parameters(self) -> int:
        """Number of elements of all blocks."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class RoleTable:
    """The roles of all weights that train.

    Attributes:
        model: Name of the model.
        rows: In the order of the model's parameters.
    """

    model: str
    rows: tuple[RoleRow, ...]

    @staticmethod
    def of(name: str, module: nn.Module) -> RoleTable:
        """Return the roles of a module's weights, which may be on the meta device."""
        parts = classify(module)
        named = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name_, (_, param) in zip(canonical_names(name for name, _ in named), named, strict=True):
            for part in parts[name_]:
                shape, split = tuple(param.shape), ""
                if part.slot is not None:
                    shape, split = part.slot.shape_in(shape), part.slot.text(len(shape))
                full = f"{name_}:{part.role}" if part.slot is not None else name_
                facts = part.role, shape, split, part.head_dim, part.why
                groups.setdefault((_pattern(full), *facts), []).append(full)
        return RoleTable(name, tuple(RoleRow(_common(names), len(names), *key[1:]) for key, names in groups.items()))

    def shares(self) -> dict[str, float]:
        """Return the share of all parameters that every role has, for the roles that occur."""
        total = sum(row.parameters for row in self.rows)
        sizes = {role: sum(row.parameters for row in self.rows if row.role == role) for role in ROLES}
        return {role: size / total for role, size in sizes.items() if size}

    def to_dict(self) -> dict[str, Any]:
        """Return all values as types that JSON supports."""
        rows = [{**asdict(row), "shape": list(row.shape), "parameters": row.parameters} for row in self.rows]
        return {"model": self.model, "shares": self.shares(), "rows": rows}


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _common(names: Iterable[str]) -> str:
    """Return what names of one pattern have in common."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns)
