"""The documented functions of a folder of Python files, each as a prompt and a body."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests are half of the standard library, and seldom documented.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}


class Function(NamedTuple):
    """A function in two parts, without the indentation of a class around it.

    Attributes:
        prompt: Signature and docstring, with the last newline.
        body: The statements after the docstring, indented, with the last newline.
        path: The file, relative to the folder, with forward slashes.
    """

    prompt: str
    body: str
    path: str


def read_functions(folder: Path) -> list[Function]:
    """Return the functions and methods with a docstring and a body, in the order of paths and lines.

    Of functions with the same prompt, the first one counts, so that no prompt is on both sides of a split. Files that
    are not UTF-8 or not Python of this version are left out, and so are tests, installed packages and hidden files.

    Raises:
        NotADirectoryError: If ``folder`` is not a folder.
        FileNotFoundError: If no function is found.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"`root` must be a folder of Python files, but {str(folder)!r} is not a folder.")
    found: dict[str, Function] = {}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not any(part in SKIPPED_FOLDERS or part.startswith(".") for part in relative.parts):
            for prompt, body in _functions_of(path):
                found.setdefault(prompt, Function(prompt, body, relative.as_posix()))
    if not found:
        raise FileNotFoundError(
            f"{str(folder)!r} has no Python function with a docstring and a body: give another folder as `root`."
        )
    return list(found.values())


def _functions_of(path: Path) -> Iterator[tuple[str, str]]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return
    lines = source.split("\n")  # as the parser counts them; splitlines() would also divide at form feeds
    for node in _definitions(tree.body):
        docstring, statement = node.body[:2]
        end = docstring.end_lineno or 0
        if statement.lineno > end:
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]) + "\n")
            parts = text.split("\n")
            cut = end - node.lineno + 1
            prompt, body = "\n".join(parts[:cut]) + "\n", "\n".join(parts[cut:])
            if _is_function(prompt + body):
                yield prompt, body


def _definitions(statements: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions of a module and the methods of its classes that have a docstring and a body."""
    for node in statements:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _is_documented(node):
            yield node


def _is_documented(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return len(node.body) > 1 and ast.get_docstring(node, clean=False) is not None


def _is_function(text: str) -> bool:
    """Return whether a text is still a function; a string whose lines start further left keeps the indentation."""
    try:
        return len(ast.parse(text).body) == 1
    except SyntaxError:
        return False
