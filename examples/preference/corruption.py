"""Break the body of a function: the worse answer of a preference pair."""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import random
import tokenize
import warnings
from collections.abc import Iterator
from typing import TypeVar

from examples.sft.functions import NOT_PYTHON

T = TypeVar("T")


# Each is valid wherever the other one is, so most bodies still parse and differ in what they compute.
OPERATORS = {
    "+": "-", "-": "+", "+=": "-=", "-=": "+=", "==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">",
    "and": "or", "or": "and", "True": "False", "False": "True",
}  # fmt: skip


TRIES = 100  # of one kind; each parses the body


def corrupt(body: str, seed: int) -> str | None:
    """Return a body with one fault, the same one for the same arguments.

    The fault is one of three, chosen at random among those that change this body: two lines change places, an operator
    becomes its opposite, or a name becomes another name of the body. Where a change leaves the same program, as that of
    two comments does, another one is tried.

    Args:
        body: The statements of a function, indented.
        seed: Of the choice.

    Returns:
        A body of another program, or None if the three do not make one (``pass``).
    """
    generator = random.Random(seed)
    ways = [_swap_lines, _swap_operator, _swap_name]
    generator.shuffle(ways)
    program = _program(body)
    changed = (worse for way in ways for worse in itertools.islice(way(body, generator), TRIES))
    return next((worse for worse in changed if _program(worse) != program), None)


def _swap_lines(body: str, generator: random.Random) -> Iterator[str]:
    """Yield the body with each pair of different lines exchanged, in random order."""
    lines = body.split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    pairs = [(i, j) for i in filled for j in filled if i < j and lines[i] != lines[j]]
    for i, j in _in_random_order(pairs, generator):
        changed = list(lines)
        changed[i], changed[j] = lines[j], lines[i]
        yield "\n".join(changed)


def _swap_operator(body: str, generator: random.Random) -> Iterator[str]:
    """Yield the body with each of its operators replaced, in random order."""
    operators = [
        token for token in _tokens(body) if token.type in (tokenize.OP, tokenize.NAME) and token.string in OPERATORS
    ]
    for token in _in_random_order(operators, generator):
        yield _replace(body, token, OPERATORS[token.string])


def _swap_name(body: str, generator: random.Random) -> Iterator[str]:
    """Yield the body with each of its names replaced by a random other one, in random order."""
    names = [token for token in _tokens(body) if token.type == tokenize.NAME and not keyword.iskeyword(token.string)]
    different = sorted({token.string for token in names})
    if len(different) < 2:
        return
    changes = [(token, generator.choice([name for name in different if name != token.string])) for token in names]
    for token, name in _in_random_order(changes, generator):
        yield _replace(body, token, name)


def _in_random_order(items: list[T], generator: random.Random) -> Iterator[T]:
    while items:
        yield items.pop(generator.randrange(len(items)))


def _program(body: str) -> str:
    """Return what Python makes of a body, without comments and white space, or the body if it is not Python."""
    with warnings.catch_warnings(action="ignore"):  # other people's code may have invalid escapes
        try:
            return ast.dump(ast.parse(f"async def f():\n{body}"))
        except NOT_PYTHON:
            return body


def _tokens(body: str) -> list[tokenize.TokenInfo]:
    """Return the tokens of a body, none if it has an error; their rows count the line above the body."""
    try:
        found = list(tokenize.generate_tokens(io.StringIO("def f():\n" + body).readline))
    except (tokenize.TokenError, IndentationError):
        return []
    return [token for token in found if token.start[0] > 1]


def _replace(body: str, token: tokenize.TokenInfo, text: str) -> str:
    lines = body.split("\n")
    row, (start, end) = token.start[0] - 2, (token.start[1], token.end[1])
    lines[row] = lines[row][:start] + text + lines[row][end:]
    return "\n".join(lines)
