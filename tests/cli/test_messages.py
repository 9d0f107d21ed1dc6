"""What the command line says about mistakes: one line, with the nearest name."""

from __future__ import annotations

import sys
from pathlib import Path

import jsonargparse
import pytest
import yaml

pytest.importorskip("lightning.pytorch.cli")

from lightning_memopt.cli import MemOptCLI
from lightning_memopt.cli.class_paths import why_not
from lightning_memopt.cli.messages import LONGEST, explain
from tests._commands import keep_parsers

pytestmark = pytest.mark.slow

MODEL = "--model=tests.cli.test_memopt_cli.Tiny"
LEAN = "--optimizer=lightning_memopt.AdaPMLean"
CALLBACK = "--trainer.callbacks+=lightning_memopt.AdaptiveMomentum"


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.chdir(tmp_path)
    keep_parsers(monkeypatch, "fit")
    yield
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


@pytest.fixture
def refused(capsys):
    """Return a function that runs ``fit``, which is refused, and returns what it says."""

    def call(*args: str) -> str:
        with pytest.raises(SystemExit) as raised:
            MemOptCLI(args=list(args), parser_kwargs={"prog": "lightning-memopt"})
        shown = capsys.readouterr()
        assert (raised.value.code, shown.out) == (2, "")
        assert shown.err.count("\n") == 1
        program, text = shown.err.rstrip().split(": error: ")
        assert program in ("lightning-memopt", "lightning-memopt fit")
        return text

    return call


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["fitt"], "Unknown command 'fitt'. Did you mean 'fit'?"),
        (
            ["fit", MODEL, "--optimizer=lightning_memopt.AdaPMLeen"],
            "--optimizer lightning_memopt.AdaPMLeen: The module lightning_memopt has no 'AdaPMLeen'. Did you mean "
            "'AdaPMLean'?",
        ),
        (
            ["fit", MODEL, "--optimizer=AdaPMLeen"],
            "--optimizer: There is no class 'AdaPMLeen'. Did you mean 'AdaPMLean'? Give the path of a class",
        ),
        (["fit", "--model=tests.cli.test_memopt_cli.Tinny"], "has no 'Tinny'. Did you mean 'Tiny'?"),
        (["fit", "--model=tests.clii.x.Tiny"], "The module tests has no 'clii'. Did you mean 'cli'?"),
        (["fit", MODEL, f"{CALLBACK[:-1]}"], "has no 'AdaptiveMomentu'. Did you mean 'AdaptiveMomentum'?"),
        (
            ["fit", MODEL, "--lr_scheduler=lightning_memopt.WarmupSchedle"],
            "has no 'WarmupSchedle'. Did you mean 'WarmupSchedule'?",
        ),
        (["fit", MODEL, LEAN, "--optimizer.ranc=1"], "Unknown option of lightning_memopt.AdaPMLean 'ranc'. Did you"),
        (
            ["fit", MODEL, LEAN, "--optimizer.learning_rate=1"],
            "Unknown option of lightning_memopt.AdaPMLean 'learning_rate': it is 'lr' here. Available: lr, betas",
        ),
        (["fit", MODEL, "--trainer.max_step=3"], "option 'trainer.max_step'. Did you mean 'trainer.max_steps'?"),
        (
            ["fit", MODEL, LEAN, "--optimizer.overrides.head.rank", "8"],
            "--optimizer.overrides.head.rank: options of an override cannot be set one by one",
        ),
        (["fit", MODEL, LEAN, "--optimizer.lr=abc"], "--optimizer.lr must be float, got 'abc'."),
        (["fit", MODEL, "--model.width=x"], "--model.width must be int, got 'x'."),
        (["fit", MODEL, CALLBACK, "--trainer.callbacks.polcy=energy"], "Momentum 'polcy'. Did you mean 'policy'?"),
        (["fit", MODEL, "--trainer.max_stepz=3"], "option 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
        (["fit", MODEL, "--trainer.max_steps=x"], "--trainer.max_steps must be int, got 'x'."),
        (
            ["fit", MODEL, "--trainer.strategy=memopt_fsd"],
            "--trainer.strategy: Unknown strategy 'memopt_fsd'. Did you mean 'memopt_fsdp'? Usual ones are auto, ddp",
        ),
        (
            ["fit", MODEL, "--trainer.strategy=lightning_memopt.MemOptFSDPStrateg"],
            "The module lightning_memopt has no 'MemOptFSDPStrateg'. Did you mean 'MemOptFSDPStrategy'?",
        ),
        (
            ["fit", MODEL, "--trainer.strategy=lightning_memopt.MemOptFSDPStrategy"],
            "is a class, not a name: give it as {class_path: lightning_memopt.MemOptFSDPStrategy}.",
        ),
        (
            ["fit", MODEL, "--lr_scheduler=lightning_memopt.WarmupSchedule"],
            "lightning_memopt.WarmupSchedule needs warmup_steps: add --lr_scheduler.warmup_steps=VALUE, or set it",
        ),
        (["fit"], "There is no model: add --config FILE, or name the class with --model=package.module.Class."),
        (["fit", "run.yaml"], "run.yaml looks like a config: put --config before it."),
        (["fit", "--config=nothere.yaml"], "--config: File does not exist: "),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(refused, args, text):
    assert text in refused(*args)


@pytest.mark.parametrize(
    ("content", "args", "text"),
    [
        ({"trainer": {"max_stepz": 3}}, ["fit", "--config=x.yaml"], "Did you mean 'trainer.max_steps'?"),
        ({"trainer": {"max_steps": 3}}, ["fit", "--config=x.yaml"], "The config has no `model:`: add it, or name the"),
        (
            {"trainer": {"max_steps": 3}},
            ["--config=x.yaml", "fit"],
            "trainer.max_steps belongs to fit: put --config, and options, after `fit`.",
        ),
        (
            {"model": {"class_path": MODEL[8:], "init_args": {"width": "${trainer.max_steps}"}}},
            ["fit", "--config=x.yaml"],
            "--model.width must be int, got '${trainer.max_steps}'. Interpolations need `--parser_mode omegaconf`",
        ),
    ],
)
def test_mistakes_in_a_config(refused, content, args, text):
    Path("x.yaml").write_text(yaml.safe_dump(content))
    assert text in refused(*args)


def test_a_module_that_is_not_found_says_where_it_was_searched(refused, tmp_path):
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    (project / "setup.py").touch()
    (project / "networks.py").touch()
    (project / "configs" / "x.yaml").write_text("model: {class_path: netwoks.Mine}\n")
    said = refused("fit", "--config=project/configs/x.yaml")
    assert "There is no module 'netwoks'. Did you mean 'networks'?" in said
    assert "Searched: " in said
    assert f", {project}/configs, {project}, and installed packages." in said


def test_a_module_that_fails_is_told_from_one_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("needs_more.py").write_text("import not_installed_at_all\n")
    Path("is_wrong.py").write_text("1 / 0\n")
    assert why_not("needs_more.Model") == (
        "needs_more could not be imported, because it needs the module 'not_installed_at_all': install it."
    )
    assert "is_wrong could not be imported (ZeroDivisionError: division by zero)" in why_not("is_wrong.Model")
    assert why_not("collections.OrderedDict") == ""


def test_the_whole_message_can_be_seen(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(Exception, match="Does not validate against any of the Union subtypes"):
        MemOptCLI(args=["fit", MODEL, LEAN, "--optimizer.lr=abc"])


def test_other_messages_are_folded_and_cut():
    assert explain('Parser key "data":\n  some\n  reason', [], []) == "--data: some reason"
    assert len(explain("word " * 200, [], [])) == LONGEST + 2
