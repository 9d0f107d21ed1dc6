"""The commands in the READMEs and configs of the examples have options that exist, and files that are there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from tests._commands import keep_parsers
from tests.examples._run import EXAMPLES, ROOT

pytestmark = pytest.mark.slow

PROGRAMS = ("lightning-memopt", "python", "torchrun")
# The shell expands loops, variables and continued lines, as it does for users. It finds no other program.
SHELL = "".join(f'{name}() {{ printf "%q " {name} "$@"; echo; }}\n' for name in PROGRAMS)


def scripts_of(path: Path) -> list[str]:
    """Return the shell scripts of a page, or those in the comments of a config."""
    text = path.read_text()
    if path.suffix == ".yaml":
        return re.findall(r"^  (lightning-memopt (?:.*\\\n)*.*)", text.replace("\n# ", "\n"), flags=re.MULTILINE)
    in_tables = re.findall(rf"\| `((?:{'|'.join(PROGRAMS)}) [^`]+)` \|", text)
    return [*re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL), *in_tables]


def commands_of(path: Path) -> list[list[str]]:
    """Return the arguments of every command of our own."""
    shell, script = shutil.which("bash") or "bash", SHELL + "\n".join(scripts_of(path))
    done = subprocess.run([shell, "-c", script], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False)
    return [shlex.split(line) for line in done.stdout.splitlines()]


PAGES = sorted([*EXAMPLES.rglob("*.md"), *EXAMPLES.rglob("*.yaml")])
COMMANDS = {shlex.join(command): command for page in PAGES for command in commands_of(page)}
FITS = {text: command for text, command in COMMANDS.items() if {"fit", "validate"} & {*command}}
SCRIPTS = {text: command for text, command in COMMANDS.items() if command[0] != "lightning-memopt"}


@pytest.fixture(autouse=True)
def _in_the_repository(_in_an_empty_folder: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", FITS.values(), ids=FITS.keys())
def test_a_run_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from lightning_memopt.cli import MemOptCLI

    if "examples/sft/lora.yaml" in command:
        pytest.importorskip("peft", exc_type=ImportError)
    keep_parsers(monkeypatch, *({"fit", "validate"} & {*command}))
    with pytest.raises(SystemExit) as done:
        MemOptCLI(args=[*command[1:], "--print_config"])
    printed = capsys.readouterr()
    assert done.value.code == 0, printed.err
    assert "class_path: examples." in printed.out


@pytest.mark.parametrize("command", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_the_options_of_a_script_exist(command: list[str]):
    if "-m" in command:
        start = command.index("-m") + 1
        name = command[start]
    else:
        start = next(at for at, word in enumerate(command) if word.endswith(".py"))
        assert Path(command[start]).is_file()
        name = command[start].removesuffix(".py").replace("/", ".")
    assert name.startswith("examples.")
    import_module(name).arguments(command[start + 1 :])


def test_every_example_has_commands_and_none_is_lost():
    for page in EXAMPLES.glob("*/README.md"):
        assert commands_of(page), page
        named = sum(block.count("lightning-memopt fit") for block in scripts_of(page))
        assert sum("fit" in command for command in commands_of(page)) >= named, page
    assert len(FITS) > 30
