"""Register the strategies ``memopt_fsdp`` and ``memopt_fsdp_offload`` when Lightning is imported.

Lightning finds a strategy by name only after it is registered, and has no entry point for registration. Importing
Lightning to register two names would make ``import lightning_memopt`` several times slower than ``import torch``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_memopt._explaining import explain_directories

REGISTRY_MODULE = "lightning.pytorch.strategies"
NAMES: dict[str, dict[str, Any]] = {"memopt_fsdp": {}, "memopt_fsdp_offload": {"cpu_offload": True}}
DESCRIPTION = "FSDP2 with optimizer state sharded like the parameters: see lightning_memopt.MemOptFSDPStrategy."


def register_with_lightning() -> None:
    """Register the names now if Lightning is imported, or else when it is. A second call has no effect."""
    if REGISTRY_MODULE in sys.modules:
        from lightning.pytorch.strategies import StrategyRegistry  # waits where another thread imports it

        register(StrategyRegistry)
        explain_directories()
    elif not any(_is_hook(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def register(registry: Any) -> None:
    """Add the names that are missing to a StrategyRegistry."""
    for name, options in NAMES.items():
        if name not in registry:
            registry.register(name, _strategy, description=DESCRIPTION, **options)


def _strategy(**options: Any) -> Any:
    from lightning_memopt.strategy import MemOptFSDPStrategy

    return MemOptFSDPStrategy(**options)


def _is_hook(finder: Any) -> bool:
    """Return whether a finder is one of these, also one of an earlier import of this module."""
    return getattr(finder, "registers_strategies_of", None) == "lightning_memopt"


class _WhenImported(MetaPathFinder):
    """Registers the names after the registry's module has been executed. Other finders find that module."""

    registers_strategies_of = "lightning_memopt"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY_MODULE:
            return None
        others = [finder for finder in sys.meta_path if not _is_hook(finder)]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module.StrategyRegistry)
            explain_directories()
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
