"""Tasks and answers from Python source code: a function's signature and docstring, and its body.

Fine-tuning shows them as a chat, and `examples.preference` as the code that they come from.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.pretrain.texts import Texts

# What `ast.parse` raises for text that is not Python: ValueError for null bytes, the last two for deep nesting.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


class Pair(NamedTuple):
    """A task and the answer that a model learns to give.

    Attributes:
        task: The head of a function: its signature and its docstring.
        answer: The function's body, moved to the left margin.
    """

    task: str
    answer: str

    @property
    def prompt(self) -> str:
        """The task with its last newline, so that ``prompt + body`` is the function."""
        return f"{self.task}\n"

    @property
    def body(self) -> str:
        """The answer as it stands in the function: with the indentation of the docstring and the last newline."""
        function: Any = _parsed(self.task).body[0]
        docstring = function.body[0]
        margin = self.task.split("\n")[docstring.lineno - 1][: docstring.col_offset]
        # textwrap.indent would also indent what follows a form feed.
        return re.sub(r"^(?=.)", margin, self.answer, flags=re.MULTILINE) + "\n"


def pairs_of(source: str) -> list[Pair]:
    """Return a pair for every function with a docstring and a body after it, in the order of their lines.

    Decorators are left out. So are functions whose body begins in the line of the docstring, and those whose strings
    have lines that are indented less than the code, because such code cannot be moved to the left margin.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")  # as Python counts lines
    try:
        tree = _parsed(source)
    except NOT_PYTHON:
        return []
    lines = source.split("\n")
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        head_end = node.body[0].end_lineno
        if len(node.body) < 2 or node.body[1].lineno == head_end:
            continue
        task = textwrap.dedent("\n".join(lines[node.lineno - 1 : head_end]))
        answer = textwrap.dedent("\n".join(lines[head_end : node.end_lineno])).strip("\n")
        if parses(task, answer):
            found.append((node.lineno, Pair(task, answer)))
    return [pair for _, pair in sorted(found)]


def parses(task: str, answer: str) -> bool:
    """Return whether a task with its answer is a function, as `check_function` says."""
    pair = Pair(task, answer)
    try:
        check_function(pair.prompt + pair.body)
    except NOT_PYTHON:
        return False
    return True


def check_function(source: str) -> None:
    """Check that a text is one function with at least one statement after its docstring.

    Args:
        source: Signature, docstring and body.

    Raises:
        SyntaxError: If it is not. ``lineno`` is the line of the fault, or None where the parser names none.
    """
    try:
        statements = _parsed(source).body
    except SyntaxError:
        raise
    except NOT_PYTHON as error:
        raise SyntaxError(str(error)) from error
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef | ast.AsyncFunctionDef):
        raise SyntaxError("not a function alone")
    if len(statements[0].body) < 2:
        raise SyntaxError("a function without a statement after its docstring")


def read_pairs(texts: Texts, cache_dir: Path) -> dict[str, list[Pair]]:
    """Return the pairs of the files per split, from the cache if it holds them.

    Files are split as for pretraining, by a hash of their paths. So a model that was pretrained on the training files
    of the same folder has not seen the functions of the validation files. A task that occurs several times counts
    once, for training if it is there too.

    Args:
        texts: The files.
        cache_dir: Folder for the cached pairs.

    Returns:
        The pairs of ``"train"`` and ``"val"``, of which either may have none.
    """
    # Python's version decides what can be parsed, and this file what becomes of it.
    made_by = (sys.version_info[:2], Path(__file__).read_text(encoding="utf-8"))
    key = hashlib.sha256(repr((made_by, texts.fingerprint)).encode()).hexdigest()[:16]
    path = cache_dir / f"functions-{key}.json"
    if not path.is_file():
        train = _distinct(texts.read("train"))
        content = {"train": _shuffled(train), "val": _shuffled(_distinct(texts.read("val"), known=train))}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process sees either no file or a whole one.
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    return {split: [Pair(*pair) for pair in found] for split, found in json.loads(path.read_text()).items()}


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # other people's code may have invalid escapes
        return ast.parse(source)


def _distinct(texts: Iterable[str], known: Container[str] = ()) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for text in texts:
        for pair in pairs_of(text):
            if pair.task not in known:
                found.setdefault(pair.task, pair)
    return found


def _shuffled(pairs: Mapping[str, Pair]) -> list[Pair]:
    """Return the pairs in the order of a hash: neighbors in a file resemble each other."""
    return sorted(pairs.values(), key=lambda pair: hashlib.sha256(pair.task.encode()).digest())
