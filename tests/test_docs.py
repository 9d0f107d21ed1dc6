"""What the README and the docs say is what runs."""

from __future__ import annotations

import ast
import doctest
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import lightning_memopt as lm
from lightning_memopt.plans.roles import NAMING_SCHEMES
from tests._commands import keep_parsers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CHOOSING = (ROOT / "docs" / "choosing.md").read_text()
PRETRAIN = (ROOT / "examples" / "pretrain" / "README.md").read_text()
MEMORY = (ROOT / "docs" / "memory.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in path.parts
}
# Whole pages that a test of their own runs.
ELSEWHERE = ("docs/first_hour.md", "docs/extending.md")
# Blocks that do not run as they are, by a text of theirs, with the reason.
EXCERPTS = {
    ("docs/command_line.md", "class Net(LightningModule)"): "a file that tests/cli/test_page.py writes",
    ("docs/gradient_release.md", "MemOptFSDPStrategy(gradient_release=True)"): "needs a module to fit",
    ("docs/roles.md", "def configure_optimizers(self)"): "a method of a module",
    ("docs/roles.md", '"*.mixer.in_proj.weight"'): "a model with such names",
    ("docs/strategy.md", "class Model(CausalModel)"): "a module of the user's",
    ("docs/strategy.md", "EMAWeightAveraging(decay=0.999)"): "needs a module to fit",
    ("docs/strategy.md", "def on_train_start(self)"): "a method of a module",
}
BLOCKS = [(page, code) for page, text in PAGES.items() for code in blocks("python", text) if page not in ELSEWHERE]


def excerpts_of(page: str, code: str) -> list[tuple[str, str]]:
    return [(where, what) for where, what in EXCERPTS if where == page and what in code]


SCRIPTS = [(page, code) for page, code in BLOCKS if ">>>" not in code and not excerpts_of(page, code)]


