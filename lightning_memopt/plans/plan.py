"""Plan: the recipe and the rates of every block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_memopt._registry import unknown
from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.ranges import check_betas
from lightning_memopt.plans.hints import check_form, meant
from lightning_memopt.plans.rates import RATES, BlockRates
from lightning_memopt.plans.recipe import (
    AXES,
    Recipe,
    check_change,
    kind_from_dict,
    kind_to_dict,
    known_options,
    located,
)
from lightning_memopt.plans.roles import ROLES

# Roles that a plan need not have: earlier versions called them `other`.
_FORMERLY_OTHER = ("linear", "convolution", "router", "lora")

BINDING_TELLS = " Some blocks have no known role (other): `optimizer.bind(model)` before the first step finds more."


@dataclass(frozen=True)
class Plan:
    """The recipe of every block, and its rates.

    Attributes:
        name: A name for messages and checkpoints.
        roles: The recipe of every role. Without one, ``linear``, ``convolution``, ``router`` and ``lora`` get that of
            ``other``.
        betas: The default decay rates.
        overrides: Changes by role or by name pattern, applied in order, so that later ones take precedence: a recipe,
            or kinds, options and rates (``lr_multiplier``, ``weight_decay``) by name. Patterns use ``*`` and ``?`` as
            in a shell and match the name of a block or of its parameter.
        options: Options for every kind that has them. Overrides take precedence.
        named_roles: The roles that a recipe file names: whoever writes one expects blocks that have it.
    """

    name: str
    roles: Mapping[str, Recipe]
    betas: tuple[float, float] = (0.9, 0.999)
    overrides: Mapping[str, Recipe | Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    named_roles: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_betas(self.betas, f"the recipe {self.name!r}")
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(unknown("role", role, list(ROLES)))
        if "other" in self.roles:
            spare = dict.fromkeys(_FORMERLY_OTHER, self.roles["other"])
            object.__setattr__(self, "roles", {**spare, **self.roles})
        missing = [role for role in ROLES if role not in self.roles]
        if missing:
            raise ValueError(f"The plan {self.name!r} has no recipe for: {', '.join(missing)}.")
        for pattern, change in self.overrides.items():
            if not isinstance(change, Recipe):
                check_change(change, f"the override {pattern!r}")
        self._check_options()

    def _check_options(self) -> None:
        """Refuse options that are unknown or have no effect in the plan."""
        roles = list({id(recipe): recipe for recipe in self.roles.values()}.values())  # most roles share one
        recipes = list(roles)
        for pattern, change in self.overrides.items():
            found = [recipe.changed(_kinds_only(change)) for recipe in roles]
            if not isinstance(change, Recipe):  # check its options here, not only when a block uses them
                with located(f"the override {pattern!r}"):
                    found = [recipe.with_options(change) for recipe in found]
            recipes += found
        for key in self.options:
            if key not in known_options():
                raise ValueError(unknown("option", key, known_options()))
            if not any(key in recipe.options() for recipe in recipes):
                owners = [f"{axis} {name!r}" for axis, table in AXES.items() for name in table.names()
                          if key in table.get(name).options()]  # fmt: skip
                raise ValueError(
                    f"Option {key!r} has no effect in the recipe {self.name!r}: it belongs to {' and '.join(owners)}, "
                    "which no role has. Leave it out, or choose such a kind with `overrides`."
                )
        for recipe in recipes:
            recipe.with_options(self.options)

    def updated(self, *, overrides: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> Plan:
        """Return the plan with more overrides and options.

        An override replaces the kinds and options of one with the same pattern if it has any, and each rate it has.
        """
        if overrides is not None:
            check_form(overrides)
        given = {key: value for key, value in (options or {}).items() if value is not None}
        merged = dict(self.overrides)
        for pattern, change in (overrides or {}).items():
            merged[pattern] = _merged(merged[pattern], change) if pattern in merged else change
        return replace(self, overrides=merged, options={**self.options, **given})

    def recipe(self, name: str, role: str) -> Recipe:
        """Return the recipe of one block, before fractional ranks are resolved.

        A name pattern may match all sorts of blocks. Blocks whose kinds lack an option ignore it. Vectors keep their
        recipe if the new kind is undefined on vectors.
        """
        recipe = self.roles[role].with_options(self.options)
        for pattern, change in self.overrides.items():
            if not applies(pattern, name, role):
                continue
            if isinstance(change, Recipe):
                new = change
            else:
                new = recipe.changed(self._new_kinds(change, recipe)).with_options(change)
            if role != "vector" or pattern == "vector" or not new.needs_matrix:
                recipe = new
        return recipe

    def rates(self, name: str, role: str) -> BlockRates:
        """Return how the rates of one block differ from those of its parameter group. Vectors take them, too."""
        rates = BlockRates()
        for pattern, change in self.overrides.items():
            if not isinstance(change, Recipe) and applies(pattern, name, role):
                rates = rates.changed(change)
        return rates

    def overridden(self, name: str, role: str) -> bool:
        """Return whether an override names a kind for a block."""
        naming = (pattern for pattern, change in self.overrides.items() if AXES.keys() & _keys(change).keys())
        return any(applies(pattern, name, role) for pattern in naming)

    def has(self, axis: str, name: str) -> bool:
        """Return whether a role or override has this kind on this axis (``momentum`` or ``second_moment``)."""
        chosen = {getattr(recipe, axis).name for recipe in self.roles.values()}
        return name in chosen | {_wanted(change, axis) for change in self.overrides.values()}

    def kind(self, axis: str, name: str, name_of_block: str, role: str) -> Any:
        """Return the kind of this name as in the block's recipe, or else as used elsewhere in the plan.

        Args:
            axis: ``momentum`` or ``second_moment``.
            name: The kind's name.
            name_of_block: The block's name.
            role: Its role.
        """
        own = getattr(self.recipe(name_of_block, role), axis)
        if own.name == name:
            return own
        return self._elsewhere(axis, name)

    def _elsewhere(self, axis: str, name: str) -> Any:
        """Return the kind of this name from the first role that has it, or its defaults; with the plan's options."""
        kinds = (getattr(entry, axis) for entry in self.roles.values())
        kind = next((kind for kind in kinds if kind.name == name), None) or AXES[axis].get(name)()
        return replace(kind, **{key: value for key, value in self.options.items() if key in kind.options()})

    def _new_kinds(self, change: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
        """Return the kinds of a change that ``recipe`` does not have. A name means the kind as used elsewhere."""
        wanted = {axis: change[axis] for axis in AXES if change.get(axis) not in (None, getattr(recipe, axis).name)}
        return {axis: kind if isinstance(kind, Kind) else self._elsewhere(axis, kind) for axis, kind in wanted.items()}

    def check_matches(self, blocks: Iterable[tuple[str, str]], *, final: bool = True) -> None:
        """Refuse overrides that match no block.

        Args:
            blocks: Name and role of every block.
            final: Whether no more roles can become known. Otherwise a role that no block has is not refused.

        Raises:
            ValueError: The message names the pattern and what it could have matched.
        """
        blocks = list(blocks)
        for pattern in self.overrides:
            if any(applies(pattern, *block) for block in blocks) or (pattern in ROLES and not final):
                continue
            names = [name for name, _ in blocks]
            raise ValueError(
                f"The override {pattern!r} matches nothing.{meant(pattern, names)} Roles here: "
                f"{', '.join(sorted({role for _, role in blocks}))}; blocks: "
                f"{', '.join(names[:3])}{f', ... ({len(names)} in all)' if len(names) > 3 else ''}. "
                "Patterns are matched against the whole name: start with '*' to match the end of it."
                + (BINDING_TELLS if pattern in ROLES and any(role == "other" for _, role in blocks) else "")
            )

    def check_overrides(self, blocks: Iterable[tuple[str, str, Recipe]], *, final: bool = True) -> None:
        """Refuse overrides that change nothing.

        Args:
            blocks: Name, role and final recipe of every block.
            final: As for :meth:`check_matches`.

        Raises:
            ValueError: As for :meth:`check_matches`. Also if no block has what an override sets.
        """
        blocks = list(blocks)
        self.check_matches([block[:2] for block in blocks], final=final)
        for pattern, change in self.overrides.items():
            found = [block for block in blocks if applies(pattern, *block[:2])]
            if not found:
                continue
            matched = [recipe for *_, recipe in found]
            for axis in AXES:
                wanted = _wanted(change, axis)
                if wanted is not None and not any(getattr(recipe, axis).name == wanted for recipe in matched):
                    raise ValueError(
                        f"The override {pattern!r} requests {axis} {wanted!r}, but none of the blocks it matches gets "
                        "it: all are vectors, on which it is undefined, or a later override takes precedence."
                    )
            given = {} if isinstance(change, Recipe) else change
            for key in RATES:
                if key in given and not any(
                    getattr(self.rates(name, role), key) == float(given[key]) for name, role, _ in found
                ):
                    raise ValueError(
                        f"The override {pattern!r} sets {key!r} to {given[key]!r}, which none of the blocks it matches "
                        "gets: a later override takes precedence. Put it after that one, or leave it out."
                    )
            for key in [key for key in given if key not in (*AXES, *RATES)]:
                if not any(key in recipe.options() for recipe in matched):
                    kinds = sorted({f"{recipe.momentum.name} × {recipe.second_moment.name}" for recipe in matched})
                    raise ValueError(
                        f"The override {pattern!r} sets {key!r}, which has no effect on the blocks it matches: they "
                        f"have {', '.join(kinds)}. Choose another kind for them as well."
                    )

    def kinds_of_overrides(self) -> list[Recipe | Mapping[str, Any]]:
        """Return the kinds that overrides name."""
        return [_kinds_only(change) for change in self.overrides.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as mappings, strings and numbers, for :meth:`from_dict`."""
        overrides = {
            pattern: {
                key: kind_to_dict(value) if isinstance(value, Kind) else value for key, value in _keys(change).items()
            }
            for pattern, change in self.overrides.items()
        }
        return {
            "name": self.name,
            "betas": list(self.betas),
            "roles": {role: recipe.to_dict() for role, recipe in self.roles.items()},
            "overrides": overrides,
            "options": dict(self.options),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Build a plan from the result of :meth:`to_dict`."""
        overrides: dict[str, Any] = {}
        for pattern, change in data.get("overrides", {}).items():
            kinds = {axis: kind_from_dict(axis, change[axis]) for axis in AXES if isinstance(change.get(axis), Mapping)}
            whole = kinds.keys() == change.keys() == AXES.keys()
            overrides[pattern] = Recipe(**kinds) if whole else {**change, **kinds}
        first, second = data["betas"]
        return Plan(
            name=data["name"],
            roles={role: Recipe.from_dict(recipe) for role, recipe in data["roles"].items()},
            betas=(first, second),
            overrides=overrides,
            options=dict(data.get("options", {})),
        )


def applies(pattern: str, name: str, role: str) -> bool:
    """Return whether an override applies to a block: by role, by the block's name, or by its parameter's name."""
    if pattern in ROLES:
        return pattern == role
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition(":")[0], pattern)


def _merged(old: Recipe | Mapping[str, Any], new: Recipe | Mapping[str, Any]) -> Recipe | Mapping[str, Any]:
    """Return an override after another one of the same pattern."""
    if not isinstance(new, Mapping | Recipe):
        return new  # refused later
    theirs, mine = _keys(old), _keys(new)
    rates = {key: value for key, value in {**theirs, **mine}.items() if key in RATES}
    kinds = {key: value for key, value in mine.items() if key not in RATES}
    if mine and not rates:
        return new
    return {**(kinds or {key: value for key, value in theirs.items() if key not in RATES}), **rates}


def _keys(change: Recipe | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a change as a mapping."""
    return {axis: getattr(change, axis) for axis in AXES} if isinstance(change, Recipe) else change


def _wanted(change: Recipe | Mapping[str, Any], axis: str) -> str | None:
    """Return the name of the kind that a change requests on one axis, or None."""
    kind = getattr(change, axis) if isinstance(change, Recipe) else change.get(axis)
    return getattr(kind, "name", kind)


def _kinds_only(change: Recipe | Mapping[str, Any]) -> Recipe | Mapping[str, Any]:
    if isinstance(change, Recipe):
        return change
    return {key: value for key, value in change.items() if key in AXES}
