"""What a user of overrides may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning_memopt._registry import listed, nearest
from lightning_memopt.plans.rates import RATES
from lightning_memopt.plans.recipe import AXES, Recipe, known_options
from lightning_memopt.plans.roles import ROLES

# Names for what is a `vector`.
_VECTORS = ("norm", "norms", "bias", "biases", "layernorm")


def check_form(overrides: Any) -> None:
    """Check that overrides map roles or patterns to changes, and are not a change themselves.

    Raises:
        TypeError: If they are. The message shows the form.
    """
    if not isinstance(overrides, Mapping):
        raise TypeError(f"`overrides` must map roles or name patterns to changes, got {overrides!r}.")
    for key, value in overrides.items():
        if not isinstance(key, str):
            raise TypeError(
                f"`overrides` must map roles or name patterns to changes, got a key of type {type(key).__name__}: give "
                "the weight's name, as in overrides={'*.q_proj.weight': {'rank': 8}}."
            )
        if key in (*AXES, *RATES, *known_options()) and not isinstance(value, Mapping | Recipe):
            raise TypeError(
                f"`overrides` must map roles or name patterns to changes, got {key!r} with {value!r}: name the blocks "
                f"first, as in overrides={{'embedding': {{{key!r}: {value!r}}}}}."
            )


def meant(pattern: str, names: Sequence[str]) -> str:
    """Return a hint at the role or pattern that a pattern may mean, if it matches none of the names."""
    if pattern in ROLES:
        return ""
    close = difflib.get_close_matches(pattern.lower(), [*ROLES, *_VECTORS], n=1)
    role = "vector" if close and close[0] in _VECTORS else next(iter(close), None)
    if role is not None:
        return f" Did you mean {role!r}?"
    # A part of a name, or a regular expression.
    for shell in (f"*{pattern}*", pattern.replace("\\", "").replace(".*", "*").strip("^$")):
        if any(fnmatchcase(name, shell) for name in names):
            return f" Did you mean {shell!r}?"
    return ""


def unknown_block(key: str, names: Sequence[str]) -> str:
    """Return the message for what is no block, no role here, and no pattern that matches one."""
    return f"Unknown block {key!r}.{nearest(key, names) or meant(key, names)} Blocks: {listed(names)}."
