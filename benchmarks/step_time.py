"""Measure one optimizer step of each recipe: its time as a ratio to fused AdamW, and its memory.

    python benchmarks/step_time.py                                   # LLaMA-130M shapes, all recipes, about 10 minutes
    python benchmarks/step_time.py --size tiny --recipes adapm_lean torch_foreach --output /tmp
    python benchmarks/step_time.py --self-check                      # is the memory recorder right?

Each round times one step of fused AdamW and one of the candidate on the same parameters and gradients, in alternating
order. The ratio is the median over rounds, so a machine that throttles slows both. Other work on the same cores does
not cancel, because threads that wait for each other suffer most: use a quiet machine. The page states the load.
Gradients are new normal numbers every round, drawn outside the timed part. The first steps are not timed; their peak of
temporary memory is recorded. Optimizers of other packages are compared if they are installed: `pip install ".[bench]"`.

Two more tables need a minute: the time that Python takes, from narrow models of 12 and 48 layers, and 400
matrices of 64 x 64, where most optimizers spend their time on calls.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from _host import Table, host_times, small_matrices
from _memory import PeakMemory, self_check, state_bytes
from _peers import Build, installed, peers
from _report import OUTPUT, markdown, provenance, show
from _step_models import SIZES, Gradients, build_model, timed
from torch import nn

RECORDED = 12  # steps recorded for memory: the first, which may allocate state, and a full gap of SNSM after it
HEAD = [
    "optimizer",
    "x fused AdamW",
    "ms",
    "longest / median",
    "first / median",
    "temporaries / largest block",
    "state",
]


@dataclass(frozen=True)
class Result:
    """Measurements of one optimizer; times in seconds, temporaries and state as multiples."""

    name: str
    ratio: float
    median: float
    longest: float
    first: float
    temporaries: float
    state: float

    def row(self) -> list[str]:
        """Format as a row of the table."""
        numbers = [f"{self.ratio:.2f}", f"{self.median * 1e3:.1f}", f"{self.longest / self.median:.2f}"]
        return [self.name, *numbers, f"{self.first / self.median:.1f}", f"{self.temporaries:.2f}", f"{self.state:.1%}"]


def _recipe(name: str) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        import lightning_memopt

        optimizer = lightning_memopt.MemOpt(model.named_parameters(), recipe=name, lr=1e-3)
        optimizer.bind(model)
        return optimizer

    return build


def _paper(model: nn.Module) -> torch.optim.Optimizer:
    import lightning_memopt

    return lightning_memopt.AdamSNSM(model.named_parameters(), lr=1e-3, paper=True)


def _torch(**options: bool) -> Build:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def candidates() -> dict[str, Build]:
    """Return all optimizers that can be timed, by name."""
    found: dict[str, Build] = {"torch_fused": _torch(fused=True), "torch_foreach": _torch(foreach=True)}
    found["torch_adafactor"] = lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2)
    import lightning_memopt

    found.update({name: _recipe(name) for name in lightning_memopt.recipe_names()})
    found["adam_snsm_paper"] = _paper
    for name, package, build in peers():
        if installed(package):
            found[name] = build
        else:
            print(f"{name}: {package} is not installed, skipped")
    return found


def measure(name: str, build: Build, model: nn.Module, gradients: Gradients, args: argparse.Namespace) -> Result:
    """Compare one optimizer with fused AdamW."""
    baseline = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    firsts: list[float] = []
    gradients.renew()
    with PeakMemory(args.device) as memory:
        optimizer = build(model)
        for _ in range(RECORDED):
            gradients.renew()
            memory.step(lambda: firsts.append(timed(optimizer, args.device)))
    for _ in range(2):
        baseline.step()
    pairs: list[tuple[float, float]] = []
    for index in range(args.steps):
        gradients.renew()
        order = (baseline, optimizer) if index % 2 else (optimizer, baseline)
        seconds = {id(each): timed(each, args.device) for each in order}
        pairs.append((seconds[id(baseline)], seconds[id(optimizer)]))
    times = [candidate for _, candidate in pairs]
    dense = 2 * sum(param.numel() * param.element_size() for param in model.parameters())
    largest = max(param.numel() * param.element_size() for param in model.parameters())
    return Result(
        name=name,
        ratio=statistics.median(candidate / base for base, candidate in pairs),
        median=statistics.median(times),
        longest=max(times),
        first=firsts[0],
        temporaries=max(memory.peaks[1:]) / largest,
        state=state_bytes(optimizer.state) / dense,
    )


def report(results: list[Result], host: Table, small: Table, args: argparse.Namespace) -> str:
    """Return the markdown page."""
    hidden, inner, layers, _, vocabulary = SIZES[args.size]
    shapes = f"hidden {hidden}, intermediate {inner}, {layers} layers, vocabulary {vocabulary}, untied head"
    return f"""# Time and memory of an optimizer step

Parameters shaped like a LLaMA {args.size} ({shapes}), {args.dtype}, eager. "x fused AdamW" is the median over
{args.steps} rounds of the step's time over that of `torch.optim.AdamW(fused=True)` in the same round. "longest" is the
longest of those steps; "first" is the very first, which may allocate state or compute a first projection (GaLore's
exact SVD, repeated every 200 steps). "temporaries" is the peak memory during a step above what was allocated before
it, as a multiple of the largest block. "state" is a share of AdamW's two averages. `torch_fused` against itself shows
the noise.

{markdown(HEAD, [result.row() for result in results])}

{markdown(*host)}

The time of Python and of calls: a step of models of width 8, with 12 and with 48 layers.

{markdown(*small)}

A step of 400 matrices of 64 x 64, as a ratio to `torch.optim.AdamW(foreach=True)`.

{provenance(args.device, args.threads)}
- load of the machine before the run: {args.load:.2f}
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", help="names to time; all if not given")
    parser.add_argument("--steps", type=int, default=24, help="timed rounds; at least 11 to cover SNSM's gap of 10")
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for step_time.md")
    parser.add_argument("--self-check", action="store_true", help="check the memory recorder on known cases and stop")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.self_check:
        self_check()
        return
    torch.set_num_threads(args.threads)
    args.load = os.getloadavg()[0]
    if args.load > 0.5:
        print(f"warning: the machine is busy (load {args.load:.1f}); the ratios will not mean much", file=sys.stderr)
    available = candidates()
    chosen = args.recipes or list(available)
    if unknown := sorted(set(chosen) - set(available)):
        raise SystemExit(f"unknown or not installed: {', '.join(unknown)}; available: {', '.join(available)}")
    model = build_model(SIZES[args.size], args.device, getattr(torch, args.dtype))
    gradients = Gradients(model, args.device)
    results = []
    for name in chosen:
        results.append(measure(name, available[name], model, gradients, args))
        print(dict(zip(HEAD, results[-1].row(), strict=True)), flush=True)
    results.sort(key=lambda result: result.ratio)
    ours = [name for name in chosen if name not in {peer for peer, _, _ in peers()}]
    host = host_times({name: available[name] for name in ours}, args.device)
    small = small_matrices({name: available[name] for name in ours}, args.device)
    show(f"optimizer step, LLaMA {args.size} shapes", HEAD, [result.row() for result in results])
    show("time of Python", *host)
    show("400 matrices of 64 x 64", *small)
    args.output.mkdir(parents=True, exist_ok=True)
    name = "step_time.md" if args.device == "cpu" else f"step_time_{args.device.split(':')[0]}.md"
    (args.output / name).write_text(report(results, host, small, args))


if __name__ == "__main__":
    main()
