"""Messages: each is matched in a test, and the page that lists them is up to date."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ERRORS = runpy.run_path(str(ROOT / "docs" / "errors.py"))
WORDS = 3  # in a row that a test's text has in common with a message


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs_of(text: str, length: int) -> set[tuple[str, ...]]:
    """Return all runs of so many words."""
    found = words(text)
    return {tuple(found[at : at + length]) for at in range(len(found) - length + 1)}


def texts_of_tests() -> set[tuple[str, ...]]:
    """Return all runs of words in the strings of tests, without what a regular expression adds."""
    known: set[tuple[str, ...]] = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for piece in re.split(r"\.\*|\{\}", node.value):
                    plain = re.sub(r"\\(.)", r"\1", piece)
                    known |= {run for length in range(1, WORDS + 1) for run in runs_of(plain, length)}
    return known


def unmatched(messages: list) -> list[str]:
    """Return the messages that share no run of words with any string of the tests."""
    known, missing = texts_of_tests(), []
    for message in messages:
        pieces = re.split(r"‹.*?›", message.text)
        length = min(WORDS, max(len(words(piece)) for piece in pieces))
        if not known & set().union(*(runs_of(piece, length) for piece in pieces)):
            missing.append(f"{message.file}: {message.text}")
    return missing


@pytest.fixture(scope="module")
def messages():
    return ERRORS["messages"]()


def test_every_message_of_the_package_is_matched_in_a_test(messages):
    assert not unmatched([message for message in messages if message.file.startswith("lightning_memopt/")])


def test_messages_of_the_examples_are_on_the_page(messages):
    folders = {message.file.split("/")[1] for message in messages if message.file.startswith("examples/")}
    assert {"pretrain", "sft", "preference", "vision", "migrate"} <= folders


@pytest.mark.parametrize("kind", ["PlanWarning", "RoleWarning", "ResumeWarning", "UserWarning"])
def test_every_class_of_warnings_is_on_the_page(messages, kind):
    assert [message for message in messages if message.kind == kind]


def test_the_page_of_messages_is_up_to_date(messages):
    page = (ROOT / "docs" / "errors.md").read_text()
    assert page == ERRORS["page"](messages), "run: python docs/errors.py > docs/errors.md"


SOURCE = '''
SIZES = ("small", "large")


def size(name):
    """Return a size.

    Raises:
        ValueError: If there is no such size.
            It may be new.
    """
    if name == "old":
        raise refusal(name)
    hint = f" Try {name.lower()!r}." if name else ""
    raise ValueError(f"There is no size {name!r}; sizes: {', '.join(SIZES)}." + hint)


def refusal(name):
    text = "was removed" if name else "was never there"
    return TypeError(f"The size {described(name)} {text}.")


def described(name):
    return f"of the name {name!r}"


def main(parser, many):
    parser.error(f"give at least one of {len(many)} names")
    warnings.warn(f"{many[0].title} is old", DeprecationWarning, stacklevel=2)
    print(f"Warning: {len(many)} names are more than enough.", file=sys.stderr)
    print("This is no message at all.")


def warn_of(names):
    for text in _old(names):
        warnings.warn(text, SizeWarning, stacklevel=2)


def _old(names):
    for name in names:
        yield f"There will be no {name} any more."


def notify(text):
    warnings.warn(text, SizeWarning, stacklevel=2)


def _refuse(text):
    print(f"sizes: error: {text}", file=sys.stderr)


def fit(error, size):
    notify(f"The size {size} was rounded.")
    error.add_note("Sizes are in bytes.")
    _refuse(f"{size} does not fit.")
'''


def test_messages_are_found_in_sources(tmp_path):
    (tmp_path / "sizes.py").write_text(SOURCE)
    found = {(entry.kind, entry.text, entry.when) for entry in ERRORS["messages"](tmp_path)}
    assert found == {
        (
            "ValueError",
            "There is no size ‹name›; sizes: small, large. Try ‹name›.",
            "If there is no such size. It may be new.",
        ),
        ("TypeError", "The size of the name ‹name› was removed.", ""),
        ("TypeError", "The size of the name ‹name› was never there.", ""),
        ("exit status 2", "give at least one of ‹number of many› names", ""),
        ("DeprecationWarning", "‹title› is old", ""),
        ("printed", "Warning: ‹number of many› names are more than enough.", ""),
        ("SizeWarning", "There will be no ‹name› any more.", ""),
        ("SizeWarning", "The size ‹size› was rounded.", ""),
        ("note on an error", "Sizes are in bytes.", ""),
        ("exit status 2", "‹size› does not fit.", ""),
    }
    assert len(unmatched(ERRORS["messages"](tmp_path))) == 0, "their words are in this file"
