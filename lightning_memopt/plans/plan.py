"""Recipe (the kinds of one block) and Plan (the recipe of every block)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_memopt._registry import Registry, unknown
from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import MOMENTA, Momentum
from lightning_memopt.kinds.ranges import check_betas
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS, SecondMoment
from lightning_memopt.plans.roles import ROLES
from lightning_memopt.sharding.layout import Layout

# Roles that a plan need not have: earlier versions called them `other`.
_FORMERLY_OTHER = ("linear", "convolution", "router", "lora")
_AXES: Mapping[str, Registry[Any]] = {"momentum": MOMENTA, "second_moment": SECOND_MOMENTS}


@dataclass(frozen=True)
class Recipe:
    """A momentum kind and a second-moment kind. A name in place of a kind means the kind with its defaults."""

    momentum: Momentum
    second_moment: SecondMoment

    def __init__(self, momentum: Momentum | str, second_moment: SecondMoment | str) -> None:
        object.__setattr__(self, "momentum", _kind("momentum", momentum))
        object.__setattr__(self, "second_moment", _kind("second_moment", second_moment))

    def resolve(self, layout: Layout) -> Recipe:
        """Return the recipe for one block, with numbers in place of fractional ranks."""
        return Recipe(self.momentum.resolve(layout), self.second_moment.resolve(layout))

    @property
    def needs_matrix(self) -> bool:
        """Whether the recipe is undefined on vectors."""
        return self.momentum.needs_matrix or self.second_moment.needs_matrix

    @property
    def bounded(self) -> bool:
        """Whether ``max_update`` bounds |U / D|: if it has no unit and the kinds do not bound it themselves.

        If both kinds average each element's own gradients, the betas bound |U / D| (Cauchy-Schwarz). A direction that
        mixes elements can be large where the denominator is almost 0.
        """
        alone = self.momentum.elementwise and self.second_moment.elementwise
        return self.second_moment.normalizes and not alone

    def options(self) -> set[str]:
        """Return the names of the options of both kinds."""
        return {*self.momentum.options(), *self.second_moment.options()}

    def with_options(self, options: Mapping[str, Any]) -> Recipe:
        """Return the recipe with those of ``options`` that its kinds have."""

        def changed(kind: Kind) -> Any:
            own = {key: options[key] for key in kind.options() if key in options}
            return replace(kind, **own) if own else kind  # a kind has been checked when it was created

        return Recipe(changed(self.momentum), changed(self.second_moment))

    def changed(self, change: Recipe | Mapping[str, Any]) -> Recipe:
        """Return the recipe after a change: a whole recipe, or kinds and options by name.

        Raises:
            ValueError: If a kind or option is unknown, or neither resulting kind has the option.
        """
        if isinstance(change, Recipe):
            return change
        check_change(change)
        kinds = {
            axis: getattr(self, axis)
            if change.get(axis, current := getattr(self, axis).name) == current
            else _kind(axis, change[axis])
            for axis in _AXES
        }
        recipe, options = Recipe(**kinds), {key: value for key, value in change.items() if key not in _AXES}
        for key in options:
            if key not in recipe.options():
                raise ValueError(
                    f"Option {key!r} has no effect with momentum {recipe.momentum.name!r} and second moment "
                    f"{recipe.second_moment.name!r}; available options: "
                    f"{', '.join(sorted(recipe.options())) or 'none'}."
                )
        return recipe.with_options(options)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as strings and numbers, for :meth:`from_dict`."""
        return {axis: {"kind": getattr(self, axis).name, **asdict(getattr(self, axis))} for axis in _AXES}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from the result of :meth:`to_dict`."""
        kinds = {}
        for axis, registry in _AXES.items():
            options = dict(data[axis])
            kinds[axis] = registry.get(options.pop("kind"))(**options)
        return Recipe(**kinds)


@dataclass(frozen=True)
class Plan:
    """The recipe of every block.

    Attributes:
        name: A name for messages and checkpoints.
        roles: The recipe of every role. Without one, ``linear``, ``convolution``, ``router`` and ``lora`` get that of
            ``other``.
        betas: The default decay rates.
        overrides: Changes by role or by name pattern, applied in order. Patterns use ``*`` and ``?`` as in a shell and
            match the name of a block or of its parameter.
        options: Options for every kind that has them. Overrides take precedence.
    """

    name: str
    roles: Mapping[str, Recipe]
    betas: tuple[float, float] = (0.9, 0.999)
    overrides: Mapping[str, Recipe | Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

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
        for change in self.overrides.values():
            if not isinstance(change, Recipe):
                check_change(change)
        self._check_options()

    def _check_options(self) -> None:
        """Refuse options that are unknown or have no effect in the plan."""
        roles = list({id(recipe): recipe for recipe in self.roles.values()}.values())  # most roles share one
        recipes = list(roles)
        for change in self.overrides.values():
            found = [recipe.changed(_kinds_only(change)) for recipe in roles]
            if not isinstance(change, Recipe):  # check its options here, not only when a block uses them
                found = [recipe.with_options(change) for recipe in found]
            recipes += found
        for key in self.options:
            if key not in known_options():
                raise ValueError(unknown("option", key, known_options()))
            if not any(key in recipe.options() for recipe in recipes):
                owners = [f"{axis} {name!r}" for axis, table in _AXES.items() for name in table.names()
                          if key in table.get(name).options()]  # fmt: skip
                raise ValueError(
                    f"Option {key!r} has no effect in the recipe {self.name!r}: it belongs to {' and '.join(owners)}, "
                    "which no role has. Leave it out, or choose such a kind with `overrides`."
                )
        for recipe in recipes:
            recipe.with_options(self.options)

    def updated(self, *, overrides: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> Plan:
        """Return the plan with more overrides and options."""
        if overrides is not None and not isinstance(overrides, Mapping):
            raise TypeError(f"`overrides` must map roles or name patterns to changes, got {overrides!r}.")
        given = {key: value for key, value in (options or {}).items() if value is not None}
        return replace(self, overrides={**self.overrides, **(overrides or {})}, options={**self.options, **given})

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
                change = self._with_templates(change, recipe)
                new = recipe.changed(_kinds_only(change)).with_options(self.options).with_options(change)
            if role != "vector" or pattern == "vector" or not new.needs_matrix:
                recipe = new
        return recipe

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
        kind = self._elsewhere(axis, name) or _AXES[axis].get(name)()
        return replace(kind, **{key: value for key, value in self.options.items() if key in kind.options()})

    def _elsewhere(self, axis: str, name: str | None) -> Any:
        """Return the kind of this name from the first role that has it."""
        kinds = (getattr(entry, axis) for entry in self.roles.values())
        return next((kind for kind in kinds if kind.name == name), None)

    def _with_templates(self, change: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
        """Replace the name of a kind that ``recipe`` does not have by that kind as used elsewhere in the plan."""
        found = dict(change)
        for axis in _AXES:
            if change.get(axis) != getattr(recipe, axis).name:
                found[axis] = self._elsewhere(axis, change.get(axis)) or change.get(axis)
        return {key: value for key, value in found.items() if value is not None}

    def check_overrides(self, blocks: Iterable[tuple[str, str, Recipe]]) -> None:
        """Refuse overrides that change nothing.

        Args:
            blocks: Name, role and final recipe of every block.

        Raises:
            ValueError: The message names the pattern and what it could have matched, or the option that no block has.
        """
        blocks = list(blocks)
        for pattern, change in self.overrides.items():
            matched = [recipe for name, role, recipe in blocks if applies(pattern, name, role)]
            if not matched:
                names = [name for name, _, _ in blocks]
                raise ValueError(
                    f"The override {pattern!r} matches nothing. Roles here: "
                    f"{', '.join(sorted({role for _, role, _ in blocks}))}; blocks: "
                    f"{', '.join(names[:3])}{f', ... ({len(names)} in all)' if len(names) > 3 else ''}. "
                    "Patterns are matched against the whole name: start with '*' to match the end of it."
                )
            for axis in _AXES:
                wanted = _wanted(change, axis)
                if wanted is not None and not any(getattr(recipe, axis).name == wanted for recipe in matched):
                    raise ValueError(
                        f"The override {pattern!r} requests {axis} {wanted!r}, but none of the blocks it matches gets "
                        "it: all are vectors, on which it is undefined, or a later override takes precedence."
                    )
            options = [] if isinstance(change, Recipe) else [key for key in change if key not in _AXES]
            for key in options:
                if not any(key in recipe.options() for recipe in matched):
                    kinds = sorted({f"{recipe.momentum.name} × {recipe.second_moment.name}" for recipe in matched})
                    raise ValueError(
                        f"The override {pattern!r} sets {key!r}, which has no effect on the blocks it matches: they "
                        f"have {', '.join(kinds)}. Choose another kind for them as well."
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as mappings, strings and numbers, for :meth:`from_dict`."""
        overrides = {
            pattern: change.to_dict() if isinstance(change, Recipe) else dict(change)
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
        overrides = {
            pattern: Recipe.from_dict(change) if isinstance(change.get("momentum"), Mapping) else change
            for pattern, change in data.get("overrides", {}).items()
        }
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


def known_options() -> list[str]:
    """Return the names of all options of all registered kinds."""
    options = {option for table in _AXES.values() for name in table.names() for option in table.get(name).options()}
    return sorted(options)


def check_change(change: Any) -> None:
    """Check that a change names only known kinds and options.

    Raises:
        TypeError: If it is not a mapping.
        ValueError: If a name is unknown. The message lists those that exist.
    """
    if not isinstance(change, Mapping):
        raise TypeError(
            f"A change must be a Recipe or a mapping such as {{'momentum': 'low_rank', 'rank': 8}}, got {change!r}."
        )
    for key, value in change.items():
        if key in _AXES:
            _kind(key, value)
        elif key not in known_options():
            raise ValueError(unknown("option", key, [*_AXES, *known_options()]))


def _wanted(change: Recipe | Mapping[str, Any], axis: str) -> str | None:
    """Return the name of the kind that a change requests on one axis, or None."""
    kind = getattr(change, axis) if isinstance(change, Recipe) else change.get(axis)
    return getattr(kind, "name", kind)


def _kinds_only(change: Recipe | Mapping[str, Any]) -> Recipe | Mapping[str, Any]:
    if isinstance(change, Recipe):
        return change
    return {key: value for key, value in change.items() if key in _AXES}


def _kind(axis: str, value: Any) -> Any:
    """Return a kind, built with its defaults if ``value`` is a name."""
    if isinstance(value, Kind):
        return value
    return _AXES[axis].get(value)()
