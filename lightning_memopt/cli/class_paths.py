"""Say why the path of a class leads nowhere."""

from __future__ import annotations

import difflib
import pkgutil
import sys
from importlib import import_module
from types import ModuleType

from lightning_memopt._registry import listed
from lightning_memopt.cli.module_folders import own_folders

# Where short names of classes come from.
_HOMES = ("lightning_memopt", "torch.optim", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks")


def why_not(path: str) -> str:
    """Return why a class such as ``package.module.Class`` cannot be imported, as a sentence; empty if it can."""
    parts = path.split(".")
    found: ModuleType | None = None
    for count in range(1, len(parts)):
        name = ".".join(parts[:count])
        try:
            found = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                return f"{name} could not be imported, because it needs the module {error.name!r}: install it."
            if found is None:
                folders = own_folders()
                hint = _nearest(name, [entry.name for entry in pkgutil.iter_modules(folders)])
                return f"There is no module {name!r}.{hint} Searched: {', '.join(folders)}, and installed packages."
            return _missing(found, parts[count - 1])
        except Exception as error:
            return f"{name} could not be imported ({type(error).__name__}: {error}): correct the module."
    assert found is not None
    return "" if hasattr(found, parts[-1]) else _missing(found, parts[-1])


def unknown_class(name: str) -> str:
    """Return that no class has a short name, and the nearest one that exists."""
    homes = [module for module in map(sys.modules.get, _HOMES) if module is not None]
    known = [name for module in homes for name in _names(module)]
    return f"There is no class {name!r}.{_nearest(name, known)} Give the path of a class, as in package.module.Class."


def _missing(module: ModuleType, name: str) -> str:
    names = _names(module)
    hint = _nearest(name, names) or (f" It has {listed(names, 10)}." if names else "")
    return f"The module {module.__name__} has no {name!r}.{hint}"


def _names(module: ModuleType) -> list[str]:
    """Return the classes and modules that a module offers."""
    public = [name for name in getattr(module, "__all__", dir(module)) if not name.startswith("_")]
    inner = [entry.name for entry in pkgutil.iter_modules(getattr(module, "__path__", []))]
    return [*(name for name in public if isinstance(getattr(module, name, None), type)), *inner]


def _nearest(name: str, names: list[str]) -> str:
    plain = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), plain, n=1)
    return f" Did you mean {plain[close[0]]!r}?" if close else ""
