"""The examples in docstrings hold."""

from __future__ import annotations

import doctest
import importlib
import io
import pkgutil
from types import ModuleType

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import lightning_memopt


def modules() -> list[str]:
    found = pkgutil.walk_packages(lightning_memopt.__path__, "lightning_memopt.")
    return ["lightning_memopt", *(entry.name for entry in found if not entry.name.endswith("__main__"))]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


WITH_EXAMPLES = [
    "optim.measuring",
    "metrics.state_bytes",
    "metrics.savings",
    "metrics.peak_memory",
    "metrics.allocation",
]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_hold(name):
    if name.startswith("lightning_memopt.kernels.jit_"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    for test in examples(module):
        output = io.StringIO()
        assert runner.run(test, out=output.write).failed == 0, output.getvalue()


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_these_modules_have_examples(name):
    found = examples(importlib.import_module(f"lightning_memopt.{name}"))
    assert sum(len(test.examples) for test in found) >= 5
    if name.startswith("metrics."):
        assert len(found) == 2, "the function and the class"
