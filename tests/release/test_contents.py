"""A wheel and a source distribution are complete, as built offline in a copy of the source tree."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

pytest.importorskip("build")

from tests.release._contents import FILES, FOLDERS, ROOT, SDIST, WHEEL, check_sdist, check_wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with a source distribution, and the wheel that was built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=280)
    return out


def test_the_wheel_is_the_package_and_nothing_else(built):
    check_wheel(built / WHEEL)


def test_the_sdist_is_the_source_tree(built):
    check_sdist(built / SDIST)
