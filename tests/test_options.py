"""The page of options: every argument of what users construct, with what its docstring says."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("docstring_parser")

from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_memopt as lm

ROOT = Path(__file__).resolve().parents[1]
PAGE = runpy.run_path(str(ROOT / "docs" / "options.py"))
DOCSTRINGS = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))
TEXT = "\n".join(PAGE["page"]()) + "\n"


def rows(heading: str) -> list[list[str]]:
    """Return the cells of all tables of a section, headers included."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)[1]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def first_cells(heading: str) -> list[str]:
    return [row[0].strip("`*") for row in rows(heading)[1:]]


def test_the_page_of_options_is_up_to_date():
    assert (ROOT / "docs" / "options.md").read_text() == TEXT, "run: python docs/options.py > docs/options.md"


def constructed() -> list[str]:
    """Return the public names of what users construct, but for the classes of recipes."""
    bases = (Optimizer, LRScheduler, Callback, Strategy, FabricStrategy, LightningCLI)
    public = {name: getattr(lm, name) for name in lm.__all__}
    recipes = PAGE["recipe_classes"]()
    classes = {name: thing for name, thing in public.items() if isinstance(thing, type) and thing not in recipes}
    return [name for name, thing in classes.items() if issubclass(thing, bases)]


@pytest.mark.parametrize("name", [*constructed(), "plan_memory"])
def test_every_argument_of_what_users_construct_has_a_row(name):
    assert first_cells(name) == list(inspect.signature(getattr(lm, name)).parameters)
    assert all(cell or row[0].startswith("`*") for row in rows(name) for cell in row)


def test_every_class_of_a_recipe_is_listed_with_the_arguments_that_only_it_has():
    found = rows("Classes of recipes")
    listed = [row[0].strip("`") for row in found]
    for cls in PAGE["recipe_classes"]():
        assert cls.__name__ in listed
        assert f"`{cls._recipe}`" in found[listed.index(cls.__name__)]
        for argument in list(inspect.signature(cls).parameters)[5:-1]:
            assert [f"`{cls.__name__}`", f"`{argument}`"] in [row[:2] for row in found]


@pytest.mark.parametrize(("heading", "kinds"), [("momentum", lm.MOMENTA), ("second-moment", lm.SECOND_MOMENTS)])
def test_every_option_of_every_kind_has_a_row(heading, kinds):
    found = [(row[0].strip("`"), row[1].strip("`")) for row in rows(f"Options of {heading} kinds")[1:]]
    for name in kinds.names():
        assert sorted(option for kind, option in found if kind == name) == sorted(kinds.get(name).options() or ["none"])


class Base:
    """Do nothing.

    Args:
        known: Said by the base class. More
            of it in a second line.
    """

    def __init__(self, known: int | None = None) -> None:
        pass


class Silent(Base):
    """Do nothing more."""

    def __init__(self, known: int | None = None, *, unknown: float = 1.0) -> None:
        pass


def test_an_argument_without_a_line_in_a_docstring_is_an_error():
    with pytest.raises(ValueError, match="The docstring of Silent does not say what `unknown` means: add a line"):
        DOCSTRINGS["arguments"](Silent)
    (known,) = DOCSTRINGS["arguments"](Silent, leave_out=("unknown",))
    assert known.cells == ("`known`", "`int` or None", "`None`", "Said by the base class. More of it in a second line.")


def test_a_line_ends_with_a_sentence():
    sentences = [f"{word} " + "x" * 99 + " |a|." for word in ("One", "Two", "Three")]
    assert DOCSTRINGS["line"](" ".join(sentences)) == rf"{sentences[0]} {sentences[1]} …".replace("|", r"\|")
    assert DOCSTRINGS["line"]("See :func:`~package.name`, or ``code``.") == "See `name`, or `code`."
