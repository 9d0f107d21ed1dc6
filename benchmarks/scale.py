"""Count what one optimizer step needs on a rank, for models and numbers of ranks that no machine here could hold.

    python benchmarks/scale.py                                              # about 7 minutes
    python benchmarks/scale.py --models llama-60m --ranks 1 8 --output /tmp

The step's own code runs on the meta device, on the part of rank 0, which holds the most. Collectives are counted and
not sent. The gradient check reads numbers, so it is added by its size. Blocks with Adam's two kinds are updated by
torch's fused AdamW: no temporaries and no collectives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _report import OUTPUT, ROOT, markdown, provenance
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

import lightning_memopt as lm
from lightning_memopt.figures.style import COLORS, DPI, REFERENCE, byte_ticks, finish, new_figure
from lightning_memopt.memory.temporaries import Temporaries
from lightning_memopt.optim.bounds import Watch
from lightning_memopt.optim.stepping import Step
from lightning_memopt.planner.planned import PlannedGroup, PlannedMesh, outline, sharded_parameter, whole_parameter
from lightning_memopt.planner.scratch import updates_of
from lightning_memopt.planner.skeletons import skeleton
from lightning_memopt.plans.placement import shard_dims
from lightning_memopt.sharding.tensors import local_tensor

MODELS = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b", "llama-2-70b")
RANKS = (1, 8, 64, 256, 1024)
RECIPES = ("adamw", "adapm_lean", "adapm", "adam_snsm", "adafactor")
STEP = 2  # a tenth of the subspaces are chosen again


@dataclass(frozen=True)
class Result:
    """What a step needs on one rank: bytes of state, scratch and messages, collectives, operations on the device."""

    model: str
    recipe: str
    ranks: int
    state: int
    scratch: int
    sent: int
    collectives: int
    operations: int


class Sent(PlannedGroup):
    """Counts collectives, and the bytes that a rank sends in them on a ring."""

    def __init__(self, ranks: int) -> None:
        self.share, self.count, self.nbytes = (ranks - 1) / ranks, 0, 0.0

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> None:
        """Count a sum: its bytes go around once to be reduced, and once more to be gathered."""
        self.add(2 * sum(tensor.nbytes for tensor in tensors))

    def all_gather_single(self, output: Tensor, piece: Tensor, options: Any) -> None:
        """Count a gather."""
        self.add(output.nbytes)

    def add(self, nbytes: int) -> None:
        """Count a collective in which this many bytes go around the ring."""
        self.count, self.nbytes = self.count + 1, self.nbytes + nbytes * self.share


def divided(module: nn.Module, sent: Sent, ranks: int) -> nn.Module:
    """Return the module as the strategy shards it, on the meta device, as rank 0 sees it."""
    if ranks == 1:
        return outline(module, lambda param: whole_parameter(param, param.dtype))
    mesh, dims = PlannedMesh(ranks, group=sent), shard_dims(module, ranks)
    return outline(module, lambda param: sharded_parameter(param, param.dtype, dim=dims[param], mesh=mesh))


def measure(name: str, recipe: str, ranks: int) -> Result:
    """Count one step."""
    module, sent = skeleton(name), Sent(ranks)
    model = divided(module, sent, ranks)
    for param, grad in zip(model.parameters(), divided(module, sent, ranks).parameters(), strict=True):
        param.grad = grad
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=1e-3)
    updates, counted = updates_of(optimizer, STEP), Temporaries()
    states = {id(update.state): update.state for update in updates}.values()
    state = sum(local_tensor(value).nbytes for each in states for key, value in each.items() if key != "step")
    with torch.no_grad(), counted:
        Step(updates).run(Watch())
    if ranks > 1:
        sent.add(2 * torch.float32.itemsize * (4 * len(states) + 3))  # the gradient check: guards.verdict
    return Result(name, recipe, ranks, state, counted.peak, round(sent.nbytes), sent.count, counted.operations)


def table(results: Sequence[Result], value: str, unit: float, digits: int) -> str:
    """Return the table of one number: a row per model and recipe, a column per number of ranks."""
    ranks = sorted({result.ranks for result in results})
    rows: dict[str, dict[int, str]] = {}
    for result in results:
        number = getattr(result, value) / unit
        row = rows.setdefault(f"{result.model}, `{result.recipe}`", {})
        row[result.ranks] = f"{number:,.{digits}f}" if number >= 0.5 * 10**-digits or not number else f"< {10**-digits}"
    head = ["model, recipe", *(f"{count:,}" for count in ranks)]
    return markdown(head, [[label, *(row.get(count, "") for count in ranks)] for label, row in rows.items()])


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw state, scratch, bytes and collectives against the number of ranks, one row of panels per model."""
    models = list(dict.fromkeys(result.model for result in results))
    columns = {
        "state": "state",
        "scratch": "scratch",
        "sent in a step": "sent",
        "collectives": "collectives",
    }
    recipes = list(dict.fromkeys(result.recipe for result in results))
    ranks = sorted({result.ranks for result in results})
    looks = dict(zip(recipes, (REFERENCE, *COLORS), strict=False))
    figure = new_figure(15, 2.6 * len(models))
    axes = figure.subplots(len(models), len(columns), sharex=True, sharey="col", squeeze=False)
    for row, model in zip(axes, models, strict=True):
        for axis, (label, value) in zip(row, columns.items(), strict=True):
            for width, recipe in zip(range(len(recipes), 0, -1), recipes, strict=True):  # lines may coincide
                mine = [result for result in results if (result.model, result.recipe) == (model, recipe)]
                numbers = [getattr(result, value) or float("nan") for result in mine]
                look = {"color": looks[recipe], "linewidth": width, "markersize": width + 2}
                axis.plot([result.ranks for result in mine], numbers, marker="o", label=recipe, **look)
            axis.set_xscale("log")
            if value == "collectives":
                axis.set_yscale("log")
            else:
                axis.set_yscale("log", base=2)
                byte_ticks(axis)
            axis.set_xticks(ranks, [f"{count:,}" for count in ranks])
            axis.minorticks_off()
            finish(axis, title=f"{model}: {label}", x="ranks" if model == models[-1] else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(recipes), frameon=False)
    figure.savefig(path, dpi=DPI)


