"""The files around a release: changelog, citation, and the forms that reporters fill in."""

from __future__ import annotations

import re

import pytest

import lightning_memopt
from tests.release._contents import ROOT

yaml = pytest.importorskip("yaml")

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
in_checkout = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="a source distribution has no forms")


def test_the_version_has_a_section_in_the_changelog():
    """The newest one: the changelog begins with it."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert re.fullmatch(
        rf"{re.escape(lightning_memopt.__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", headings[0]
    ), headings[0]


def test_the_version_is_in_one_place_and_in_the_citation():
    written = re.compile(rf'version = "?{re.escape(lightning_memopt.__version__)}\b')
    found = [path.name for path in (ROOT / "lightning_memopt").rglob("*.py") if "__version__ = " in path.read_text()]
    assert found == ["_version.py"]
    assert not written.search((ROOT / "pyproject.toml").read_text())
    assert f"version = {{{lightning_memopt.__version__}}}" in (ROOT / "docs" / "citation.md").read_text()


def test_the_citation_names_the_software_and_its_papers():
    """Every key that the Citation File Format 1.2.0 requires is there."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The lightning_memopt authors"}]
    for reference, number in zip(citation["references"], ("2510.09103", "2411.07120"), strict=True):
        assert {"type", "title", "authors"} <= reference.keys()
        assert reference["url"].endswith(number)
        assert reference["doi"].endswith(number)
        assert number in (lightning_memopt.AdaPM.__doc__ or "") + (lightning_memopt.AdamSNSM.__doc__ or "")


@in_checkout
def test_a_report_of_a_bug_asks_for_what_it_takes_to_reproduce_it():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert required == {"what", "script", "doctor"}


@in_checkout
@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_forms_name_commands_and_files_that_exist(form):
    text = form.read_text()
    from lightning_memopt.cli.commands import COMMANDS

    for command in re.findall(r"lightning-memopt (\w+)", text):
        assert command in COMMANDS
    for name in re.findall(r"[\w/]+\.md", text):
        assert (ROOT / name).exists(), name
    ids = [field["id"] for field in yaml.safe_load(text)["body"] if "id" in field]
    assert len(ids) == len(set(ids)) > 0
