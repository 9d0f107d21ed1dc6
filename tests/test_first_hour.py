"""The first hour of a user: every file, command and output of its page, in an empty folder."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch.cli")

from tests._commands import run_python

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first_hour.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks() -> Iterator[tuple[str, str, str]]:
    """Yield language and content of every block of the page, and the last name of a file before it."""
    text = PAGE.read_text()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        names = re.findall(r"`(\w+\.(?:py|yaml))`", text[: match.start()])
        yield match[1], match[2], names[-1] if names else ""


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield every command of a block with what the page shows for it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run(command: str, folder: Path) -> str:
    """Return what a command prints, and what an error prints if it is one."""
    program, *args = shlex.split(command)
    if program == "cat":
        return (folder / args[0]).read_text()
    if args[0] == "-c":
        (folder / "given.py").write_text(args[1])
        args = ["given.py"]
    done = run_python(*(["-m", "lightning_memopt"] if program == "lightning-memopt" else []), *args)
    # What comes before the traceback tells of the process that stands in for Python.
    return done.stderr[max(0, done.stderr.find("Traceback")) :] if done.returncode else done.stdout


def test_the_page_shows_what_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    checker, count = doctest.OutputChecker(), 0
    for language, content, name in blocks():
        if language != "console":
            (tmp_path / name).write_text(content)
            continue
        for command, shown in commands(content):
            got = run(command, tmp_path)
            example = doctest.Example(command, shown)
            assert checker.check_output(shown, got, FLAGS), checker.output_difference(example, got, FLAGS)
            count += 1
    assert count == 16
