"""Types as users see them: ``mypy --strict`` reads a file that touches every public name of the installed package."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import lightning_memopt

pytest.importorskip("mypy")
pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.slow

USER = Path(__file__).with_name("user.py")
# Its thousands of modules would take most of the time.
CONFIG = "[mypy]\n[mypy-transformers.*]\nfollow_imports = skip\n"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return the Python of an environment with a copy of the package. All other packages are the ones of this one."""
    venv.create(tmp_path / "env", with_pip=False)
    paths = sysconfig.get_paths(vars=dict.fromkeys(("base", "platbase"), str(tmp_path / "env")))
    site = Path(paths["purelib"])
    shutil.copytree(Path(lightning_memopt.__file__).parent, site / "lightning_memopt")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return Path(paths["scripts"]) / "python"


def test_a_user_file_passes_strict(installed, tmp_path, pytestconfig):
    """And finds the mistakes in it: the package has types, and mypy reads them (``py.typed``)."""
    config = tmp_path / "mypy.ini"
    config.write_text(CONFIG)
    user = shutil.copy(USER, tmp_path)  # a path that the cache does not know
    cache = pytestconfig.cache.mkdir("mypy")  # of what torch and Lightning declare
    command = [sys.executable, "-m", "mypy", "--strict", f"--config-file={config}", f"--cache-dir={cache}"]
    done = subprocess.run(
        [*command, f"--python-executable={installed}", user],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr


def test_the_file_touches_every_public_name():
    tree = ast.parse(USER.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lm"
    }
    assert set(lightning_memopt.__all__) - used == set()
