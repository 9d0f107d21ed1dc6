"""What the page of the command line shows is what the program prints."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import jsonargparse
import pytest

pytest.importorskip("lightning.pytorch.cli")

from lightning_memopt.cli import main
from tests._commands import keep_parsers

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "command_line.md"
TEXT = PAGE.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def shown() -> list[tuple[str, str]]:
    """Return the commands of the page, and what it shows for each."""
    parts = [part for block in blocks("console") for part in block.split("$ ")[1:]]
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts)]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that runs a command in a folder with the files of the page, and returns what it prints."""
    for name in ("net.py", "run.yaml"):
        (content,) = re.findall(rf"^`{name}`:\n\n```\w+\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delitem(sys.modules, "net", raising=False)
    keep_parsers(monkeypatch, "fit")

    def call(command: str) -> str:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit):
            main()
        printed = capsys.readouterr()
        return "".join(f"{line.rstrip()}\n" for line in (printed.out + printed.err).splitlines())

    yield call
    sys.modules.pop("net", None)
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


def test_the_page_shows_what_is_printed(run):
    assert len(shown()) > 10
    for command, output in shown():
        assert run(command) == output.rstrip("\n") + "\n", command


def test_the_project_of_the_page_trains(run, tmp_path):
    quiet = ["logger=false", "accelerator=cpu", "enable_progress_bar=false"]
    command = "lightning-memopt fit --config run.yaml " + " ".join(f"--trainer.{option}" for option in quiet)
    run(command)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=4-step=40.ckpt"]


def test_python_on_the_page_runs():
    (code,) = (block for block in blocks("python") if "schedule.step()" in block)
    exec(compile(code, str(PAGE), "exec"), {})
