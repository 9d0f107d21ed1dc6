"""Break the body of a function: the worse answer of a preference pair."""

from __future__ import annotations

import io
import keyword
import random
import tokenize
from collections.abc import Iterator

# Each is valid wherever the other one is, so most bodies still parse and differ in what they compute.
OPERATORS = {
    "+": "-", "-": "+", "+=": "-=", "-=": "+=", "==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">",
    "and": "or", "or": "and", "True": "False", "False": "True",
}  # fmt: skip


def corrupt(body: str, seed: int) -> str | None:
    """Return a body with one fault, the same one for the same arguments.

    The fault is one of three, chosen at random among those that change this body: two lines change places, an operator
    becomes its opposite, or a name becomes another name of the body.

    Args:
        body: The statements of a function, indented.
        seed: Of the choice.

    Returns:
        A body that differs from the given one, or None if none of the three changes it (``pass``).
    """
    generator = random.Random(seed)
    ways = [_swap_lines, _swap_operator, _swap_name]
    generator.shuffle(ways)
    for way in ways:
        choices = [text for text in way(body, generator) if text != body]
        if choices:
            return generator.choice(choices)
    return None


def _swap_lines(body: str, generator: random.Random) -> Iterator[str]:
    """Yield the body with a random pair of different lines exchanged."""
    lines = body.split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    pairs = [(i, j) for i in filled for j in filled if i < j and lines[i] != lines[j]]
    if pairs:
        i, j = generator.choice(pairs)
        lines[i], lines[j] = lines[j], lines[i]
        yield "\n".join(lines)


def _swap_operator(body: str, generator: random.Random) -> Iterator[str]:
    """Yield the body with each of its operators replaced."""
    for token in _tokens(body):
        if token.type in (tokenize.OP, tokenize.NAME) and token.string in OPERATORS:
            yield _replace(body, token, OPERATORS[token.string])


def _swap_name(body: str, generator: random.Random) -> Iterator[str]:
    """Yield the body with each of its names replaced by a random other one."""
    names = [token for token in _tokens(body) if token.type == tokenize.NAME and not keyword.iskeyword(token.string)]
    different = sorted({token.string for token in names})
    for token in names:
        others = [name for name in different if name != token.string]
        if others:
            yield _replace(body, token, generator.choice(others))


def _tokens(body: str) -> list[tokenize.TokenInfo]:
    """Return the tokens of a body, or those before an error; their rows count the line above the body."""
    found: list[tokenize.TokenInfo] = []
    try:
        found.extend(tokenize.generate_tokens(io.StringIO("def f():\n" + body).readline))
    except (tokenize.TokenError, IndentationError):
        return []
    return [token for token in found if token.start[0] > 1]


def _replace(body: str, token: tokenize.TokenInfo, text: str) -> str:
    lines = body.split("\n")
    row, (start, end) = token.start[0] - 2, (token.start[1], token.end[1])
    lines[row] = lines[row][:start] + text + lines[row][end:]
    return "\n".join(lines)
