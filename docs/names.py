"""Print docs/names.md, every public name and what it is: ``python docs/names.py > docs/names.md``."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_memopt as lm  # noqa: E402
from lightning_memopt._registry import Registry  # noqa: E402

INTRO = """# All names

`python docs/names.py` generates this page; a test checks that it is up to date.

Everything public is in `lightning_memopt` itself: `import lightning_memopt as lm`, and `dir(lm)` or completion shows
these names and no others. Names marked *extra* need `pip install "lightning-memopt[cli]"`; all others need torch alone.

| name | | what it is |
| --- | --- | --- |
"""


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


def page() -> str:
    """Return the whole page."""
    rows = [f"| `{name}` | {'extra' * needs_extra(name)} | {summary(name)} |" for name in lm.__all__]
    return INTRO + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
