"""The public names: what completion shows, and the page that says what each one is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch.cli")

import lightning_memopt as lm

ROOT = Path(__file__).resolve().parents[1]
PAGE = runpy.run_path(str(ROOT / "docs" / "names.py"))


def test_completion_shows_the_public_names_and_no_others():
    assert dir(lm) == sorted(lm.__all__)
    assert set(lm._LAZY) <= set(lm.__all__)
    for name in dir(lm):
        assert getattr(lm, name) is not None


@pytest.mark.parametrize("name", lm.__all__)
def test_every_name_has_a_line(name):
    line = PAGE["summary"](name)
    assert line.endswith("."), f"the docstring of {name} has no line for the page"
    assert 10 < len(line) <= 130
    assert "|" not in line
    assert ":`" not in line, "no markup of another sort"


def test_the_page_lists_every_name_once():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE["page"](), flags=re.MULTILINE)
    assert sorted(listed) == sorted(lm.__all__), "docs/reference/ has what the page lists"


def test_the_page_of_names_is_up_to_date():
    assert (ROOT / "docs" / "names.md").read_text() == PAGE["page"](), "run: python docs/names.py > docs/names.md"


def test_a_misspelled_name_has_a_suggestion():
    with pytest.raises(AttributeError, match=r"'lightning_memopt' has no attribute 'AdaPMLeen'\. Did you mean 'AdaPML"):
        lm.AdaPMLeen  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no attribute 'xyz'\.$"):
        lm.xyz  # noqa: B018
