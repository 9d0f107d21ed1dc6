"""Reads recipe files: YAML without references to anything outside of the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> Mapping[str, Any]:
    """Return the content of a recipe file.

    Raises:
        FileNotFoundError: If there is none.
        ImportError: If OmegaConf is missing.
        TypeError: If it holds something else than a mapping.
        ValueError: If it is empty, not YAML, or calls a resolver.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe file {str(path)!r} (working directory: {os.getcwd()}).")
    try:
        import yaml
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ImportError(
            f"Reading the recipe file {str(path)!r} needs omegaconf: pip install 'lightning-memopt[cli]'."
        ) from error
    try:
        data = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe file {str(path)!r} is not valid YAML{_place(path, error)}") from error
    if not OmegaConf.is_dict(data):
        found = type(OmegaConf.to_container(data)).__name__
        raise TypeError(f"The recipe file {str(path)!r} must contain a mapping, found {found}.")
    if not data:
        raise ValueError(f"The recipe file {str(path)!r} is empty: give at least a `base` or `roles`.")
    return {str(key): value for key, value in plain(data, f"the recipe file {str(path)!r}").items()}


def _place(path: Path, error: Any) -> str:
    """Return where YAML fails and why, with a way out for patterns, which begin like YAML's references to values."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f": {error}"
    line = (path.read_text().splitlines() + [""])[mark.line].strip()
    quotes = " Put a pattern in quotes, as in '*.bias': {weight_decay: 0}." if "*" in line else ""
    return f", line {mark.line + 1} ({line or 'its end'}): {error.problem}.{quotes}"


def plain(data: Any, where: str) -> Mapping[str, Any]:
    """Return a mapping without OmegaConf's types, with references to other values resolved.

    Resolvers are refused. Their results, such as a secret from the environment, would be stored in every checkpoint,
    and the same file would have another meaning on another machine. Left unresolved, ``${oc.env:RANK}`` is never a
    useful number or name.

    Raises:
        ValueError: If a value calls a resolver.
    """
    omegaconf = sys.modules.get("omegaconf")  # if it is not imported, its types cannot occur
    if omegaconf is None or not omegaconf.OmegaConf.is_config(data):
        return data
    for text in _texts(omegaconf.OmegaConf.to_container(data, resolve=False)):
        if _calls_resolver(text):
            raise ValueError(
                f"In {where}: {text!r} calls a resolver, whose result would be stored in every checkpoint. Write the "
                "value itself, or refer to another value of the file, as in '${roles.mlp.rank}'."
            )
    return omegaconf.OmegaConf.to_container(data, resolve=True)


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a container, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in (*value.keys(), *value.values()):
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _calls_resolver(text: str) -> bool:
    """Return whether an interpolation has a colon. ``${name:...}`` calls, ``${name}`` refers; both can be nested."""
    depth = 0
    for position, character in enumerate(text):
        if text.startswith("${", position):
            depth += 1
        elif depth and character == "}":
            depth -= 1
        elif depth and character == ":":
            return True
    return False
