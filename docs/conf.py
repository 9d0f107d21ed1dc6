"""The site: ``make docs`` writes the pages that are generated, then builds this folder into ``docs/_build/html``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import lightning_memopt  # noqa: E402

project = "lightning_memopt"
version = release = lightning_memopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lightning_memopt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# `--option` would get a dash of another sort, and could not be searched for.
smartquotes = False
highlight_language = "text"
default_role = "code"
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "member-order": "bysource"}
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# Roles in docstrings must lead somewhere. Annotations also name classes that have no page: those of other packages, and
# those that are not public.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(torch|torchmetrics|lightning|collections|os|pathlib|pickle)\..*"),
    ("py:class", r"lightning_memopt\.\w+\..*"),
    ("py:class", r"\w+"),
    ("py:exc", r"MisconfigurationException|pickle\.UnpicklingError"),
]

# A page may be an include of a file outside of this folder. Links to that file then lead to the page.
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
PAGES = {ROOT / "README.md": DOCS / "index.md"} | {
    (path.parent / name).resolve(): path
    for path in DOCS.rglob("*.md")
    if "_build" not in path.parts
    for name in INCLUDE.findall(path.read_text())
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")
# Nothing draws it without a script from elsewhere. The table of floors below it says the same.
DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)


def linked(text: str, origin: Path, folder: Path) -> str:
    """Return Markdown whose links to files lead to pages of the site, as seen from another folder.

    Args:
        text: The Markdown.
        origin: The folder that its links start from.
        folder: The folder of the page that will hold it.
    """

    def moved(match: re.Match[str]) -> str:
        target = (origin / match[0]).resolve()
        if not target.exists():
            return match[0]  # a link that leads nowhere is an error of the build
        if target.suffix == ".md" and not target.is_relative_to(DOCS) and target not in PAGES:
            logger.warning("%s has no page. Add one that includes it, as docs/security.md does.", target)
        return Path(os.path.relpath(PAGES.get(target, target), folder)).as_posix()

    return LINK.sub(moved, text)


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Include files from outside of this folder, and point links at pages."""
    path = app.env.doc2path(docname)
    if path.suffix != ".md":
        return

    def included(match: re.Match[str]) -> str:
        file = (path.parent / match[1]).resolve()
        app.env.note_dependency(str(file))
        return linked(DIAGRAM.sub("", file.read_text()), file.parent, path.parent)

    source[0] = INCLUDE.sub(included, linked(source[0], path.parent, path.parent))


def escape_bars(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Keep |U / D| in docstrings an absolute value, where reStructuredText has a substitution."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda match: match[1] or r"\|", line) for line in lines]


def draw_dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Put a dash between an argument and what it is, which Sphinx leaves to the quotes that are off."""
    for node in list(doctree.findall(nodes.Text)):
        if node == " -- ":
            node.parent.replace(node, nodes.Text(" – "))


def setup(app: Sphinx) -> None:
    """Connect the functions of this file."""
    app.connect("source-read", read)
    app.connect("doctree-read", draw_dashes)
    app.connect("autodoc-process-docstring", escape_bars)
