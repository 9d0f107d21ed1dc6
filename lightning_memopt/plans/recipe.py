"""Recipe: the kinds of one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_memopt._registry import Registry, unknown
from lightning_memopt.kinds.base import Kind
from lightning_memopt.kinds.momentum import MOMENTA, Momentum
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS, SecondMoment
from lightning_memopt.plans.rates import OF_GROUPS, OTHER_NAMES, RATES, check_rate
from lightning_memopt.sharding.layout import Layout

AXES: Mapping[str, Registry[Any]] = {"momentum": MOMENTA, "second_moment": SECOND_MOMENTS}


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

        If both kinds average each element's own gradients, the betas bound |U / D| (Cauchy-Schwarz). A norm of U itself
        bounds it, too. Any other direction that mixes elements can be large where the denominator is almost 0.
        """
        alone = self.momentum.elementwise and self.second_moment.elementwise
        divides = self.second_moment.normalizes or self.momentum.averages_squares
        return divides and not alone and not self.second_moment.of_direction

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
            for axis in AXES
        }
        recipe, options = Recipe(**kinds), {key: value for key, value in change.items() if key not in AXES}
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
        return {axis: kind_to_dict(getattr(self, axis)) for axis in AXES}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from the result of :meth:`to_dict`."""
        return Recipe(**{axis: kind_from_dict(axis, data[axis]) for axis in AXES})


def known_options() -> list[str]:
    """Return the names of all options of all registered kinds."""
    options = {option for table in AXES.values() for name in table.names() for option in table.get(name).options()}
    return sorted(options)


def check_change(change: Any, override: str | None = None) -> None:
    """Check that a change names only known kinds and options, and an override also valid rates.

    Args:
        change: The change.
        override: The override that it belongs to, for messages; None for a change of a recipe, which has no rates.

    Raises:
        TypeError: If it is not a mapping, or a rate is not a number.
        ValueError: If a name is unknown, or a rate out of range. The message lists the names that exist.
    """
    if not isinstance(change, Mapping):
        what = "A change" if override is None else override[:1].upper() + override[1:]
        raise TypeError(
            f"{what} must be a Recipe or a mapping such as {{'momentum': 'low_rank', 'rank': 8}}, got {change!r}."
        )
    where = "" if override is None else f"In {override}: "
    for key, value in change.items():
        if key in AXES:
            with located(override):
                _kind(key, value)
        elif key in RATES:
            if override is None:
                raise ValueError(
                    f"{key!r} is a rate of blocks, not a part of a recipe: set it in `overrides`, as in "
                    f"overrides={{'vector': {{{key!r}: {value!r}}}}}."
                )
            check_rate(key, value, override)
        elif key not in known_options():
            rates = RATES if override is not None else ()
            if key in OF_GROUPS:
                raise ValueError(f"{where}{key!r} differs by parameter group only: give these weights a group.")
            if override is not None and key in OTHER_NAMES:
                raise ValueError(f"{where}Unknown option {key!r}. Did you mean {OTHER_NAMES[key]!r}?")
            raise ValueError(where + unknown("option", key, [*AXES, *rates, *known_options()]))


@contextmanager
def located(where: str | None) -> Iterator[None]:
    """Let errors in the body say where they come from, if that is known."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if where is None:
            raise
        raise type(error)(f"In {where}: {error}") from error


def kind_to_dict(kind: Any) -> dict[str, Any]:
    """Return a kind as strings and numbers."""
    return {"kind": kind.name, **asdict(kind)}


def kind_from_dict(axis: str, data: Mapping[str, Any]) -> Any:
    """Return the kind from the result of :func:`kind_to_dict`."""
    options = dict(data)
    return AXES[axis].get(options.pop("kind"))(**options)


def _kind(axis: str, value: Any) -> Any:
    """Return a kind, built with its defaults if ``value`` is a name."""
    if isinstance(value, Kind):
        return value
    return AXES[axis].get(value)()
