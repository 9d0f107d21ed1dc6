"""Print docs/options.md, every argument of what users construct: ``python docs/options.py > docs/options.md``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from docstrings import Argument, arguments, code, summary, table, text_of  # noqa: E402

import lightning_memopt as lm  # noqa: E402
from lightning_memopt._registry import Registry  # noqa: E402
from lightning_memopt.kinds.base import Kind  # noqa: E402
from lightning_memopt.optim.classes import RecipeOptimizer  # noqa: E402
from lightning_memopt.plans.rates import BlockRates  # noqa: E402
from lightning_memopt.plans.recipe import known_options  # noqa: E402
from lightning_memopt.plans.roles import ROLES  # noqa: E402

INTRO = """# All options

`python docs/options.py` generates this page from the sources; a test checks that it is up to date.

Every argument of the optimizers, the strategy, the callbacks and the planner, with its type, its default, and what its
docstring says. An ellipsis (…) stands for more in the reference, to which every section links. In a config of the
command line, arguments are keys under `init_args`; `params` of an optimizer comes from the module.
"""
OF_KINDS = """are options of kinds: None leaves each kind the recipe's value, or else its own default.
"""
CLASSES = """## Classes of recipes

Each takes the arguments of `MemOpt`, except `recipe`. [choosing.md](choosing.md) says which one is for what,
[recipes.md](recipes.md) which kinds they give to which role.
"""
MOMENTUM = """
## Options of momentum kinds

As an argument of the optimizer, an option is for all blocks. As a key of a [parameter group](groups.md) or of
`overrides`, it is for some. [methods.md](methods.md) has the formulas, the [reference](reference/kinds.rst) the rest.
"""
RATES = """
## Rates in overrides

Besides kinds and their options, an override takes [rates](groups.md#rates-by-role):
"""
HEADER = ("argument", "type", "default", "what it means")
# Sections after those of optimizers and kinds: what has arguments → the page about it, and its page of the reference.
OTHERS: Mapping[str, tuple[str, str]] = {
    "WarmupSchedule": ("command_line.md", "optimizers"),
    "MemOptFSDPStrategy": ("strategy.md", "strategy"),
    "MemOptFabricStrategy": ("strategy.md", "strategy"),
    "AdaptiveMomentum": ("adaptive.md", "strategy"),
    "OptimizerMemoryMonitor": ("memory.md", "strategy"),
    "BindNames": ("groups.md", "strategy"),
    "MemOptCLI": ("command_line.md", "strategy"),
    "plan_memory": ("memory.md", "memory"),
}


def recipe_classes() -> list[type[RecipeOptimizer]]:
    """Return the public class of every recipe that has one, in the order of the recipes."""
    public = [thing for name in lm.__all__ if isinstance(thing := getattr(lm, name), type)]
    classes = [thing for thing in public if issubclass(thing, RecipeOptimizer)]
    return sorted(classes, key=lambda each: lm.recipe_names().index(each._recipe))


def defaults_table() -> str:
    """Return the table of what the recipe of every class sets: betas, and options that are not the kind's default."""
    rows = []
    for each in recipe_classes():
        plan = lm.load_plan(each._recipe)
        roles: dict[str, list[str]] = {}
        for role in ROLES:
            differing = dict(option for kind in _kinds(plan.roles[role]) for option in _changed(kind))
            if differing:
                text = ", ".join(f"{code(name)} {text_of(value)}" for name, value in differing.items())
                roles.setdefault(text, []).append(role)
        cell = "; ".join(f"{', '.join(named)}: {text}" for text, named in roles.items())
        rows.append((code(each.__name__), code(each._recipe), str(plan.betas), cell))
    return table(("class", "recipe", "`betas`", "options of kinds that differ from the kinds' defaults"), rows)


def _kinds(recipe: lm.Recipe) -> tuple[Kind, Kind]:
    return recipe.momentum, recipe.second_moment


def _changed(kind: Kind) -> Iterator[tuple[str, Any]]:
    """Yield the options of a kind that are not its defaults, with their values."""
    default = type(kind)()
    for name in kind.options():
        if getattr(kind, name) != getattr(default, name):
            yield name, getattr(kind, name)


def own_arguments() -> str:
    """Return the table of the arguments that only some classes of recipes have."""
    common = set(inspect.signature(RecipeOptimizer).parameters)
    rows = [
        (code(each.__name__), *argument.cells)
        for each in recipe_classes()
        for argument in arguments(each, leave_out=common)
    ]
    return table(("class", *HEADER), rows)


def kind_table(kinds: Registry[Any]) -> str:
    """Return the table of the options of all kinds of an axis."""
    rows = []
    for name in kinds.names():
        kind = kinds.get(name)
        found = [argument for argument in arguments(kind) if argument.name in kind.options()]
        rows += [(code(name), *argument.cells) for argument in found] or [(code(name), "none", "", "", "")]
    return table(("kind", "option", *HEADER[1:]), rows)


def argument_table(found: list[Argument]) -> str:
    """Return a table of arguments."""
    return table(HEADER, [argument.cells for argument in found])


def page() -> Iterator[str]:
    """Yield the parts of the page."""
    yield INTRO
    yield "## MemOpt\n"
    yield f"{summary(lm.MemOpt)}\n[Reference](reference/optimizers.rst).\n"
    found = arguments(lm.MemOpt)
    yield argument_table(found)
    of_kinds = [code(argument.name) for argument in found if argument.name in known_options()]
    yield f"\n{', '.join(of_kinds[:-1])} and {of_kinds[-1]}\n{OF_KINDS}"
    yield CLASSES
    yield defaults_table()
    yield "\nSome have arguments of their own:\n"
    yield own_arguments()
    yield MOMENTUM
    yield kind_table(lm.MOMENTA)
    yield "\n## Options of second-moment kinds\n"
    yield kind_table(lm.SECOND_MOMENTS)
    yield RATES
    yield argument_table(arguments(BlockRates))
    for name, (about, reference) in OTHERS.items():
        thing = getattr(lm, name)
        yield f"\n## {name}\n"
        yield f"{summary(thing)}\nMore in [{about}]({about}) and in the [reference](reference/{reference}.rst).\n"
        found = arguments(thing)
        yield argument_table(found) if found else "It takes no arguments."


if __name__ == "__main__":
    print("\n".join(page()))
