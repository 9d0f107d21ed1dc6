"""Finds the messages that sources contain: what is raised, warned of, noted, and refused by commands."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT / "lightning_memopt", ROOT / "examples")
WARNS = ("warn", "rank_zero_warn")
EXIT, PRINTED, NOTE = "exit status 2", "printed", "note on an error"
DEPTH = 4  # of functions that make parts of a message
ALTERNATIVES = 8  # of one message
OPEN, CLOSE = "‹", "›"


_Named = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Message:
    """A message of the sources.

    Attributes:
        file: Its file, from the folder that holds the package on.
        kind: Name of the exception or warning, or how else it appears.
        text: What it says, with names of values in angle quotes.
        when: When it is raised, as the docstring of the function says; empty if it says nothing.
    """

    file: str
    kind: str
    text: str
    when: str


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
        scopes[path] = _Scope(known, {**functions, **_functions(tree)})
    return scopes


def _documented(function: ast.AST) -> dict[str, str]:
    """Return when a function raises what, as its docstring says."""
    text = ast.get_docstring(function) or "" if isinstance(function, _Named) else ""
    section = re.search(r"^Raises:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {kind: re.sub(r"\s+", " ", said).strip() for kind, said in entries}


def _calls(tree: ast.Module) -> Iterator[tuple[list[_Named], ast.Call]]:
    """Yield every call with the functions and classes around it, outermost first."""
    waiting: list[tuple[list[_Named], ast.AST]] = [([], tree)]
    while waiting:
        around, node = waiting.pop()
        if isinstance(node, ast.Call):
            yield around, node
        inside = [*around, node] if isinstance(node, _Named) else around
        waiting += [(inside, child) for child in ast.iter_child_nodes(node)]


def _kind(call: ast.Call) -> str:
    """Return the exception or warning that a call makes, or how else it says something; empty if it says nothing."""
    name = _called(call)
    if name in WARNS:
        given = call.args[1:2] or [word.value for word in call.keywords if word.arg == "category"]
        return given[0].id if given and isinstance(given[0], ast.Name) else "UserWarning"
    if isinstance(call.func, ast.Attribute) and name == "error" and "pars" in ast.unparse(call.func.value).lower():
        return EXIT
    if name == "print" and any(ast.unparse(word.value) == "sys.stderr" for word in call.keywords):
        return PRINTED
    if name == "add_note":
        return NOTE
    return name.lstrip("_") if name.endswith(("Error", "Exception")) else ""


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module by name, without methods."""
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _speakers(functions: Mapping[str, ast.FunctionDef]) -> dict[str, str]:
    """Return the functions that say the text they are given, with how they say it."""
    found = {}
    for name, function in functions.items():
        first = next((argument.arg for argument in function.args.args), "")
        for _, call in _calls(function):
            match _kind(call), call.args[:1]:
                case str(kind), [ast.Name(id=given)] if kind and given == first:
                    found[name] = kind
                case str(kind), [
                    ast.JoinedStr(values=[ast.Constant(value=str(start)), ast.FormattedValue(value=ast.Name(id=given))])
                ] if kind == PRINTED and given == first:
                    found[name] = EXIT if "error" in start else PRINTED
    return found


def _said(tree: ast.Module, speakers: Mapping[str, str]) -> Iterator[tuple[list[_Named], str, ast.expr]]:
    """Yield every text that is raised, warned of, noted or printed, with the functions around it and how it is said."""
    functions = _functions(tree)
    for around, call in _calls(tree):
        kind = _kind(call) or speakers.get(_called(call), "")
        if not kind or not call.args or (kind == PRINTED and around and around[-1].name in speakers):
            continue
        given = call.args[0]
        if isinstance(given, ast.Name) and around and given.id in _loop_variables(around[-1]):
            # The texts come from generators that the function names.
            names = {node.id for node in ast.walk(around[-1]) if isinstance(node, ast.Name)}
            for maker in (functions[name] for name in functions if name in names):
                yielded = (node.value for node in ast.walk(maker) if isinstance(node, ast.Yield) and node.value)
                yield from (([maker], kind, value) for value in yielded)
        else:
            yield around, kind, given


def _loop_variables(function: ast.AST) -> set[str]:
    loops = (node.target for node in ast.walk(function) if isinstance(node, ast.For))
    return {target.id for target in loops if isinstance(target, ast.Name)}


def messages(*folders: Path) -> list[Message]:
    """Return all messages of the sources in some folders, those of this repository by default, without duplicates."""
    return [message for folder in folders or FOLDERS for message in _messages(folder)]


def _messages(folder: Path) -> list[Message]:
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    functions = {name: node for tree in trees.values() for name, node in _functions(tree).items()}
    scopes = _constants(trees, functions)
    public = {name: kind for name, kind in _speakers(functions).items() if not name.startswith("_")}
    found: dict[Message, None] = {}
    for path, tree in trees.items():
        file = path.relative_to(folder.parent).as_posix()
        for around, kind, given in _said(tree, public | _speakers(_functions(tree))):
            scope = _scope(around[-1], scopes[path]) if around else scopes[path]
            whens = {name: text for outer in around for name, text in _documented(outer).items()}
            for text in scope.texts(given):
                if len(plain(text).split()) > 1:
                    found[Message(file, kind, re.sub(r"\s+", " ", text).strip(), whens.get(kind, ""))] = None
    return list(found)


def plain(text: str) -> str:
    """Return a text without its values."""
    return re.sub(rf"{OPEN}.*?{CLOSE}", "", text)
