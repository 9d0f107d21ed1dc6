"""What the README and the docs say is what runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

import lightning_memopt as lm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[-2][:40])
def test_python_in_the_readme_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(code)
    runpy.run_path(str(script))


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("lightning-memopt")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_in_the_readme_run(line, tmp_path, monkeypatch):
    from lightning_memopt.cli import MemOptCLI

    texts = tmp_path / "texts"
    texts.mkdir()
    for position in range(20):
        (texts / f"{position}.txt").write_text("to be or not to be, that is the question. " * 40)
    monkeypatch.chdir(ROOT)
    program, *args = shlex.split(line)
    assert program == "lightning-memopt"
    small = {
        "--trainer.default_root_dir": tmp_path,
        "--trainer.limit_val_batches": 1,
        "--data.cache_dir": tmp_path / "cache",
        "--model.num_hidden_layers": 1,
        "--model.hidden_size": 32,
        "--model.intermediate_size": 64,
    }
    if args[0] == "fit":
        small["--trainer.max_steps"] = 2
    if "--data.root" not in args:
        small["--data.root"] = texts
    MemOptCLI(args=[*args, *(str(item) for pair in small.items() for item in pair)])


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_the_recipe_table_lists_every_recipe_and_its_class():
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)", README, flags=re.MULTILINE)
    assert [name for name, _ in listed] == lm.recipe_names()
    assert all(hasattr(lm, cls) for _, cls in listed)


def test_the_sizes_in_the_readme_are_those_of_the_page_of_recipes():
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## Size of the state")[2].partition("Momentum only")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    column = rows[0].index("LLaMA 1B")
    exact = {row[0].strip("`"): float(row[column].rstrip("%")) for row in rows[2:]}
    for name, size in re.findall(r"^\| `(\w+)` \|.*\| ([0-9.]+)% \|$", README, flags=re.MULTILINE):
        assert float(size) == pytest.approx(exact[name], abs=0.051), name


def test_nothing_is_left_to_fill_in():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        assert not re.search(r"<[A-Z][A-Z_]+>", path.read_text()), path


def test_the_page_of_recipes_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "tables.py"))["page"]
    assert (ROOT / "docs" / "recipes.md").read_text() == page(), "run: python docs/tables.py > docs/recipes.md"
