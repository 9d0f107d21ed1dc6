"""Print docs/names.md, every public name and what it is: ``python docs/names.py > docs/names.md``."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning_memopt as lm  # noqa: E402
from lightning_memopt._registry import Registry  # noqa: E402

# In the order of the page. Each has the signatures and docstrings of its names.
PAGES = ("optimizers", "strategy", "plans", "memory", "kinds")
INTRO = """# All names

`python docs/names.py` generates this page; a test checks that it is up to date.

Everything public is in `lightning_memopt` itself: `import lightning_memopt as lm`, and `dir(lm)` or completion shows
these names and no others. Names marked *extra* need the extra `cli` ([how to install it](five_minutes.md#install)); all
others need torch alone. [options.md](options.md) lists all arguments; attributes and errors are in the reference.
"""
HEADER = "| name | | what it is |\n| --- | --- | --- |"


def summary(name: str) -> str:
    """Return one line about a public name, as Markdown."""
    thing = getattr(lm, name)
    if isinstance(thing, Registry):
        return f"Every registered {thing.what}, by name."
    line = (inspect.getdoc(thing) or "").partition("\n")[0].replace("``", "`")
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", line)


def needs_extra(name: str) -> bool:
    """Return whether a name needs more than torch."""
    return name == "metrics" or name in lm._LAZY


def documented(reference: str) -> list[str]:
    """Return the public names that a page of the reference documents, in its order."""
    return re.findall(r"^\.\. auto\w+:: lightning_memopt\.(\w+)$", reference, flags=re.MULTILINE)


def page() -> str:
    """Return the whole page."""
    lines = [INTRO]
    for name in PAGES:
        reference = (ROOT / "docs" / "reference" / f"{name}.rst").read_text()
        rows = (f"| `{each}` | {'extra' * needs_extra(each)} | {summary(each)} |" for each in documented(reference))
        title = reference.partition("\n")[0]
        lines.append(f"## {title}\n\n[Reference](reference/{name}.rst)\n\n{HEADER}\n" + "\n".join(rows) + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
