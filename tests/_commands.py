"""Run command lines without what takes long about them: imports, and parsers of commands that are not asked for."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import tests._ranks  # noqa: F401  says what the server of new processes imports

STREAMS = {"stdout": 1, "stderr": 2}


def keep_parsers(monkeypatch: pytest.MonkeyPatch, *commands: str) -> None:
    """Leave `LightningCLI` some of its commands: making the parsers of all four takes half the time of a short run."""
    from lightning.pytorch.cli import LightningCLI

    every = LightningCLI.subcommands()
    monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: {name: every[name] for name in commands}))


def run_python(*command: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Do as ``python *command``, ``-m`` included, does here, in a new process that has the packages already."""
    with tempfile.TemporaryDirectory(prefix="python-") as folder:
        process = multiprocessing.get_context("forkserver").Process(
            target=_python, args=(list(command), folder, os.getcwd(), dict(os.environ))
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{' '.join(command)} did not finish within {timeout:g} s")
        out, err = ((Path(folder) / name).read_text() for name in STREAMS)
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _python(command: list[str], folder: str, place: str, environment: dict[str, str]) -> None:
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    for name, number in STREAMS.items():
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    module = command[1] if command[0] == "-m" else None
    first = place if module else str(Path(command[0]).parent)
    sys.path[:] = [first, *(entry for entry in sys.path if entry not in ("", place))]
    sys.argv = command[1:] if module else command
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    finally:
        _wait_for_children()


def _wait_for_children() -> None:
    """A program's own processes end before it does; whoever reads its output from a pipe waits for them, too."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
