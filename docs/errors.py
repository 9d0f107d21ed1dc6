"""Print docs/errors.md, the messages that the sources contain: ``python docs/errors.py > docs/errors.md``."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from messages import NOTE, PRINTED, Message, messages, plain  # noqa: E402

PACKAGE = "lightning_memopt/"
INTRO = f"""# Messages

Every error and warning of this package and of its examples, with what is known about its cause. `python docs/errors.py`
generates this page from the sources; a test checks that it is up to date.

Parts in ‹ › differ from case to case: search for the words around them. A message ends with the way out where there is
one. Nothing has changed when an error is raised: state, weights and files are as they were. Below a message is its
class; `{NOTE}` is what this package adds to another error, and `{PRINTED}` a warning of a command.
"""
# Folder or module → what users know it as, in the order of the page.
TITLES = {
    "cli": "The command line",
    "terminal": "The command line",
    "planner": "Planning memory",
    "plans": "Roles, recipes and overrides",
    "kinds": "Kinds of momentum and second moments",
    "optim": "Optimizers",
    "optim/checkpoint": "Loading an optimizer's state",
    "callbacks": "Callbacks",
    "metrics": "Metrics and figures",
    "figures": "Metrics and figures",
    "strategy": "The strategy memopt_fsdp",
    "strategy/checkpoint": "Checkpoints",
    "strategy/files": "Checkpoints",
    "sharding": "Sharded parameters",
    "kernels": "Kernels",
    "memory": "Sizes",
    "_registry": "Names",
    "_registration": "Names",
    "_explaining": "Checkpoints",
    "__init__": "Names",
    "examples": "Examples",
}
ESCAPED = r"\_\_"  # would make text bold


def _title(message: Message) -> str:
    """Return the heading that a message belongs to."""
    parts = message.file.removeprefix(PACKAGE).removesuffix(".py").split("/")
    places = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((TITLES[place] for place in places if place in TITLES), parts[0])


def _link(message: Message) -> str:
    """Return a link to a message's file, as Markdown."""
    return f"[{message.file.removeprefix(PACKAGE).replace('__', ESCAPED)}](../{message.file})"


def _key(message: Message) -> str:
    return re.sub(r"\W+", " ", plain(message.text)).strip().casefold()


def _anchor(message: Message, taken: set[str]) -> str:
    words = re.findall(r"[a-z0-9]+", plain(message.text).lower())
    base = "-".join(words[:8])
    anchor = next(name for count in itertools.count() if (name := f"{base}-{count}" if count else base) not in taken)
    taken.add(anchor)
    return anchor


def _quoted(text: str) -> str:
    """Return a text as a quote in Markdown. Code between backticks stays code."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "> " + "".join(x if x.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", x) for x in pieces)


def page(found: list[Message] | None = None) -> str:
    """Return the whole page."""
    found = messages() if found is None else found
    order = list(dict.fromkeys(TITLES.values()))
    titles = sorted({_title(message) for message in found}, key=lambda x: (order.index(x) if x in order else 99, x))
    lines, taken = [INTRO], set[str]()
    lines += [
        "".join(f"- [{title}](#{re.sub(r'[^a-z0-9_ ]', '', title.lower()).replace(' ', '-')})\n" for title in titles)
    ]
    for title in titles:
        lines.append(f"## {title}\n")
        same: dict[tuple[str, str], list[Message]] = {}
        for message in sorted((entry for entry in found if _title(entry) == title), key=_key):
            same.setdefault((message.text, message.kind), []).append(message)
        for (text, kind), entries in same.items():
            sources = (_link(entry) for entry in entries)
            whens = (entry.when for entry in entries if entry.when)
            facts = " · ".join([f"`{kind}`", *dict.fromkeys(sources), *dict.fromkeys(whens)])
            lines.append(f'<a id="{_anchor(entries[0], taken)}"></a>\n{_quoted(text)}\n\n{facts}\n')
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