PAGE = """# A step on paper

What one optimizer step needs on the fullest rank, for LLaMAs of 60 million to 70 billion parameters in float32.
`benchmarks/scale.py` makes this page without the machines: the step's own code runs on the meta device, with the shapes
of rank 0, and collectives are counted and not sent.

![State, scratch, bytes sent and collectives against the number of ranks](scale.png)

- **State**: bytes of the optimizer's state on the rank.
- **Scratch**: the most bytes of temporaries that are alive at one time in the step: what a GPU must have free beside
  weights, gradients and state. Chunks are those of a GPU (64 MiB), and so is the limit of a wave. Work space inside an
  operation, such as a factorization, is not counted. `adamw` is torch's fused AdamW, which has no temporaries.
- **Sent**: bytes that the rank sends in the step on a ring: 2 (N − 1) / N of a sum, (N − 1) / N of a gathered tensor.
- **Collectives**: those of the step, with the gradient check. A payload of more than 64 MiB takes several.
- **Operations**: tensor operations other than views that the host starts, each at least one launch on a GPU. The
  gradient check and the fused AdamW are not counted.

The step is the second one: of `adam_snsm`, a tenth of the subspaces are chosen again.

State falls as 1 / N. What a step sends hardly depends on N, because the small factors are sent whole, whatever a rank
holds. It grows where the long side of a weight is not divisible by the number of ranks, as 11,008 by 1,024. Scratch is
at most {worst:.0f} MB here, because chunks, batches and waves have a fixed size.

Checked in other ways: torch's profiler finds the same scratch, within 12 bytes, in a real step of llama-60m on one
process (with a GPU's chunks). A process group whose other ranks do not exist finds the same 31
collectives for a LLaMA 7B with `adapm_lean` on 1,024 ranks ([communication.md](communication.md)).

{texts}

{provenance}
"""
TABLES = {
    "State (MB)": ("state", 1e6, 2),
    "Scratch (MB)": ("scratch", 1e6, 1),
    "Sent (MB)": ("sent", 1e6, 2),
    "Collectives": ("collectives", 1, 0),
    "Operations": ("operations", 1, 0),
}


def main() -> None:
    """Parse the command line, count, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    results = []
    for model in options.models:
        for recipe in options.recipes:
            for ranks in options.ranks:
                start = time.perf_counter()
                results.append(measure(model, recipe, ranks))
                print(json.dumps(asdict(results[-1])), f"{time.perf_counter() - start:.1f} s", flush=True)
    texts = "\n\n".join(f"## {title}\n\n{table(results, *how)}" for title, how in TABLES.items())
    options.output.mkdir(parents=True, exist_ok=True)
    worst = max(result.scratch for result in results) / 1e6
    page = PAGE.format(texts=texts, worst=worst, provenance=provenance())
    (options.output / "scale.md").write_text(page)
    draw(results, options.output / "scale.png")


if __name__ == "__main__":
    main()
