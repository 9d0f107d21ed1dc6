"""What is known about the weights of a model, as lines of text, and how roles that were found differ from it.

A line names weights and says what is in them::

    *.attn.c_attn.weight         query/8@0:32 key/8@32:32 value@64:32 T
    *.mlp.{gate,up}_proj.weight  mlp
    *.cls_token                  vector or embedding

``*`` is any text, ``*.`` at the start also none, and ``{a,b}`` a choice. ``/8`` is the head size of queries and keys.
``@32:16`` is the part of the outputs that starts at 32 and has 16 entries, and ``@8:8%24`` the entries 8 to 15 of every
24. ``T`` says that the last dimension indexes the outputs, ``flat`` that a weight of three dimensions is one matrix.
Where more than one answer is right, ``or`` separates them. The first line that matches decides. Weights of one
dimension are vectors without a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning_memopt.plans.roles import ROLES

# `router` and others are roles of their own in the truth, whether or not the package knows them yet.
KNOWN = {*ROLES, "linear", "router", "convolution", "lora"}
_PART = re.compile(
    r"(?P<role>[a-z_]+)(/(?P<head>\d+))?(@(?P<start>\d+):(?P<length>\d+)(%(?P<period>\d+))?)?$", re.ASCII
)
# Which dimension holds the outputs has no meaning here, or no effect.
_NO_ORIENTATION = ("vector", "convolution", "other")


@dataclass(frozen=True)
class Fact:
    """One part of a weight: role, head size of queries and keys, and (start, length, period) along the outputs."""

    role: str
    head_dim: int | None = None
    slot: tuple[int, int, int | None] | None = None


@dataclass(frozen=True)
class Answer:
    """One right answer about a weight."""

    parts: tuple[Fact, ...]
    output_dim: int = -2
    flat: bool = False

    def __str__(self) -> str:
        return " ".join([*map(_written, self.parts), *["T"] * (self.output_dim == -1), *["flat"] * self.flat])


@dataclass(frozen=True)
class Line:
    """The weights that a line is about, and what is right about them."""

    names: str
    answers: tuple[Answer, ...]

    def matches(self, name: str) -> bool:
        return pattern(self.names).fullmatch(name) is not None


@cache
def pattern(written: str) -> re.Pattern[str]:
    text = re.escape(written).replace(r"\*", ".*")
    text = re.sub(r"^\.\*\\\.", r"(.*\\.)?", text)
    return re.compile(re.sub(r"\\{(.*?)\\}", lambda found: f"({found[1].replace(',', '|')})", text))


@cache
def parse(text: str) -> tuple[Line, ...]:
    return tuple(_line(line) for line in text.splitlines() if line.strip())


def _line(text: str) -> Line:
    names, rest = text.split(maxsplit=1)
    return Line(names, tuple(_answer(answer.split()) for answer in rest.split(" or ")))


def _answer(words: Sequence[str]) -> Answer:
    parts = tuple(_fact(word) for word in words if word not in ("T", "flat"))
    return Answer(parts, -1 if "T" in words else -2, "flat" in words)


def _fact(word: str) -> Fact:
    found = _PART.match(word)
    assert found, f"{word!r} is not a part"
    assert found["role"] in KNOWN, f"{word!r} has an unknown role"
    numbers = {key: int(value) for key, value in found.groupdict().items() if value is not None and key != "role"}
    slot = (numbers["start"], numbers["length"], numbers.get("period")) if "start" in numbers else None
    return Fact(found["role"], numbers.get("head"), slot)


def _written(fact: Fact) -> str:
    head = f"/{fact.head_dim}" if fact.head_dim else ""
    if fact.slot is None:
        return f"{fact.role}{head}"
    start, length, period = fact.slot
    return f"{fact.role}{head}@{start}:{length}{f'%{period}' if period else ''}"


def found_answer(parts: Sequence[Any], shape: Sequence[int]) -> tuple[Answer, list[str]]:
    """Return what was found in the form of the truth, and errors that this form cannot express."""
    output_dim, errors = parts[0].output_dim, []
    facts = []
    for part in parts:
        slot = part.slot
        if part.output_dim != output_dim:
            errors.append("parts have different orientations")
        if slot is not None and slot.dim != len(shape) + output_dim:
            errors.append(f"{part.role} is cut along dimension {slot.dim}, not along the outputs")
        head_dim = part.head_dim if part.role in ("query", "key") else None
        place = None if slot is None else (slot.start, slot.length, getattr(slot, "period", None))
        facts.append(Fact(part.role, head_dim, place))
    return Answer(tuple(facts), output_dim, parts[0].flatten and len(shape) == 3), errors


def agrees(found: Answer, right: Answer) -> bool:
    """Return whether an answer is right, apart from what has no meaning for its role."""
    if found.parts != right.parts:
        return False
    role = right.parts[0].role
    oriented = found.output_dim == right.output_dim or role in _NO_ORIENTATION
    return oriented and (found.flat == right.flat or role in ("vector", "other"))


def mismatches(lines: Sequence[Line], found: Mapping[str, Sequence[Any]], shapes: Mapping[str, Any]) -> list[str]:
    """Return a line for every weight whose parts are not as they should be."""
    wrong = [f"{name}: no such parameter" for name in found.keys() - shapes.keys()]
    for name, shape in shapes.items():
        if name not in found:
            wrong.append(f"{name} {list(shape)}: not classified")
            continue
        line = line_of(lines, name, shape)
        answer, errors = found_answer(found[name], shape)
        if not any(agrees(answer, right) for right in line.answers):
            errors.append(f"{answer}, but it is {' or '.join(map(str, line.answers))}")
        wrong += [f"{name} {list(shape)}: {error}" for error in errors]
    return wrong


def line_of(lines: Sequence[Line], name: str, shape: Sequence[int]) -> Line:
    """Return the line that decides about a weight.

    Raises:
        LookupError: If it has several dimensions and no line matches, which is an error of the truth.
    """
    line = next((line for line in lines if line.matches(name)), None)
    if line is not None:
        return line
    if len(shape) < 2:
        return Line(name, (Answer((Fact("vector"),)),))
    raise LookupError(f"No line says what {name} {list(shape)} is.")
