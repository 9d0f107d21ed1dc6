"""Provenance of every benchmark's numbers (date, machine, commit, command), and markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "benchmarks"


def date() -> str:
    """Return today's date, in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def commit() -> str:
    """Return the measured commit, and whether the package, benchmarks or examples differ from it."""
    head = _git("rev-parse", "--short", "HEAD") or "none"
    changed = _git("status", "--porcelain", "--", "lightning_memopt", "benchmarks", "examples")
    return f"{head} with uncommitted changes" if changed else head


def machine(device: str = "cpu", threads: int | None = None) -> str:
    """Return one line with processor, cores or GPU, threads, and versions of torch and Python."""
    where = f"{_processor()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name(device)} (host: {where})"
    if threads is not None:
        where += f", {threads} thread{'s' if threads > 1 else ''}"
    return f"{where}; torch {torch.__version__}; Python {platform.python_version()}"


def command() -> str:
    """Return the command line that repeats the run from the repository's root, with relative paths."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return " ".join(["python", script, *(arg.replace(f"{ROOT}{os.sep}", "") for arg in sys.argv[1:])])


def provenance(device: str = "cpu", threads: int | None = None) -> str:
    """Return a markdown list of when, where and how a table was measured."""
    facts = {
        "date": date(),
        "machine": machine(device, threads),
        "commit": commit(),
        "command": f"`{command()}`",
    }
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def origins(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the same list for results from several runs, each with its own date, machine, commit and command."""
    facts = {key: {result[key] for result in results} for key in ("date", "machine", "commit", "command")}
    facts["command"] = {f"`{each}`" for each in facts["command"]}
    return "\n".join(f"- {key}: {'; '.join(sorted(values))}" for key, values in facts.items())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, in markdown where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title}\n\n{markdown(head, rows)}")
        return

    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
