"""What docstrings say of arguments, for the pages that are generated: types, defaults, and a line each."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

import docstring_parser
from docstring_parser import DocstringStyle

LENGTH = 250  # of a line; sentences beyond it are left to the reference

ASTERISKS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class Argument:
    """An argument of a class or function.

    Attributes:
        name: Its name, with the asterisks of one that stands for several.
        annotation: Its type.
        default: Its default; ``inspect.Parameter.empty`` if it has none.
        meaning: What the docstring says of it, as reStructuredText.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, type, default and meaning, as cells of a Markdown table."""
        required = "" if self.name.startswith("*") else "required"
        default = required if self.default is inspect.Parameter.empty else code(text_of(self.default))
        return code(self.name), type_text(self.annotation), default, line(self.meaning)


def arguments(thing: Callable[..., Any], *, leave_out: Iterable[str] = ()) -> list[Argument]:
    """Return the arguments of a class or function.

    Args:
        thing: The class or function.
        leave_out: Names of arguments that are not wanted.

    Raises:
        ValueError: If neither its docstring nor that of a base class says what an argument means.
    """
    said = meanings(thing)
    found = []
    for parameter in inspect.signature(thing, eval_str=True).parameters.values():
        if parameter.name in leave_out:
            continue
        if not said.get(parameter.name):
            raise ValueError(
                f"The docstring of {thing.__name__} does not say what `{parameter.name}` means: add a line to its "
                "section Args (Attributes for a kind), or to that of a base class."
            )
        name = ASTERISKS.get(parameter.kind, "") + parameter.name
        found.append(Argument(name, parameter.annotation, parameter.default, said[parameter.name]))
    return found


def meanings(thing: Callable[..., Any]) -> dict[str, str]:
    """Return what docstrings say of arguments, where that of a class goes before those of its base classes."""
    family = reversed(inspect.getmro(thing)) if isinstance(thing, type) else [thing]
    parsed = [docstring_parser.parse(each.__doc__ or "", style=DocstringStyle.GOOGLE) for each in family]
    return {entry.arg_name.lstrip("*"): entry.description or "" for each in parsed for entry in each.params}


def bullets(thing: Any) -> dict[str, str]:
    """Return what the lists in a docstring say of names: lines such as ``- ``name``: Meaning.``."""
    text = inspect.getdoc(thing) or ""
    found = re.findall(r"^( *)- ``([^`]+)``: (.*(?:\n\1  \S.*)*)", text, flags=re.MULTILINE)
    return {name: meaning for _, name, meaning in found}


def summary(thing: Any) -> str:
    """Return the first line of a docstring, as Markdown."""
    return markdown((inspect.getdoc(thing) or "").partition("\n")[0])


def line(text: str) -> str:
    """Return as many sentences as fit on a line, as a cell of a Markdown table; an ellipsis stands for the others."""
    first, *others = re.split(r"(?<=[.])\s+(?=[A-Z`Θ-ω])", re.sub(r"\s+", " ", text).strip())
    while others and len(first) + 1 + len(others[0]) <= LENGTH:
        first += " " + others.pop(0)
    return cell(markdown(first) + " …" * bool(others))


def markdown(text: str) -> str:
    """Return a docstring's reStructuredText as Markdown."""
    return re.sub(r":\w+:`[~.]?(?:\w+\.)*(\w+)`", r"`\1`", text.replace("``", "`"))


def cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return text.replace("|", r"\|")


def code(text: str) -> str:
    """Return a text as code in a cell of a Markdown table."""
    return f"`{cell(text)}`"


def type_text(annotation: Any) -> str:
    """Return a type as Markdown, with its modules left out and its alternatives side by side."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(type_text, get_args(annotation)))
    if annotation is type(None):
        return "None"
    return code(re.sub(r"(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(annotation)))


def text_of(value: Any) -> str:
    """Return a default as Python or YAML would have it."""
    if isinstance(value, str):
        return json.dumps(value)
    return re.sub(r"^(?:\w+\.)+(?=[A-Za-z])", "", repr(value))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
