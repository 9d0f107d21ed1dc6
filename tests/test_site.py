"""The site builds without a warning, documents every public name, and has no dead link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")

import lightning_memopt as lm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.targets += [found[name] for name in ("href", "src") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-d", folder / "doctrees"]
    done = subprocess.run(
        [*command, ROOT / "docs", folder / "html"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_of_the_docs_is_in_the_site(site):
    for path in (ROOT / "docs").rglob("*.md"):
        if "_build" not in path.parts:
            assert (site / path.relative_to(ROOT / "docs").with_suffix(".html")).exists()


def test_the_reference_documents_every_public_name(pages):
    reference = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "reference"))
    assert "module-lightning_memopt.metrics" in reference
    names = [f"lightning_memopt.{name}" for name in lm.__all__ if name != "metrics"]
    names += [f"lightning_memopt.metrics.{name}" for name in lm.metrics.__all__]
    assert not set(names) - reference


def test_no_link_of_the_site_is_dead(pages):
    dead = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages.get(file)
            if not file.exists() or (known and parts.fragment and unquote(parts.fragment) not in known.anchors):
                dead.append(f"{path.name}: {target}")
    assert not dead


def test_no_markup_is_left_in_the_text(site):
    for path in (*site.glob("*.html"), *site.glob("reference/*.html")):
        text = re.sub(r"<[^>]*>", "", path.read_text())
        assert not re.findall(r":(?:class|meth|func|doc|attr|mod):`|\{include\}|```", text), path.name
