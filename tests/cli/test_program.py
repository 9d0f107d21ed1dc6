"""The program around the commands: which it has, how they are found, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lightning.pytorch.cli")

import lightning_memopt
from lightning_memopt.cli import completion, environment, main
from lightning_memopt.cli.commands import COMMANDS
from lightning_memopt.cli.environment import EXTRAS, Check, Environment, Extra, Package
from lightning_memopt.cli.module_folders import folders_of
from lightning_memopt.terminal.tables import console

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the program and returns its exit status, output and errors."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lightning-memopt", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            main()
        shown = capsys.readouterr()
        return raised.value.code, shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the environment of processes that find a copy of the package, and nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(Path(lightning_memopt.__file__).parent, folder / "lightning_memopt")
    return {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "80"}


@pytest.mark.parametrize("args", [("--help",), ("-h",), ("--parser_mode", "omegaconf", "--help")])
def test_help_shows_every_command(run, args):
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.does.split()] for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 80


def test_without_a_command_it_shows_help_as_an_error(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err == run("--help")[1]


def test_versions(run):
    code, out, _ = run("--version")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["lightning-memopt", "torch", "lightning", "Python"]
    assert f"lightning-memopt {lightning_memopt.__version__}\n" in out


@pytest.mark.parametrize(
    ("wrong", "right"), [("role", "roles"), ("pln", "plan"), ("docter", "doctor"), ("train", None)]
)
def test_a_wrong_command_suggests_the_nearest(run, wrong, right):
    code, out, err = run(wrong, "--model", "gpt2")
    assert (code, out) == (2, "")
    hint = f" Did you mean {right!r}?" if right else ""
    assert err == f"lightning-memopt: error: Unknown command {wrong!r}.{hint} Available: {', '.join(COMMANDS)}.\n"


def test_options_come_after_a_command_of_this_package(run):
    _, _, err = run("--parser_mode", "omegaconf", "plan", "--config", "x.yaml")
    message = "--parser_mode comes before `plan`: put the command first, as in lightning-memopt plan --parser_mode."
    assert err == f"lightning-memopt: error: {message}\n"


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("fit", "omegaconf"),
        ("plan --config x.yaml", "jsonargparse"),
        ("plan --model gpt2 --recipe adapm_lean", "rich"),
        ("roles --model gpt2", "rich"),
    ],
)
def test_what_is_missing_is_one_line(run, monkeypatch, command, missing):
    for module in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("memopt_cli", "configured", "parser_mode", "messages"):
        monkeypatch.delitem(sys.modules, f"lightning_memopt.cli.{module}", raising=False)
    code, out, err = run(*command.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert 'pip install "lightning-memopt[cli]"' in err


def stub(monkeypatch, name, found):
    """Put a stub in the place of a command's module."""

    def run(args):
        found.append(list(args))
        print("usage: x [--weights]\n\nSee --not-mine.")
        return 3

    monkeypatch.setitem(sys.modules, COMMANDS[name].module, SimpleNamespace(main=run))


@pytest.mark.parametrize("name", ["export", "inspect"])
def test_commands_get_their_arguments_and_return_the_status(run, monkeypatch, name):
    found: list[list[str]] = []
    stub(monkeypatch, name, found)
    assert run(name, "a", "--b")[0] == 3
    assert found == [["a", "--b"]]


