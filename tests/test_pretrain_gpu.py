"""benchmarks/pretrain_gpu.py at toy size: from text to page, and in pieces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# In a process of its own: the benchmarks register kinds for their controls.
CALLS = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):  # what a machine with a GPU may lack
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.split(".")[0] in ("jsonargparse", "lightning", "omegaconf", "rich", "torchmetrics")
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.path.insert(0, "benchmarks")
import pretrain_gpu

def call(folder, *given):
    shared = ["--toy", "--roots", "lightning_memopt", "--steps", "4", "--lrs", "1e-3", "4e-3"]
    pretrain_gpu.main([*shared, "--output", folder, "--work", folder, *given])
    return open(f"{folder}/pretrain_gpu.jsonl").read().splitlines()

whole, pieces, short = sys.argv[1:]
lines = call(whole)
with open(f"{pieces}/pretrain_gpu.jsonl", "w") as file:
    file.write("\\n".join(lines[:-1]) + "\\n")
for number in range(1, 20):
    if len(call(pieces, "--minutes", "0")) == len(lines):
        break
print("calls:", number)
call(short, "--minutes", "0")
"""


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """Train everything in one call; the last run in many calls; and what fits into no time."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "pieces", "short")]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, *map(str, folders)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    assert "ResumeWarning" not in done.stderr
    return done.stdout, *folders


def results(folder):
    return [json.loads(line) for line in (folder / "pretrain_gpu.jsonl").read_text().splitlines()]


def test_rates_are_tuned_before_long_runs_share_the_best_one_of_adamw(called):
    _, whole, *_ = called
    found = results(whole)
    tuning, final = found[:4], found[4:]
    assert [(each["variant"], each["lr"]) for each in tuning] == [
        (name, lr) for name in ("AdamW", "adapm_lean") for lr in (1e-3, 4e-3)
    ]
    best = min(tuning[:2], key=lambda each: each["loss"])["lr"]
    assert [(each["variant"], each["lr"]) for each in final[:2]] == [("AdamW", best), ("adapm_lean", best)]
    assert len(final[0]["curve"]) == 4
    assert final[1]["state_bytes"] < 0.2 * final[0]["state_bytes"]


def test_the_page_shows_losses_and_where_they_come_from(called):
    _, whole, *_ = called
    page = (whole / "pretrain_gpu.md").read_text()
    assert all(f"{each['loss']:.4f}" in page for each in results(whole))
    assert all(f"\n- {fact}: " in page for fact in ("date", "machine", "commit", "command"))
    assert (whole / "pretrain_gpu.png").stat().st_size > 10_000


def test_a_run_in_pieces_is_a_run_in_one(called):
    output, whole, pieces, _ = called
    assert "calls: 4\n" in output
    assert "out of time; call again to go on" in output
    keys = ("variant", "lr", "loss", "curve", "state_bytes")
    assert [[each[key] for key in keys] for each in results(pieces)] == [
        [each[key] for key in keys] for each in results(whole)
    ]
    assert not list(pieces.glob("unfinished-*"))


def test_what_does_not_fit_into_the_time_is_skipped(called):
    output, *_, short = called
    assert len(results(short)) == 1
    assert "skipped, does not fit into the time that is left" in output
    assert "No long run has ended yet." in (short / "pretrain_gpu.md").read_text()


TEXTS = """
import sys
sys.path.insert(0, "benchmarks")
import _pretrain_text
from pathlib import Path

_pretrain_text.HELD_OUT = 0.5
texts, _ = _pretrain_text._texts([Path(sys.argv[1])], 1_000_000)
print(sum("shared" in text for text in texts["validation"]), sum("shared" in text for text in texts["train"]),
      sum("alone" in text for text in texts["validation"]))
"""


def test_held_out_text_repeats_no_training_text(tmp_path):
    """All files differ, but half of them in one line alone."""
    for number in range(20):
        lines = [f"this line is shared by many files: {line}" for line in range(5)]
        (tmp_path / f"shared{number}.py").write_text("\n".join([*lines, f"and this is the file number {number}"]))
        (tmp_path / f"alone{number}.py").write_text(f"this file stands alone, and its number is {number}")
    done = subprocess.run(
        [sys.executable, "-c", TEXTS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    held_out, trained_on, alone = map(int, done.stdout.split())
    assert held_out == 0
    assert trained_on > 0
    assert alone > 0