class Given(torch.nn.Module):
    """The model of blocks that begin after one has been made."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 64)
        self.encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 256), 2)


@pytest.mark.parametrize(
    ("page", "code"), SCRIPTS, ids=[f"{Path(page).stem}: {code.splitlines()[-1][:40]}" for page, code in SCRIPTS]
)
def test_python_in_the_pages_runs(page, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    monkeypatch.setattr(NAMING_SCHEMES, "_entries", dict(NAMING_SCHEMES._entries))
    script = tmp_path / "script.py"
    script.write_text(code)
    runpy.run_path(str(script), init_globals={"lm": lm, "model": Given()})


def test_excerpts_are_python_and_still_on_their_pages():
    found = [(named, code) for page, code in BLOCKS for named in excerpts_of(page, code)]
    assert sorted(named for named, _ in found) == sorted(EXCERPTS)
    for _, code in found:
        ast.parse(code)


COMMANDS = [
    line
    for page in (README, PRETRAIN)
    for block in blocks("bash", page)
    for line in block.splitlines()
    if line.startswith("lightning-memopt") and "--ckpt_path" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run_in_a_copy_of_the_repository(line, tmp_path, monkeypatch):
    from lightning_memopt.cli import MemOptCLI, main

    texts = tmp_path / "texts"
    texts.mkdir()
    for position in range(20):
        (texts / f"{position}.txt").write_text("to be or not to be, that is the question. " * 40)
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    program, *args = shlex.split(line)
    assert program == "lightning-memopt"
    keep_parsers(monkeypatch, "fit" if args[0] == "plan" else args[0])
    if args[0] == "plan":
        monkeypatch.setattr(sys, "argv", [program, *args])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        return
    small = {
        "--trainer.limit_val_batches": 1,
        "--data.cache_dir": tmp_path / "cache",
        "--model.model": "llama-1m",
    }
    if args[0] == "fit":
        small["--trainer.max_steps"] = 2
    if "--data.root" not in args:
        small["--data.root"] = texts
    MemOptCLI(args=[*args, *(str(item) for pair in small.items() for item in pair)])


def test_links_lead_somewhere():
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        ROOT / "benchmarks/README.md",
    ):
        for target in re.findall(r"\]\((?!https?://|mailto:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page} links to {target}"


def prose(page: str) -> list[str]:
    """Return the lines of a page without code blocks and tables."""
    text = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith("|")]


def test_prose_has_lines_of_at_most_120_columns():
    pages = {
        page for pattern in ("*", "docs/**/*", "examples/**/*", "benchmarks/*") for page in ROOT.glob(f"{pattern}.md")
    }
    pages -= {ROOT / "docs" / "errors.md", *ROOT.glob("docs/benchmarks/*.md")}  # scripts write them
    for page in pages:
        for line in prose(page.read_text()):
            words = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "x", line).split()
            assert len(line) <= 120 or len(words) == 1, f"{page.relative_to(ROOT)}: wrap {line[:60]!r}"


def test_the_recipe_table_lists_every_recipe_and_its_class():
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)", CHOOSING, flags=re.MULTILINE)
    assert [name for name, _ in listed] == lm.recipe_names()
    assert all(hasattr(lm, cls) for _, cls in listed)


def test_the_sizes_on_the_page_of_choices_are_those_of_the_page_of_recipes():
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## Size of the state")[2].partition("Momentum only")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    column = rows[0].index("LLaMA 1B")
    exact = {row[0].strip("`"): float(row[column].rstrip("%")) for row in rows[2:]}
    for name, size in re.findall(r"^\| `(\w+)` \|.*\| ([0-9.]+)% \|$", CHOOSING, flags=re.MULTILINE):
        assert float(size) == pytest.approx(exact[name], abs=0.051), name


def test_nothing_is_left_to_fill_in():
    for page, text in [*PAGES.items(), *((path.name, path.read_text()) for path in ROOT.glob("*.md"))]:
        assert not re.search(r"<[A-Z][A-Z_]+>", text), page


def test_the_page_of_recipes_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "tables.py"))["page"]
    assert (ROOT / "docs" / "recipes.md").read_text() == page(), "run: python docs/tables.py > docs/recipes.md"


@pytest.mark.parametrize("page", sorted({page for page, code in BLOCKS if ">>>" in code}))
def test_examples_on_the_pages_print_what_they_say(page):
    code = "".join(code for where, code in BLOCKS if where == page and ">>>" in code)
    example = doctest.DocTestParser().get_doctest(code, {}, page, None, 0)
    assert len(example.examples) == len(re.findall("^>>> ", code, flags=re.MULTILINE)) > 0
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_page_of_budgets_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "budget.py"))
    made["page"].__globals__.update(MODELS=("llama-1b",), RANKS=(1,))
    text = (ROOT / "docs" / "memory-budget.md").read_text()
    _, section = "\n".join(made["page"]()).split("\n## ")
    assert section.rstrip() in text, "run: python docs/budget.py > docs/memory-budget.md"
    assert all(f"## {model}:" in text for model in ("llama-7b", "llama-2-13b", "llama-3-70b"))


def shares(snapshot: lm.Snapshot, roles: tuple[str, ...], *parts: str) -> float:
    """Return the share of AdamW's state that some parts of the blocks of some roles take, in percent."""
    taken = sum(getattr(block.state, part) for block in snapshot.blocks if block.role in roles for part in parts)
    return 100 * taken / snapshot.adamw_bytes


def page_table(first: str) -> dict[str, list[float]]:
    """Return the numbers of a table of the page, by the first cell, from the line that starts with ``first`` on."""
    lines = MEMORY[MEMORY.index(first) :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: [float(cell.rstrip("%")) for cell in row[1:]] for row in rows}


LINEAR = ("query", "key", "value", "attention_output", "mlp")
ALL = (*LINEAR, "embedding", "head", "vector")
PARTS = ("momentum", "projections", "second_moment")


