"""The order of imports, checked on the syntax trees, and what torch alone must be able to import."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_memopt.kinds.momentum import MOMENTA
from lightning_memopt.kinds.second_moment import SECOND_MOMENTS
from tests import _house
from tests._house import PACKAGE, Import, files, imports_in, rooms

all_imports = functools.cache(_house.all_imports)
parsed = functools.cache(lambda path: ast.parse(path.read_text()))

# Whoever lives on a floor imports from the floors below it, and never from a neighbour.
FLOORS: list[set[str]] = [
    {"_registry", "_version"},
    {"memory", "sharding", "kernels", "terminal"},
    {"kinds", "figures"},
    {"plans"},
    {"optim", "metrics"},
    {"planner", "strategy", "callbacks"},
    {"_explaining"},
    {"cli", "_registration"},
]
# These only gather names, or start the program: they may import everything, and nothing imports them.
TOPS = {"__init__", "__main__"}

# Who may import these; for all others they are not there.
DISTRIBUTED, DTENSOR = "torch.distributed", "torch.distributed.tensor"
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
ALLOWED: dict[str, set[str]] = {
    # What is planned has to be what the strategy would shard: DTensors, on the meta device.
    DTENSOR: {"sharding", "planner", "strategy"},
    # The command line tries out whether FSDP2 works on the machine.
    DISTRIBUTED: {"sharding", "planner", "strategy", "callbacks", "cli"},
    **dict.fromkeys(LIGHTNING, {"strategy", "callbacks", "cli", "_registration"}),
    "triton": {"kernels"},
}
TRITON = "kernels.jit_"  # files that import it; all others do without
ONLY_TORCH = {"_registry", "terminal", "memory", "sharding", "kernels", "figures", "kinds", "plans", "optim", "planner"}
OPTIONAL = ("lightning", "pytorch_lightning", "torchmetrics", "omegaconf", "jsonargparse", "rich", "transformers")
OPTIONAL += ("tokenizers", "tensorboard", "matplotlib", "yaml", "numpy", "triton")


def floor_of(room: str) -> int:
    for floor, names in enumerate(FLOORS):
        if room in names:
            return floor
    raise AssertionError(
        f"{PACKAGE}/{room} has no place in the import order: add it to FLOORS in {Path(__file__).name}, "
        "above everything that it imports"
    )


def breaks_order(entry: Import) -> bool:
    target = entry.inside
    if target is None or entry.room in TOPS or target == entry.room:
        return False
    return target in TOPS or floor_of(target) >= floor_of(entry.room)


def imports_of(entry: Import, prefix: str) -> bool:
    return entry.name == prefix or entry.name.startswith(f"{prefix}.")


def test_every_module_has_a_place():
    for room in rooms() - TOPS:
        floor_of(room)


def test_a_module_without_a_place_is_told_where_to_go():
    with pytest.raises(
        AssertionError, match=r"lightning_memopt/newcomer has no place .* add it to FLOORS in test_layering"
    ):
        floor_of("newcomer")


def test_import_order():
    wrong = [str(entry) for entry in all_imports() if breaks_order(entry)]
    assert not wrong, "imports of a higher floor or a neighbour:\n" + "\n".join(wrong)


def test_no_circles():
    """Also not between the files of one room, nor through an import inside a function."""
    modules = {module for _, module, _ in files()}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for entry in all_imports():
        target = entry.name.removeprefix(f"{PACKAGE}.")
        target = target if target in modules else f"{target}.__init__"
        gathered = (
            entry.module.endswith("__init__") or target.endswith("__init__") and entry.room == target.split(".")[0]
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
        for prefix, allowed in ALLOWED.items()
        if imports_of(entry, prefix) and entry.room not in allowed | {"__init__"}
    ]
    roles = [entry for entry in all_imports() if entry.module.startswith("plans.roles")]
    wrong += [str(entry) for entry in roles if imports_of(entry, "torch")]
    assert roles
    assert not wrong, "\n".join(wrong)


def test_only_sharding_planner_and_strategy_use_dtensor():
    """Not even by name, where a module hands it on."""
    wrong = []
    for room, module, path in files():
        if room not in ALLOWED[DTENSOR]:
            names = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)]
            wrong += [f"{module}:{node.lineno} uses DTensor" for node in names if node.id == "DTensor"]
    assert not wrong, "\n".join(wrong)


def test_kinds_see_no_grad_and_no_other_kind():
    kinds = {cls.__module__ for registry in (MOMENTA, SECOND_MOMENTS) for cls in map(registry.get, registry.names())}
    wrong = [str(e) for e in all_imports() if f"{PACKAGE}.{e.module}" in kinds and e.name in kinds]
    between = {"momentum": "kinds.second_moment", "second_moment": "kinds.momentum"}
    wrong += [
        str(entry)
        for entry in all_imports()
        for axis, other in between.items()
        if entry.module.startswith(f"kinds.{axis}.") and imports_of(entry, f"{PACKAGE}.{other}")
    ]
    for room, module, path in files():
        if room == "kinds":
            attributes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)]
            wrong += [f"{module}:{node.lineno} uses .grad" for node in attributes if node.attr == "grad"]
    assert not wrong, "\n".join(wrong)


def test_optimizers_need_nothing_but_torch():
    """What is optional is imported inside the functions that need it."""
    wrong = [
        str(entry)
        for entry in all_imports()
        if entry.room in ONLY_TORCH
        and not entry.deferred
        and not (entry.module.startswith(TRITON) and entry.name.split(".")[0] == "triton")
        and entry.name.split(".")[0] not in ("torch", "typing_extensions", PACKAGE, *sys.stdlib_module_names)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_with_torch_alone():
    """With everything optional missing, the package and all rooms up to the planner can be imported."""
    modules = [module.removesuffix(".__init__") for room, module, _ in files() if room in ONLY_TORCH]
    modules = [module for module in modules if not module.startswith(TRITON)]
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
for name in ("BindNames", "MemOptCLI", "metrics"):
    try:
        getattr({PACKAGE}, name)
    except ImportError as error:
        print(error)
print(sorted(name for name in {set(OPTIONAL) - {"numpy"}!r} if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    *refused, imported = run.stdout.splitlines()
    assert imported == "[]"
    for line, name in zip(
        refused, ("BindNames needs 'lightning'", "command line", "metrics needs 'torchmetrics'"), strict=True
    ):
        assert name in line
        assert line.endswith('pip install "lightning-memopt[cli]"')


@pytest.mark.parametrize(
    ("source", "room", "module", "bad"),
    [
        ("from lightning_memopt.plans.plan import Plan", "sharding", "sharding.layout", True),
        ("from lightning_memopt import plans", "sharding", "sharding.layout", True),
        ("from lightning_memopt import AdaPM", "sharding", "sharding.layout", True),
        ("from ..plans import roles", "kinds", "kinds.momentum", True),
        ("from ...plans.roles import ROLES", "kinds", "kinds.momentum.dense", True),
        ("from .base import MOMENTA", "kinds", "kinds.momentum.dense", False),
        ("def late():\n    import lightning_memopt.optim.memopt", "plans", "plans.plan", True),
        ("import lightning_memopt.sharding.layout", "plans", "plans.plan", False),
        ("from lightning_memopt.plans.recipes import load_plan", "plans", "plans.plan", False),
        ("from lightning_memopt.metrics import Bytes", "callbacks", "callbacks.monitor", False),
        ("from lightning_memopt.callbacks import Monitor", "strategy", "strategy", True),
        ("import torch", "plans", "plans.plan", False),
    ],
)
def test_the_check_itself(source, room, module, bad):
    assert any(breaks_order(entry) for entry in imports_in(source, room, module)) == bad
