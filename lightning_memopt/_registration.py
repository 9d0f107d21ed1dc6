"""Register the strategies ``memopt_fsdp`` and ``memopt_fsdp_offload`` when Lightning is imported.

Lightning finds a strategy by name only after it is registered, and has no entry point for registration. Importing
Lightning to register two names would make ``import lightning_memopt`` several times slower than ``import torch``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_memopt._explaining import explain_directories

# Module → its registry, and the strategy that it gets under both names.
REGISTRIES = {
    "lightning.pytorch.strategies": ("StrategyRegistry", "MemOptFSDPStrategy"),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", "MemOptFabricStrategy"),
}
NAMES: dict[str, dict[str, Any]] = {"memopt_fsdp": {}, "memopt_fsdp_offload": {"cpu_offload": True}}


def register_with_lightning() -> None:
    """Register the names where Lightning is imported, or else when it is. A second call has no effect."""
    for name in REGISTRIES:
        if name in sys.modules:
            register(import_module(name))  # waits where another thread imports it
            explain_directories()
    if not all(name in sys.modules for name in REGISTRIES) and not any(_is_hook(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def register(module: ModuleType) -> None:
    """Add the names that are missing to the registry of a module."""
    attribute, strategy = REGISTRIES[module.__name__]
    registry = getattr(module, attribute)
    for name, options in NAMES.items():
        if name not in registry:
            description = f"FSDP2 with optimizer state sharded like the parameters: see lightning_memopt.{strategy}."
            registry.register(name, _maker(strategy), description=description, **options)


def _maker(strategy: str) -> Callable[..., Any]:
    """Return a function that makes a strategy, whose module is imported only then."""

    def make(**options: Any) -> Any:
        return getattr(import_module("lightning_memopt.strategy"), strategy)(**options)

    return make


def _is_hook(finder: Any) -> bool:
    """Return whether a finder is one of these, also one of an earlier import of this module."""
    return getattr(finder, "registers_strategies_of", None) == "lightning_memopt"


class _WhenImported(MetaPathFinder):
    """Registers the names after a registry's module has been executed. Other finders find that module."""

    registers_strategies_of = "lightning_memopt"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        others = [finder for finder in sys.meta_path if not _is_hook(finder)]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)
            explain_directories()
            # The module of this registry is in `sys.modules` by now, the other one maybe not.
            if self in sys.meta_path and all(name in sys.modules for name in REGISTRIES):
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