def planned(name: str, cls: type, **options: object) -> lm.Snapshot:
    from lightning_memopt.planner.skeletons import skeleton

    model = skeleton(name).to(options.pop("dtype", torch.float32))
    optimizer = cls(model.named_parameters(), lr=1e-3, **options)
    optimizer.bind(model)
    return optimizer.snapshot()


def test_what_snsm_keeps_is_as_the_page_of_memory_says():
    snapshot = planned("llama-1b", lm.AdamSNSM, rank=512)
    groups = {"linear weights of the layers": LINEAR, "head": ("head",), "embedding": ("embedding",)}
    groups |= {"norms": ("vector",), "all": ALL}
    found = page_table("| what | momentum | projections")
    assert list(found) == list(groups)
    for label, roles in groups.items():
        exact = [*(shares(snapshot, roles, part) for part in PARTS), shares(snapshot, roles, *PARTS)]
        assert found[label] == pytest.approx(exact, abs=0.0051), label
    layers = [block for block in snapshot.blocks if block.role in LINEAR]
    adamw = sum(block.adamw_bytes for block in layers)
    without = sum(block.state.momentum + block.state.second_moment for block in layers)
    half = planned("llama-1b", lm.AdamSNSM, rank=512, dtype=torch.bfloat16)
    stated = {
        "same weights, ([0-9.]+)% are left": 100 * sum(block.state.total for block in layers) / adamw,
        "Without them it is ([0-9.]+)%": shares(snapshot, ALL, "momentum", "second_moment"),
        "on the layers alone ([0-9.]+)%": 100 * without / adamw,
        "twice the share, ([0-9.]+)%": 100 * (1 - half.saved),
        "which keeps ([0-9.]+)%": 100 * (1 - planned("llama-1b", lm.AdamSNSM).saved),
    }
    for pattern, exact in stated.items():
        assert float(re.search(pattern, MEMORY)[1]) == pytest.approx(exact, abs=0.051), pattern


def test_what_adapm_keeps_is_as_the_page_of_memory_says():
    snapshots = [planned(name, lm.AdaPMMini) for name in ("llama-1b", "gpt2-xl")]
    matrices = tuple(role for role in ALL if role != "vector")
    groups = {
        "momentum of values (dense)": (("value",), "momentum"),
        "momentum of queries, keys, MLPs, head (rank 1/64)": (("query", "key", "mlp", "head"), "momentum"),
        "momentum of embeddings and attention outputs": (("embedding", "attention_output"), "momentum"),
        "second moments of all matrices": (matrices, "second_moment"),
        "norms and biases, both": (("vector",), *PARTS),
        "all": (ALL, *PARTS),
    }
    found = page_table("| what | LLaMA 1B | GPT-2 1.5B |")
    assert list(found) == list(groups)
    for label, (roles, *parts) in groups.items():
        assert found[label] == pytest.approx([shares(each, roles, *parts) for each in snapshots], abs=0.0051), label
    gone = re.search(r"Momentum alone: ([0-9.]+)% gone on LLaMA 1B, ([0-9.]+)% on GPT-2", MEMORY)
    exact = [100 - 2 * shares(each, ALL, "momentum", "projections") for each in snapshots]
    assert list(map(float, gone.groups())) == pytest.approx(exact, abs=0.051)


def test_the_plan_on_the_page_of_memory_is_what_is_planned():
    recipes = ["adapm_lean", "adam_snsm", "apollo"]  # each takes seconds
    plan = lm.plan_memory("llama-3-70b", recipes, world_size=64, gpu_memory="24GiB", precision="bf16-true")
    for label, *cells in plan.cells():
        shown = label.replace("torch.optim.", "torch ")
        line = next(line for line in MEMORY.splitlines() if line.startswith(f"{shown} ") and "GiB" in line)
        for cell in cells:
            assert cell in line, line
