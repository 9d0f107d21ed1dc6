"""Measure the time and memory of converting one block between kinds, and plot a loss through 20 reformats.

    python benchmarks/reformat.py                                      # a block of 1024 x 4096, about 3 minutes
    python benchmarks/reformat.py --shape 64 96 --repeats 2 --output /tmp

The block is converted to the other kind and back in turns, with a step of the optimizer in between; the time is the
median. The loss is that of a tiny LLaMA that repeats four batches: random blocks get random kinds and ranks at random
steps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _memory import PeakMemory
from _report import OUTPUT, markdown, provenance, show
from torch import Tensor, nn

import lightning_memopt as lm
from lightning_memopt.figures.style import COLORS, DPI, SMALL, finish, new_figure
from lightning_memopt.figures.style import STEPS as STEPS_LABEL

NAME = "model.layers.0.mlp.up_proj.weight"
KINDS: dict[str, dict[str, Any]] = {
    "none": {"momentum": "none"},
    "low_rank 16": {"momentum": "low_rank", "rank": 16},
    "low_rank 32": {"momentum": "low_rank", "rank": 32},
    "subspace 32": {"momentum": "subspace", "rank": 32},
    "dense": {"momentum": "dense"},
}
CASES = [
    ("low_rank 16", "low_rank 32"),
    ("low_rank 32", "low_rank 16"),
    ("none", "low_rank 32"),
    ("low_rank 32", "none"),
    ("low_rank 32", "dense"),
    ("dense", "low_rank 32"),
    ("low_rank 32", "subspace 32"),
    ("subspace 32", "low_rank 32"),
    ("dense", "subspace 32"),
    ("subspace 32", "dense"),
]
HEAD = ["from", "to", "ms (release)", "ms (discard)", "peak (release)", "peak (discard)"]
VOCABULARY, LENGTH, STEPS, REFORMATS, LR = 96, 16, 120, 20, 3e-3


def convert(before: str, after: str, dropped: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a conversion, and its peak memory in units of the dense float32 momentum."""
    seconds = []
    with PeakMemory("cpu") as memory:
        weight = nn.Parameter(torch.randn(args.shape) * 0.02)
        overrides = {"mlp": {**KINDS[before], "second_moment": "factored"}}
        optimizer = lm.MemOpt([(NAME, weight)], "adamw", overrides=overrides)
        for _ in range(args.repeats):
            weight.grad = torch.randn(args.shape) * 1e-3
            optimizer.step()
            weight.grad = None
            start = time.perf_counter()
            memory.step(lambda: optimizer.reformat({NAME: KINDS[after]}, dropped=dropped))
            seconds.append(time.perf_counter() - start)
            optimizer.reformat({NAME: KINDS[before]}, dropped="discard")
    return statistics.median(seconds), max(memory.peaks) / (4 * weight.numel())


def rows(args: argparse.Namespace) -> list[list[str]]:
    """Return the table of all conversions."""
    found = []
    for before, after in CASES:
        results = [convert(before, after, dropped, args) for dropped in ("release", "discard")]
        times, peaks = zip(*results, strict=True)
        found.append([before, after, *(f"{each * 1e3:.1f}" for each in times), *(f"{each:.2f}" for each in peaks)])
        print(dict(zip(HEAD, found[-1], strict=True)), flush=True)
    return found


def some_change(draw: random.Random, optimizer: lm.MemOpt) -> tuple[str, dict[str, Any]]:
    """Return the name of a random block, and a random kind and rank for it."""
    block = draw.choice([block for block in optimizer.snapshot().blocks if len(block.shape) > 1])
    change: dict[str, Any] = {"momentum": draw.choice(["none", "dense", "low_rank", "subspace"])}
    if change["momentum"] in ("low_rank", "subspace"):
        change["rank"] = draw.randint(1, min(block.shape))
    return block.name, change


def losses(times: dict[int, random.Random], dropped: str) -> list[float]:
    """Return the loss of each step of a run with changes before the given steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))
    optimizer = lm.MemOpt(model.named_parameters(), recipe="adapm_lean", lr=LR)
    batches: list[Tensor] = [torch.randint(0, VOCABULARY, (4, LENGTH)) for _ in range(4)]
    found = []
    for step in range(STEPS):
        if step in times:
            optimizer.reformat(dict([some_change(times[step], optimizer)]), dropped=dropped)
        tokens = batches[step % 4]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def plot(curves: dict[str, list[float]], times: list[int], path: Path) -> None:
    """Plot the losses, with a mark at each reformat."""
    figure = new_figure(9, 5)
    axis = figure.add_subplot()
    for (label, curve), style, color in zip(curves.items(), ("-", "--", ":"), COLORS, strict=False):
        axis.plot(range(1, len(curve) + 1), curve, style, color=color, label=label)
    released = list(curves.values())[1]
    points = [time + 1 for time in times], [released[time] for time in times]
    axis.plot(*points, "v", color="black", markersize=5, label="a reformat before this step")
    axis.set_ylim(0, None)
    finish(axis, title="Training through changes of kinds and ranks", x=STEPS_LABEL, y="training loss")
    axis.legend(fontsize=SMALL)
    figure.savefig(path, dpi=DPI)


def report(table: list[list[str]], curves: dict[str, list[float]], args: argparse.Namespace) -> str:
    """Return the markdown page."""
    m, n = args.shape
    plain, *others = curves.values()
    apart = [max(abs(one - other) for one, other in zip(plain, curve, strict=True)) for curve in others]
    ends = [statistics.fmean(curve[-4:]) for curve in curves.values()]
    return f"""# Time and memory of a reformat

One block of {m} x {n} (factored second moment, float32) converted between momentum kinds. "ms" is the median of
{args.repeats} conversions. "peak" is the most memory allocated at a time, the new state included, above what was
allocated before, in units of the block's dense float32 momentum ({4 * m * n / 2**20:.0f} MiB). "release" also moves
the weights by what the new state cannot hold; it has no effect where nothing is dropped.

{markdown(HEAD, table)}

## The loss meanwhile

A tiny LLaMA with the recipe `adapm_lean` at a constant learning rate of {LR:g} on four random batches over and over.
{REFORMATS} times in {STEPS} steps a random matrix gets a random momentum kind and rank. The losses are at most
{apart[0]:.3f} (release) and {apart[1]:.3f} (discard) from those of the run without changes; the means of the last four
are {ends[0]:.3f} without, {ends[1]:.3f} with release, {ends[2]:.3f} with discard.

![training loss against steps](reformat.png)

{provenance("cpu", args.threads)}
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the page and the plot")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    table = rows(args)
    show(f"reformat of {args.shape[0]} x {args.shape[1]}", HEAD, table)
    times = sorted(random.Random(0).sample(range(1, STEPS), REFORMATS))
    curves = {"without reformats": losses({}, "release")}
    for dropped in ("release", "discard"):
        curves[f"{REFORMATS} reformats, {dropped}"] = losses(dict.fromkeys(times, random.Random(0)), dropped)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "reformat.md").write_text(report(table, curves, args))
    plot(curves, times, args.output / "reformat.png")


if __name__ == "__main__":
    main()
