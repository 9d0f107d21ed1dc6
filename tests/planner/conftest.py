"""A folder of its own for every test, and a function that runs the command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import jsonargparse

from lightning_memopt import cli as cli_module
from tests._commands import keep_parsers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # of the terminal that started the tests
    keep_parsers(monkeypatch, "fit")
    yield
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command and returns its exit status, output and errors."""

    def call(*args: str, command: str = "plan") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lightning-memopt", command, *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            cli_module.main()
        shown = capsys.readouterr()
        return raised.value.code, shown.out, shown.err

    return call
