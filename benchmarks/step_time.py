"""Measure one optimizer step of each recipe: its time as a ratio to fused AdamW, and its memory.

    python benchmarks/step_time.py                                   # LLaMA-130M shapes, all recipes, about 10 minutes
    python benchmarks/step_time.py --size tiny --recipes adapm_lean torch_foreach --output /tmp
    python benchmarks/step_time.py --self-check                      # is the memory recorder right?

Each round times one step of fused AdamW and one of the candidate on the same parameters and gradients, in alternating
order. The ratio is the median over rounds, so a machine that throttles slows both. Other work on the same cores does
not cancel, because threads that wait for each other suffer most: use a quiet machine. The page states the load.
Gradients are new normal numbers every round, drawn outside the timed part. The first steps are not timed; their peak of
temporary memory is recorded. galore-torch, apollo-torch and adam-mini are compared if installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from _memory import PeakMemory, self_check, state_bytes
from _peers import Build, installed, peers
from _report import OUTPUT, markdown, provenance, show
from torch import nn

# hidden, intermediate, layers, heads, vocabulary
SIZES = {
    "1b": (2048, 5461, 24, 32, 32000),
    "130m": (768, 2048, 12, 12, 32000),
    "60m": (512, 1376, 8, 8, 32000),
    "tiny": (64, 172, 2, 4, 512),
}
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


def llama_shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, layers, _, vocabulary = SIZES[size]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def build_model(size: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Return a module with only a LLaMA's parameters, under transformers' names."""
    hidden, inner, layers, heads, vocabulary = SIZES[size]
    model = nn.Module()
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": hidden // heads}
    model.config = SimpleNamespace(model_type="llama", **sizes, **heads_of)
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in llama_shapes(size):
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        weight = torch.randn(shape, generator=generator, device=device) * 0.02
        parent.register_parameter(leaf, nn.Parameter(weight.to(dtype)))
    return model


class Gradients:
    """Give every parameter a new normal gradient, copied from a pool of noise, which is faster than drawing it."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.params = list(model.parameters())
        self.spare = 1_000_003
        length = max(param.numel() for param in self.params) + self.spare
        self.pool = torch.randn(length, generator=torch.Generator(device).manual_seed(1), device=device) * 1e-3
        self.pool = self.pool.to(self.params[0].dtype)
        self.offsets = torch.Generator().manual_seed(2)

    def renew(self) -> None:
        """Write the next gradients."""
        for param in self.params:
            start = int(torch.randint(self.spare, (1,), generator=self.offsets))
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.view(-1).copy_(self.pool[start : start + param.numel()])


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


def timed(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Return the seconds of one step."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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


def report(results: list[Result], args: argparse.Namespace) -> str:
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
    model = build_model(args.size, args.device, getattr(torch, args.dtype))
    gradients = Gradients(model, args.device)
    results = []
    for name in chosen:
        results.append(measure(name, available[name], model, gradients, args))
        print(dict(zip(HEAD, results[-1].row(), strict=True)), flush=True)
    results.sort(key=lambda result: result.ratio)
    show(f"optimizer step, LLaMA {args.size} shapes", HEAD, [result.row() for result in results])
    args.output.mkdir(parents=True, exist_ok=True)
    name = "step_time.md" if args.device == "cpu" else f"step_time_{args.device.split(':')[0]}.md"
    (args.output / name).write_text(report(results, args))


if __name__ == "__main__":
    main()
