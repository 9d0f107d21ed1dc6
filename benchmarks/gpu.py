"""Run the package on a GPU: check training and resuming, time a step, and profile it.

    python benchmarks/gpu.py                                  # one GPU, from the root of a checkout
    python benchmarks/gpu.py --quick --out /tmp/gpu           # fewer rounds, less than 3 minutes
    python benchmarks/gpu.py --sections facts,step

This script needs only torch, lightning and transformers. The sections are independent: if one fails, its traceback is
printed and the next one runs. The tables are written to ``gpu_tables.md`` after each section, and the profiler's own
tables to ``profile_<recipe>.txt``. Without a GPU it runs tiny sizes, to try the script; those numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from _gpu_report import Report
from _report import ROOT, provenance

sys.path.insert(0, str(ROOT))

# The module of each section, imported when the section runs: a failed import fails only its own sections.
SECTIONS = {
    "facts": "",
    "step": "_gpu_step",
    "max_update": "_gpu_step",
    "profile": "_gpu_step",
    "train": "_gpu_train",
    "guards": "_gpu_train",
    "fits": "_gpu_7b",
}


def facts(report: Report, quick: bool) -> None:
    """Report the machine and its memory bandwidth."""
    cuda = torch.cuda.is_available()
    lines = [provenance("cuda" if cuda else "cpu", torch.get_num_threads())]
    try:
        lines.append(f"- Triton: {importlib.import_module('triton').__version__}")
    except ImportError:
        lines.append("- Triton: not installed")
    if cuda:
        memory = torch.cuda.get_device_properties("cuda").total_memory
        lines.append(f"- memory: {memory / 2**30:.0f} GiB, a copy reads and writes {_bandwidth() / 1e12:.2f} TB/s")
    report.line("\n".join(lines))


def _bandwidth() -> float:
    """Return the bytes per second that a copy of one GiB reads and writes."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * source.nbytes / (start.elapsed_time(end) / 1e3)


def load(name: str) -> Callable[[Report, bool], None]:
    """Return a section's function."""
    return facts if name == "facts" else getattr(importlib.import_module(SECTIONS[name]), name)


def run(name: str, report: Report, quick: bool) -> None:
    """Run one section and write the tables, even if it fails."""
    print(f"\n=== {name}", flush=True)
    started = time.perf_counter()
    try:
        load(name)(report, quick)
    except Exception as error:
        traceback.print_exc()
        report.line(f"{name}: FAILED with {type(error).__name__}, see the output.")
    report.write()
    print(f"--- {name}: {time.perf_counter() - started:.0f} s", flush=True)


def names(text: str) -> list[str]:
    """Parse the sections, separated by commas."""
    chosen = text.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; available: {', '.join(SECTIONS)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for the tables")
    parser.add_argument("--quick", action="store_true", help="10 timed rounds instead of 20")
    parser.add_argument("--sections", type=names, default=list(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    args = parser.parse_args()
    report = Report(args.out)
    for name in args.sections:
        run(name, report, args.quick)
    print(f"\n{report.text()}")


if __name__ == "__main__":
    main()
