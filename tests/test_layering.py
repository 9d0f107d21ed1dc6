"""The import order of HOUSE.md, checked on the syntax trees, and what torch alone must be able to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_memopt
from lightning_memopt.momentum import MOMENTA
from lightning_memopt.second_moment import SECOND_MOMENTS

PACKAGE = "lightning_memopt"
ROOT = Path(lightning_memopt.__file__).parent

# A module imports from lower levels only. Modules of one level do not import each other where they are siblings (two
# sets on one level), and not in circles anywhere.
LEVELS: list[list[set[str]]] = [
    [{"_registry", "linalg", "ranges", "sizes", "storages", "tick"}],
    [{"layout"}],
    [{"collectives", "kind"}],
    [{"momentum"}, {"second_moment"}, {"roles"}],
    [{"plan", "recipes", "snapshot", "guards", "consensus", "bounding", "placement", "wrapping"}],
    [{"block"}],
    [{"groups", "conversion", "checking", "naming", "resuming", "checkpoint", "stepping"}],
    [{"optimizer", "planner"}],
    [{"optimizers", "signals", "measuring"}],
    [{"strategy"}, {"callbacks", "metrics"}],
    [{"cli", "plan_command"}],
]
# These only gather names, or start the program: they may import everything, and nothing imports them.
TOPS = {"__init__", "__main__"}
MAY_IMPORT_SIBLING = {("callbacks", "metrics")}

# What a part must not touch (HOUSE.md's table): prefixes of imported modules.
DISTRIBUTED, LIGHTNING = "torch.distributed", ("lightning", "pytorch_lightning", "lightning_fabric")
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "_registry",
            "ranges",
            "sizes",
            "storages",
            "tick",
            "linalg",
            "kind",
            "momentum",
            "second_moment",
            "snapshot",
            "plan",
            "recipes",
        ),
        (DISTRIBUTED, *LIGHTNING),
    ),
    "roles": ("torch", *LIGHTNING),
    "layout": LIGHTNING,
    "collectives": LIGHTNING,
    **dict.fromkeys(
        (
            "consensus",
            "guards",
            "bounding",
            "block",
            "groups",
            "conversion",
            "checking",
            "naming",
            "resuming",
            "checkpoint",
            "stepping",
            "optimizer",
            "optimizers",
            "planner",
            "placement",
            "wrapping",
            "signals",
            "measuring",
        ),
        LIGHTNING,
    ),
    "metrics": (DISTRIBUTED,),
}
ONLY_TORCH = ("torch", "typing_extensions", PACKAGE)
OPTIONAL = ("lightning", "pytorch_lightning", "torchmetrics", "omegaconf", "jsonargparse", "rich", "transformers")
OPTIONAL += ("tokenizers", "tensorboard", "matplotlib", "yaml", "numpy")


@dataclass(frozen=True)
class Import:
    """One import: of ``name`` by ``part`` (the module or subpackage of the package's top level)."""

    part: str
    module: str
    name: str
    line: int
    deferred: bool

    @property
    def inside(self) -> str | None:
        """Return the part of the package that is imported, if it is one."""
        head, _, rest = self.name.partition(".")
        return (rest.split(".")[0] or "__init__") if head == PACKAGE else None

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def part_names() -> set[str]:
    return {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def files() -> Iterator[tuple[str, str, Path]]:
    """Yield the part, the module's dotted name inside the package, and the file."""
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        yield relative.parts[0], ".".join(relative.parts), path


def imports_in(source: str, part: str, module: str, *, is_package: bool = False) -> list[Import]:
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
            # `from package import part` imports the part, `from package import Name` what __init__ gathers.
            parts = part_names()
            gathers = base == PACKAGE
            names = [f"{base}.{a.name}" if gathers and a.name in parts else base for a in node.names]
        found += [Import(part, module, name, node.lineno, id(node) in deferred) for name in dict.fromkeys(names)]
    return found


def all_imports() -> list[Import]:
    return [
        entry
        for part, module, path in files()
        for entry in imports_in(path.read_text(), part, module, is_package=path.name == "__init__.py")
    ]


def place_of(part: str) -> tuple[int, int]:
    for level, sets in enumerate(LEVELS):
        for position, names in enumerate(sets):
            if part in names:
                return level, position
    raise AssertionError(
        f"{PACKAGE}/{part} has no place in the import order: add it to LEVELS in {Path(__file__).name}, "
        "one level above what it imports"
    )


def breaks_order(entry: Import) -> bool:
    target = entry.inside
    if target is None or entry.part in TOPS or target == entry.part:
        return False
    if target in TOPS:
        return True
    mine, theirs = place_of(entry.part), place_of(target)
    if (entry.part, target) in MAY_IMPORT_SIBLING:
        return False
    return theirs[0] > mine[0] or (theirs[0] == mine[0] and theirs[1] != mine[1])


def test_every_module_has_a_place():
    for part in part_names() - TOPS:
        place_of(part)


def test_a_module_without_a_place_is_told_where_to_go():
    with pytest.raises(
        AssertionError, match=r"lightning_memopt/newcomer has no place .* add it to LEVELS in test_layering"
    ):
        place_of("newcomer")


def test_import_order():
    wrong = [str(entry) for entry in all_imports() if breaks_order(entry)]
    assert not wrong, "imports of a higher level or a sibling:\n" + "\n".join(wrong)


def test_no_circles():
    """Also not between the files of one part, nor through an import inside a function."""
    modules = {module for _, module, _ in files()}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for entry in all_imports():
        target = entry.name.removeprefix(f"{PACKAGE}.")
        target = target if target in modules else f"{target}.__init__"
        gathered = (
            entry.module.endswith("__init__") or target.endswith("__init__") and entry.part == target.split(".")[0]
        )
        if entry.inside and target in modules and target != entry.module and not gathered:
            edges[entry.module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circular import: {' → '.join((*path, module))}"
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(modules):
        visit(module, ())


def test_what_must_not_be_touched():
    wrong = [
        str(entry)
        for entry in all_imports()
        for prefix in FORBIDDEN.get(entry.part, ())
        if entry.name == prefix or entry.name.startswith(f"{prefix}.")
    ]
    assert not wrong, "\n".join(wrong)
    assert {part for sets in LEVELS[:9] for names in sets for part in names} <= set(FORBIDDEN)


def test_only_layout_and_the_strategy_use_dtensor():
    # What is planned has to be what the strategy would shard: DTensors, on the meta device.
    allowed = ("layout", "planner", "strategy")
    wrong = [str(e) for e in all_imports() if e.name.startswith("torch.distributed.tensor") and e.part not in allowed]
    for part, module, path in files():
        if part not in allowed:
            names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
            wrong += [f"{module}:{node.lineno} uses DTensor" for node in names if node.id == "DTensor"]
    assert not wrong, "\n".join(wrong)


def test_kinds_see_no_grad_and_no_other_kind():
    kinds = {cls.__module__ for registry in (MOMENTA, SECOND_MOMENTS) for cls in map(registry.get, registry.names())}
    wrong = [str(e) for e in all_imports() if f"{PACKAGE}.{e.module}" in kinds and e.name in kinds]
    for part, module, path in files():
        if part in ("linalg", "kind", "momentum", "second_moment"):
            attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            wrong += [f"{module}:{node.lineno} uses .grad" for node in attributes if node.attr == "grad"]
    assert not wrong, "\n".join(wrong)


def test_optimizers_need_nothing_but_torch():
    """What is optional is imported inside the functions that need it."""
    optimizers = {part for sets in LEVELS[:9] for names in sets for part in names}
    wrong = [
        str(entry)
        for entry in all_imports()
        if entry.part in optimizers
        and not entry.deferred
        and entry.name.split(".")[0] not in (*ONLY_TORCH, *sys.stdlib_module_names)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_with_torch_alone():
    """With everything optional missing, the package and all levels up to the optimizer can be imported and step."""
    present = part_names()
    modules = [part for sets in LEVELS[:9] for names in sets for part in sorted(names) if part in present]
    program = f"""
import importlib, importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(OPTIONAL) - {"numpy"}!r}:
            raise ModuleNotFoundError(f"{{name}} is not here", name=name)
sys.meta_path.insert(0, Missing())
import {PACKAGE}
for module in {modules!r}:
    importlib.import_module(f"{PACKAGE}.{{module}}")
print(sorted(name for name in {set(OPTIONAL) - {"numpy"}!r} if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "part", "module", "bad"),
    [
        ("from lightning_memopt.plan import Plan", "layout", "layout", True),
        ("from lightning_memopt import plan", "layout", "layout", True),
        ("from lightning_memopt import AdaPM", "layout", "layout", True),
        ("from .. import second_moment", "momentum", "momentum.dense", True),
        ("from ..roles import ROLES", "momentum", "momentum.dense", True),
        ("from .base import MOMENTA", "momentum", "momentum.dense", False),
        ("def late():\n    import lightning_memopt.optimizer", "plan", "plan", True),
        ("import lightning_memopt.layout", "plan", "plan", False),
        ("from lightning_memopt.recipes import load_plan", "plan", "plan", False),
        ("from lightning_memopt.metrics import Bytes", "callbacks", "callbacks.monitor", False),
        ("from lightning_memopt.callbacks import Monitor", "strategy", "strategy", True),
        ("import torch", "plan", "plan", False),
    ],
)
def test_the_check_itself(source, part, module, bad):
    assert any(breaks_order(entry) for entry in imports_in(source, part, module)) == bad
