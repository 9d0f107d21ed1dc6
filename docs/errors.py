"""Print docs/errors.md, the messages that the sources contain: ``python docs/errors.py > docs/errors.md``."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_memopt"
INTRO = """# Messages

Every error and warning of this package, with what is known about its cause. `python docs/errors.py > docs/errors.md`
generates this page from the sources; a test checks that it is up to date.

Parts in ‹ › differ from case to case: search for the words around them. A message ends with the way out where there is
one. Nothing has changed when an error is raised: state, weights and files are as they were.
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
    "__init__": "Names",
}
WARNS = ("warn", "rank_zero_warn")
DEPTH = 4  # of functions that make parts of a message
ALTERNATIVES = 4  # of one message
OPEN, CLOSE = "‹", "›"
ESCAPED = r"\_\_"  # would make text bold


@dataclass(frozen=True)
class Message:
    """A message of the sources.

    Attributes:
        module: Path of its module below the package, without a suffix.
        kind: Name of the exception or warning.
        text: What it says, with names of values in angle quotes.
        when: When it is raised, as the docstring of the function says; empty if it says nothing.
    """

    module: str
    kind: str
    text: str
    when: str

    @property
    def title(self) -> str:
        """The heading that it belongs to."""
        parts = self.module.split("/")
        places = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        return next((TITLES[place] for place in places if place in TITLES), parts[0])

    @property
    def link(self) -> str:
        """A link to its module, as Markdown."""
        file = f"{self.module}/__init__.py" if (PACKAGE / self.module).is_dir() else f"{self.module}.py"
        return f"[{file.replace('__', ESCAPED)}](../lightning_memopt/{file})"


@dataclass(frozen=True)
class _Scope:
    """What names mean where a message is made."""

    names: Mapping[str, tuple[str, ...]]
    functions: Mapping[str, ast.FunctionDef]
    depth: int = 0

    def texts(self, node: ast.expr) -> tuple[str, ...]:
        """Return the texts that an expression may give."""
        match node:
            case ast.Constant(value=str() as text):
                return (text,)
            case ast.JoinedStr(values=values):
                return _joined([self.texts(value) for value in values])
            case ast.FormattedValue(value=ast.Name(id=name), conversion=114) if name.isupper() and name in self.names:
                return tuple(map(repr, self.names[name]))
            case ast.FormattedValue(value=value):
                return self.texts(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right) if any(map(_is_text, ast.walk(node))):
                return _joined([self.texts(left), self.texts(right)])
            case ast.BinOp(left=left, op=ast.Mult()):
                return self.texts(left)
            case ast.IfExp(body=body, orelse=orelse):
                # What is left out in some cases is shown.
                return tuple(dict.fromkeys(filter(None, (*self.texts(body), *self.texts(orelse))))) or ("",)
            case ast.Name(id=name) | ast.Call(func=ast.Attribute(attr="join"), args=[ast.Name(id=name)]) if (
                name in self.names
            ):
                return self.names[name]
            case ast.Tuple(elts=items) | ast.List(elts=items) if all(map(_is_text, items)):
                return (", ".join(text for item in items for text in self.texts(item)),)
            case ast.Call(func=ast.Name(id=name)) if name in self.functions and self.depth < DEPTH:
                return self._of_call(self.functions[name], node) or (_value(node),)
        return (_value(node),)

    def _of_call(self, function: ast.FunctionDef, call: ast.Call) -> tuple[str, ...]:
        """Return the texts that a function of the package returns."""
        known = {arg.arg: self.texts(value) for arg, value in zip(function.args.args, call.args, strict=False)}
        known |= {given.arg: self.texts(given.value) for given in call.keywords if given.arg}
        inner = _scope(function, _Scope(known, self.functions, self.depth + 1))
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
        found = dict.fromkeys(text for value in returned for text in inner.texts(value))
        return tuple(found)[:ALTERNATIVES] if any(" " in text for text in found) else ()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _joined(parts: list[tuple[str, ...]]) -> tuple[str, ...]:
    every = itertools.islice(itertools.product(*parts), ALTERNATIVES)
    return tuple(dict.fromkeys("".join(pieces) for pieces in every))


def _value(node: ast.AST) -> str:
    return f"{OPEN}{_name(node)}{CLOSE}"


def _name(node: ast.AST) -> str:
    """Return what to call the value of an expression."""
    match node:
        case ast.Name(id=name):
            return name.strip("_").replace("_", " ")
        case ast.Attribute(value=value, attr="__name__" | "name"):
            return _name(value)
        case ast.Attribute(attr=attr):
            return attr.strip("_").replace("_", " ")
        case ast.Call(func=ast.Attribute(attr="join"), args=[value]):
            return _name(value)
        case ast.Call(func=ast.Name(id="len"), args=[value]):
            return f"number of {_name(value)}"
        case ast.Call(
            func=ast.Attribute(value=value, attr="names" | "keys" | "values" | "items" | "tolist" | "lower" | "strip")
        ):
            return _name(value)
        case ast.Call(func=ast.Name(id="map"), args=[_, value]):
            return _name(value)
        case ast.Call(args=[value, *_]):
            return _name(value)
        case ast.Call(func=function):
            return _name(function)
        case ast.Subscript(value=value) | ast.Starred(value=value) | ast.FormattedValue(value=value):
            return _name(value)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return _name(first.iter)
        case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
            return _name(first)
        case ast.BinOp(left=left) | ast.BoolOp(values=[left, *_]) | ast.IfExp(body=left):
            return _name(left)
    return "…"


