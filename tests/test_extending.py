"""The page about extending the package: its code runs, and its kinds meet the contract of the built-in ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch")

from lightning_memopt.callbacks import POLICIES, Problem
from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from lightning_memopt.plans.roles import NAMING_SCHEMES
from tests.kinds.contract.cases import label, shapes_for
from tests.kinds.contract.checks import CHECKS, check_registry

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The code of the page as one module. What it registers is gone afterwards."""
    folder = tmp_path_factory.mktemp("extending")
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (folder / "page.py").write_text("".join(code))
    spec = importlib.util.spec_from_file_location("page", folder / "page.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "page", module)
        for registry in (MOMENTA, SECOND_MOMENTS, POLICIES, NAMING_SCHEMES):
            patch.setattr(registry, "_entries", dict(registry._entries))
        spec.loader.exec_module(module)
        yield module


def test_the_page_registers_one_of_each(page):
    assert MOMENTA.get("row_mean") is page.RowMeanMomentum
    assert SECOND_MOMENTS.get("per_input") is page.PerInputSecondMoment
    assert POLICIES.get("no_scores") is page.no_scores
    assert "mixer" in NAMING_SCHEMES
    check_registry(MOMENTA, {})
    check_registry(SECOND_MOMENTS, {})


@pytest.mark.parametrize("check", CHECKS, ids=label)
@pytest.mark.parametrize("name", ["RowMeanMomentum", "PerInputSecondMoment"])
def test_the_kinds_of_the_page_meet_the_contract(page, name, check):
    kind = getattr(page, name)()
    for shape in shapes_for(kind):
        check(kind, shape)


def test_the_policy_of_the_page_needs_a_budget(page):
    with pytest.raises(ValueError, match="'no_scores' divides a budget"):
        page.no_scores(Problem((), budget=None))
