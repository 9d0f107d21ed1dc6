"""Try a wheel and a source distribution as a stranger would: ``python -m tests.release.smoke dist``.

Builds nothing. Installs the wheel in an empty environment, outside of the source tree, first with torch alone and then
with the extra ``cli``; and lets pytest collect the tests of the unpacked source distribution.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path

from tests.release._contents import ROOT, SDIST, STEM, WHEEL, check_sdist, check_wheel

TORCH_ALONE = Path(__file__).with_name("_torch_alone.py")
# A command, and what it prints, without and with the extra.
COMMANDS = (
    ("--version", "lightning is not installed", "lightning 2"),
    ("doctor", "[cli]         is incomplete", "[cli]         is complete"),
    ("--help", "plan", "plan"),
    ("plan --model llama-1b", 'pip install "lightning-memopt[cli]"', "adapm_lean"),
    ("roles --model gpt2", 'pip install "lightning-memopt[cli]"', "query"),
    ("fit --help", 'pip install "lightning-memopt[cli]"', "--optimizer"),
)


def run(*command: str | Path, cwd: Path, status: int = 0, **environment: str) -> str:
    """Run a command in a folder, without what this environment sets for Python, and return all that it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd, env={**inherited, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def install(python: Path, what: str) -> None:
    """Install a requirement with the versions that the tests were run with."""
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, what, cwd=python.parent)


def try_commands(program: Path, cwd: Path, *, extra: bool) -> None:
    """Run every command. Those that need the extra end with status 2 without it."""
    for command, without, with_extra in COMMANDS:
        expected = with_extra if extra else without
        status = 2 if expected.startswith("pip install") else 0
        printed = run(program, *command.split(), cwd=cwd, status=status)
        assert expected in printed, f"lightning-memopt {command} printed no {expected!r}:\n{printed}"


def try_wheel(wheel: Path, scratch: Path) -> None:
    """Install the wheel with torch alone and try it, then with the extra."""
    venv.create(scratch / "env", with_pip=True)
    python, program = scratch / "env" / "bin" / "python", scratch / "env" / "bin" / "lightning-memopt"
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    install(python, str(wheel))
    say(run(python, TORCH_ALONE, cwd=elsewhere).splitlines()[-1])
    try_commands(program, elsewhere, extra=False)
    install(python, f"{wheel}[cli]")
    try_commands(program, elsewhere, extra=True)
    run(python, "-m", "pip", "check", cwd=elsewhere)
    say(f"lightning-memopt works without and with the extra: {', '.join(command for command, *_ in COMMANDS)}.")


def try_sdist(sdist: Path, scratch: Path) -> None:
    """Let pytest collect the tests of the unpacked source distribution, and run those of what it contains."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    folder = scratch / STEM
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=0"]
    collected = run(*command, "--collect-only", cwd=folder, PYTHONPATH=str(folder))
    run(*command, "tests/release", "tests/test_names.py", "tests/test_layering.py", cwd=folder, PYTHONPATH=str(folder))
    say(f"The source distribution: {collected.splitlines()[-1]}, and those of its contents pass.")


def say(text: str) -> None:
    """Print a line with the time that has passed."""
    print(f"{time.perf_counter() - START:6.1f} s  {text}", flush=True)


START = time.perf_counter()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Try a wheel and a source distribution as a stranger would.")
    parser.add_argument("folder", type=Path, help="The folder with both files.")
    found = parser.parse_args().folder.resolve()
    check_wheel(found / WHEEL)
    check_sdist(found / SDIST)
    say(f"{WHEEL} and {SDIST} have the right contents.")
    with tempfile.TemporaryDirectory(prefix="release-") as temporary:
        try_sdist(found / SDIST, Path(temporary))
        try_wheel(found / WHEEL, Path(temporary))
