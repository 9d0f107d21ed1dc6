"""The strategy's names reach Lightning, whichever of the two packages is imported first."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.strategies import StrategyRegistry

import lightning_memopt as lm
from lightning_memopt._registration import NAMES, REGISTRIES, _WhenImported, register, register_with_lightning

pytestmark = pytest.mark.slow

TRAINERS, FABRICS = REGISTRIES


@pytest.fixture
def before_lightning(monkeypatch):
    """Let it look as if Lightning had not been imported."""
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
    monkeypatch.setattr(sys, "meta_path", finders)
    for name in REGISTRIES:
        monkeypatch.delitem(sys.modules, name)
    return finders


class Loader:
    """Executes a module that holds a registry, or fails."""

    def __init__(self, error=None):
        self.error = error

    def exec_module(self, module):
        if self.error:
            raise self.error
        setattr(module, REGISTRIES[module.__name__][0], _StrategyRegistry())


def imported(finders, loader, name=TRAINERS):
    """Import a registry's module as the import system does."""
    found = SimpleNamespace(find_spec=lambda name, path=None, target=None: ModuleSpec(name, loader))
    finders.append(found)
    spec = finders[0].find_spec(name, None)
    module = sys.modules[name] = ModuleType(name)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return list(getattr(module, REGISTRIES[name][0]))


def waiting():
    return any(isinstance(finder, _WhenImported) for finder in sys.meta_path)


def test_names_are_there_where_lightning_was_imported_first():
    for registry, strategy in ((StrategyRegistry, lm.MemOptFSDPStrategy), (STRATEGY_REGISTRY, lm.MemOptFabricStrategy)):
        assert set(NAMES) <= set(registry)
        register_with_lightning()
        assert type(registry.get("memopt_fsdp")) is strategy
        assert strategy.__name__ in registry["memopt_fsdp"]["description"]
        assert registry["memopt_fsdp_offload"]["init_params"] == {"cpu_offload": True}
    assert not waiting()


def test_names_are_registered_once_lightning_is_imported(before_lightning):
    register_with_lightning()
    register_with_lightning()
    assert sum(isinstance(finder, _WhenImported) for finder in before_lightning) == 1
    assert before_lightning[0].find_spec("lightning.pytorch", None) is None
    before_lightning[1:] = []
    assert imported(before_lightning, Loader(), FABRICS) == list(NAMES)
    assert waiting(), "the Trainer's registry is still to come"
    before_lightning[1:] = []
    assert imported(before_lightning, Loader(), TRAINERS) == list(NAMES)
    assert not waiting()


def test_an_import_that_failed_may_be_tried_again(before_lightning):
    register_with_lightning()
    before_lightning[1:] = []
    with pytest.raises(RuntimeError, match="half of Lightning"):
        imported(before_lightning, Loader(RuntimeError("half of Lightning is missing")))
    before_lightning[1:] = []
    assert imported(before_lightning, Loader()) == list(NAMES)


def test_two_hooks_do_not_ask_each_other(before_lightning):
    """As after the package has been purged from ``sys.modules`` and imported again."""
    before_lightning[:] = [_WhenImported(), _WhenImported()]
    assert before_lightning[0].find_spec(TRAINERS, None) is None
    assert imported(before_lightning, Loader()) == list(NAMES)


def test_short_names_and_submodules_are_there():
    from lightning_memopt.cli import memopt_cli

    assert memopt_cli.lightning_memopt.strategy is lm.strategy
    assert lm.strategy.MemOptFSDPStrategy is lm.MemOptFSDPStrategy
    assert lm.strategy.MemOptFabricStrategy is lm.MemOptFabricStrategy


def test_names_of_others_stay():
    module = ModuleType(TRAINERS)
    registry = module.StrategyRegistry = _StrategyRegistry()
    registry.register("memopt_fsdp", dict, description="somebody else's")
    register(module)
    assert registry["memopt_fsdp"]["strategy"] is dict
    assert isinstance(registry.get("memopt_fsdp_offload"), lm.MemOptFSDPStrategy)


def test_the_package_imports_neither_lightning_nor_dtensor():
    """Each takes a second or more, as long as torch itself."""
    program = """
import sys
import lightning_memopt
print([name for name in ("lightning", "torchmetrics", "torch.distributed.tensor") if name in sys.modules])
import lightning.pytorch
from lightning.fabric.strategies import STRATEGY_REGISTRY
for registry in (lightning.pytorch.strategies.StrategyRegistry, STRATEGY_REGISTRY):
    print([name for name in registry if name.startswith("memopt")])
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("lightning_memopt")])
places = lightning_memopt._explaining._PLACES
print([hasattr(getattr(sys.modules[module], name), "__wrapped__") for module, name in places])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    names = ["['memopt_fsdp', 'memopt_fsdp_offload']"] * 2
    assert run.stdout.splitlines() == ["[]", *names, "[]", "[True, True, True]"]
