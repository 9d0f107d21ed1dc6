"""The changes that are prepared for Lightning apply to the version that they are for, and do what their tests say."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning
import pytest
from lightning.fabric.utilities import registry

pytestmark = pytest.mark.slow

PATCH = Path(__file__).parents[1] / "docs" / "upstream" / "strategy_entry_points.patch"
# The others need a whole Lightning with the patch: docs/upstream/README.md says how to run all.
TESTS = ("class_and_function", "nothing_is_imported_before_the_strategy_is_requested", "registered_names_win",
         "the_same_entry_point_twice", "wrong_type", "fabric_takes_the_name")  # fmt: skip


@pytest.fixture
def patched(tmp_path: Path) -> Iterator[Path]:
    """A copy of the files of the patch, patched, with the functions of the one that is the heart of it in place."""
    if lightning.__version__ != "2.6.6":
        pytest.skip("the patch is for Lightning 2.6.6")
    for name in re.findall(r"^--- a/src/lightning/(.+)$", PATCH.read_text(), re.MULTILINE):
        place = tmp_path / "src" / "lightning" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(lightning.__file__).parent / name, place)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    before = dict(vars(registry))
    exec((tmp_path / "src/lightning/fabric/utilities/registry.py").read_text(), vars(registry))
    yield tmp_path
    vars(registry).clear()
    vars(registry).update(before)


def test_the_patch_applies_and_does_what_its_tests_say(patched, monkeypatch):
    path = patched / "tests/tests_fabric/strategies/test_external_strategies.py"
    spec = importlib.util.spec_from_file_location("test_external_strategies", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "test_external_strategies", module)
    spec.loader.exec_module(module)
    for name in TESTS:
        getattr(module, f"test_{name}")()
    for name in ("fabric", "pytorch"):
        source = (patched / f"src/lightning/{name}/strategies/__init__.py").read_text()
        assert f'"lightning.{name}.strategies", Strategy)' in source