def _scope(function: ast.AST, outer: _Scope) -> _Scope:
    """Return a scope that also knows the texts assigned to names inside a function."""
    names = dict(outer.names)
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found = tuple(text for text in _Scope(names, outer.functions, outer.depth).texts(value) if " " in text)
                if found:
                    names[name] = tuple(dict.fromkeys((*names.get(name, ()), *found)))[:ALTERNATIVES]
    return _Scope(names, outer.functions, outer.depth)


def _constants(trees: Mapping[Path, ast.Module], functions: Mapping[str, ast.FunctionDef]) -> dict[Path, _Scope]:
    """Return what the constants of each module, and those it imports from others, mean."""
    own: dict[Path, dict[str, tuple[str, ...]]] = {}
    for path, tree in trees.items():
        own[path] = {}
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=int() | float() as number)):
                    own[path][name] = (str(number),)
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if any(map(_is_text, ast.walk(value))):
                    found = _Scope(own[path], functions).texts(value)
                    own[path] |= {} if found == (_value(value),) else {name: found}
    scopes = {}
    for path, tree in trees.items():
        known = dict(own[path])
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                end = node.module.replace(".", "/")
                theirs = next(
                    (table for other, table in own.items() if other.with_suffix("").as_posix().endswith(end)), {}
                )
                known |= {each.name: theirs[each.name] for each in node.names if each.name in theirs}
        scopes[path] = _Scope(known, functions)
    return scopes


def _documented(function: ast.AST) -> dict[str, str]:
    """Return when a function raises what, as its docstring says."""
    text = ast.get_docstring(function) or "" if isinstance(function, ast.FunctionDef | ast.ClassDef) else ""
    section = re.search(r"^Raises:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {kind: re.sub(r"\s+", " ", said).strip() for kind, said in entries}


def _calls(tree: ast.Module) -> Iterator[tuple[list[ast.AST], ast.Call]]:
    """Yield every call with the functions and classes around it, outermost first."""
    waiting: list[tuple[list[ast.AST], ast.AST]] = [([], tree)]
    while waiting:
        around, node = waiting.pop()
        if isinstance(node, ast.Call):
            yield around, node
        inside = [*around, node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else around
        waiting += [(inside, child) for child in ast.iter_child_nodes(node)]


def _kind(call: ast.Call) -> str:
    """Return the exception or warning that a call makes; empty if it makes none."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in WARNS:
        given = call.args[1:2] or [word.value for word in call.keywords if word.arg == "category"]
        return given[0].id if given and isinstance(given[0], ast.Name) else "UserWarning"
    if isinstance(call.func, ast.Attribute) and name == "error" and "pars" in ast.unparse(call.func.value).lower():
        return "exit status 2"
    return name.lstrip("_") if name.endswith(("Error", "Exception")) else ""


def messages(package: Path = PACKAGE) -> list[Message]:
    """Return all messages of the package's sources, without duplicates."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    functions = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.FunctionDef)}
    scopes = _constants(trees, functions)
    found: dict[Message, None] = {}
    for path, tree in trees.items():
        module = path.relative_to(package).with_suffix("").as_posix().removesuffix("/__init__")
        for around, call in _calls(tree):
            kind = _kind(call)
            if not kind or not call.args:
                continue
            scope = _scope(around[-1], scopes[path]) if around else scopes[path]
            said = {name: text for outer in around for name, text in _documented(outer).items()}
            for text in scope.texts(call.args[0]):
                if len(_plain(text).split()) > 1:
                    found[Message(module, kind, re.sub(r"\s+", " ", text).strip(), said.get(kind, ""))] = None
    return list(found)


def _key(message: Message) -> str:
    return re.sub(r"\W+", " ", _plain(message.text)).strip().casefold()


def _plain(text: str) -> str:
    """Return a text without its values."""
    return re.sub(rf"{OPEN}.*?{CLOSE}", "", text)


def _anchor(message: Message, taken: set[str]) -> str:
    words = re.findall(r"[a-z0-9]+", _plain(message.text).lower())
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
    titles = sorted({message.title for message in found}, key=lambda x: (order.index(x) if x in order else 99, x))
    lines, taken = [INTRO], set[str]()
    lines += [
        "".join(f"- [{title}](#{re.sub(r'[^a-z0-9_ ]', '', title.lower()).replace(' ', '-')})\n" for title in titles)
    ]
    for title in titles:
        lines.append(f"## {title}\n")
        same: dict[tuple[str, str], list[Message]] = {}
        for message in sorted((entry for entry in found if entry.title == title), key=_key):
            same.setdefault((message.text, message.kind), []).append(message)
        for (text, kind), entries in same.items():
            sources = (entry.link for entry in entries)
            whens = (entry.when for entry in entries if entry.when)
            facts = " · ".join([f"`{kind}`", *dict.fromkeys(sources), *dict.fromkeys(whens)])
            lines.append(f'<a id="{_anchor(entries[0], taken)}"></a>\n{_quoted(text)}\n\n{facts}\n')
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
