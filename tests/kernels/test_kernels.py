"""The kernels in Triton's interpreter, in a process of its own: triton has to be imported with TRITON_INTERPRET set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
]


def python(*args: str, **variables: str) -> None:
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    run = subprocess.run(
        [sys.executable, "-m", *args],
        env=mine | variables,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_in_the_interpreter():
    """Run ``check_*.py``: ``TRITON_INTERPRET=1 python -m pytest -o python_files='check_*.py' tests/kernels``."""
    options = ("-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py")
    python("pytest", *options, str(FOLDER), TRITON_INTERPRET="1")


def test_kernels_compile():
    python("tests.kernels._compiled")
