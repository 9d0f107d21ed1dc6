"""The imports of the package, read off its syntax trees. ``python -m tests._house [FOLDER]`` reports on them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "lightning_memopt"
ROOT = Path(__file__).parent.parent / PACKAGE


@dataclass(frozen=True)
class Import:
    """One import: of ``name`` by ``module``, which lies in ``room`` (a folder or module of the package's top level)."""

    room: str
    module: str
    name: str
    line: int
    deferred: bool

    @property
    def inside(self) -> str | None:
        """Return the room of the package that is imported, if it is one."""
        head, _, rest = self.name.partition(".")
        return (rest.split(".")[0] or "__init__") if head == PACKAGE else None

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def rooms(root: Path = ROOT) -> set[str]:
    return {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def files(root: Path = ROOT) -> Iterator[tuple[str, str, Path]]:
    """Yield the room, the module's dotted name inside the package, and the file."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        yield relative.parts[0], ".".join(relative.parts), path


def imports_in(source: str, room: str, module: str, *, is_package: bool = False, root: Path = ROOT) -> list[Import]:
    tree = ast.parse(source)
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                own = [PACKAGE, *module.split(".")]
                own = own[:-1] if is_package and own[-1] == "__init__" else own
                base = ".".join([*own[: len(own) - node.level + is_package], *([base] if base else [])])
            # `from package import module` imports the module, `from package import Name` what __init__ gathers.
            place = root.joinpath(*base.split(".")[1:]) if base.split(".")[0] == PACKAGE else None
            names = [
                f"{base}.{a.name}"
                if place and ((place / f"{a.name}.py").exists() or (place / a.name / "__init__.py").exists())
                else base
                for a in node.names
            ]
        found += [Import(room, module, name, node.lineno, id(node) in deferred) for name in dict.fromkeys(names)]
    return found


def all_imports(root: Path = ROOT) -> list[Import]:
    return [
        entry
        for room, module, path in files(root)
        for entry in imports_in(path.read_text(), room, module, is_package=path.name == "__init__.py", root=root)
    ]


def arrows(root: Path = ROOT) -> set[tuple[str, str]]:
    """Return which room imports which, the package's own ``__init__`` and ``__main__`` left out."""
    pairs = {(entry.room, entry.inside) for entry in all_imports(root) if entry.inside}
    tops = {"__init__", "__main__"}
    return {(room, other) for room, other in pairs if room != other and not {room, other} & tops}


def report(root: Path = ROOT) -> str:
    sizes = sorted(((len(path.read_text().splitlines()), module) for _, module, path in files(root)), reverse=True)
    return "\n".join(
        [
            f"{len(rooms(root) - {'__init__', '__main__'})} rooms, {len(arrows(root))} arrows between them",
            f"{sum(size for size, _ in sizes)} lines in {len(sizes)} files, the largest:",
            *(f"{size:5}  {module.replace('.', '/')}.py" for size, module in sizes[:10]),
        ]
    )


if __name__ == "__main__":
    print(report(*map(Path, sys.argv[1:])))