def test_doctor_says_what_works(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["optimizers"] == states["FSDP2"] == states["Trainer and strategy"] == "works"
    assert "gloo" in found["backends"]
    assert found["version"] == lightning_memopt.__version__
    assert {"name": "cli", "enables": EXTRAS["cli"][0], "missing": []} in found["extras"]
    torch = next(entry for entry in found["packages"] if entry["name"] == "torch")
    assert (torch["problem"], torch["needed_by"]) == ("", "everything")


def test_doctor_fits_80_columns_and_names_what_to_install(run, monkeypatch):
    cli = '"lightning-memopt[cli]"'
    packages = (
        Package("torch", "2.13.0", "everything", "torch", ""),
        Package("rich", None, "plan, roles", cli, "is missing"),
        Package("lightning", "2.4.0", "Trainer, strategy, fit", cli, "is not <3,>=2.5"),
        Package("triton", None, "kernels on CUDA devices", "triton", "is missing"),
    )
    checks = (Check("optimizers", "works", "a step"), Check("FSDP2", "fails", "RuntimeError: " + "no backend " * 12))
    extras = (Extra("cli", "all commands", ("rich",)), Extra("bench", "comparisons of time, and of memory, too", ()))
    found = Environment("1.2.3", "here", packages, extras, (), ("gloo",), checks)
    monkeypatch.setattr("lightning_memopt.cli.doctor_command.examine", lambda: found)
    code, out, _ = run("doctor")
    assert code == 1, "something that is installed does not work"
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("lightning-memopt 1.2.3, here\n")
    assert "rich          is missing              for plan, roles" in out
    assert "[cli]         is incomplete           for all commands (lacks rich)\n" in out
    assert "[bench]       is complete             for comparisons" in out
    assert "lightning     2.4.0 is not <3,>=2.5   for Trainer" in out
    assert out.endswith(f"pip install {cli}\n"), "Triton is of no use without a device"


def test_packages_that_are_missing_broken_or_too_old(monkeypatch):
    def found(name, module="json"):
        return environment._package(name, module, "x", "y").problem

    assert found("no-such-package") == "is missing"
    assert found("torch", "no_such_module").startswith("cannot be imported (ModuleNotFoundError: ")
    monkeypatch.setattr(environment.metadata, "version", lambda name: "1.0")
    assert found("torch") == "is not <3,>=2.9"


@pytest.mark.parametrize("name", EXTRAS)
def test_doctor_knows_the_packages_of_an_extra(name):
    """The package must know them without its metadata, which a copy of it does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][name]}
    assert set(EXTRAS[name][1]) == needed - {project["name"]}


def test_doctor_names_what_an_extra_lacks(monkeypatch):
    def version(name):
        if name in ("rich", "tokenizers"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(environment.metadata, "version", version)
    assert [extra.missing for extra in environment._extras()] == [("rich",), ("tokenizers",), ()]


def words(script, *line):
    """Return what bash offers for the last word of a line."""
    program = f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lightning_memopt; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(["bash", "-c", program, "bash", *line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion(run, monkeypatch):
    for name in ("export", "inspect"):
        stub(monkeypatch, name, [])
    code, script, err = run("completion", "bash")
    assert (code, err) == (0, "")
    for line, expected in {
        ("",): {*COMMANDS, "--help", "--version", "--parser_mode"},
        ("pl",): {"plan"},
        ("plan", "--gpu"): {"--gpu-memory"},
        ("plan", "--recipe", "adapm_"): {"adapm_lean", "adapm_mini"},
        ("plan", "--recipe", "=", "adapm_l"): {"adapm_lean"},
        ("plan", "--recipe=adapm_l",): {"--recipe=adapm_lean"},
        ("roles", "--model", "mix"): {"mixtral-8x7b"},
        ("export", "--"): {"--weights", "--help"},
        ("--parser_mode", "omegaconf", "fit", "--trainer.max_s"): {"--trainer.max_steps"},
        ("fit", "--trainer.strategy", "memopt_fsdp_"): {"memopt_fsdp_offload"},
        ("fit", "--optimizer", "lightning_memopt.AdaPMM"): {"lightning_memopt.AdaPMMini"},
        ("fit", "--optimizer.state"): {"--optimizer.state_dtype"},
        ("fit", "--lr_scheduler.w"): {"--lr_scheduler.warmup_steps"},
        ("fit", "--config", "ru"): set(),  # files
    }.items():  # fmt: skip
        assert set(words(script, "lightning-memopt", *line)) == expected, line
    assert completion.script() in run("completion", "zsh")[1]
    assert "bashcompinit" in run("completion", "zsh")[1].splitlines()[0]
    assert "invalid choice: 'csh'" in run("completion", "csh")[2]


def test_folders_of_configs(tmp_path):
    project = tmp_path / "project"
    (project / "a" / "b").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    for folder in (project / "a" / "b", tmp_path):
        (folder / "x.yaml").touch()
    inside, outside = project / "a" / "b" / "x.yaml", tmp_path / "x.yaml"
    above = [str(project / "a" / "b"), str(project / "a"), str(project)]
    assert folders_of(["fit", "--config", str(inside)]) == folders_of([f"--config={inside}"]) == above
    assert folders_of(["-c", str(outside), "--config", "nothere.yaml", "--config"]) == [str(tmp_path)]
    assert folders_of(["--config", "model: {}  # " + "a config as text, longer than names of files" * 99]) == []


@pytest.mark.parametrize("printed", [print, lambda text: console().print(text)])
def test_a_reader_that_has_left(monkeypatch, printed):
    monkeypatch.setattr(sys, "argv", ["lightning-memopt", "inspect"])
    stub(monkeypatch, "inspect", [])
    monkeypatch.setattr(sys.modules[COMMANDS["inspect"].module], "main", lambda args: printed("a line"))
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as raised:
            main()
    assert raised.value.code == 141


def test_an_installed_program_in_an_empty_folder(installed, tmp_path):
    """Classes of a config are found from anywhere, and a reader that leaves is no error."""
    config = ROOT / "examples" / "pretrain" / "pretrain.yaml"
    program = (
        f"{sys.executable} -m lightning_memopt fit --config {config} --print_config | head -2; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["seed_everything: 0", done.stdout.splitlines()[-1]]
    assert done.stdout.splitlines()[-1] in ("0", "141")
    assert list(tmp_path.iterdir()) == []


def test_an_installed_program_starts(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_memopt", "plan", "--model", "gpt2", "--recipe", "adapm_lean", "adam_mini"],
        cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "gpt2: 124,439,808 parameters" in done.stdout
