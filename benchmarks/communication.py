"""Count the bytes that one training step sends: those of FSDP2, and those that the optimizer adds.

    python benchmarks/communication.py                        # LLaMA 7B on 8, 64 and 1,024 ranks, about 5 minutes
    python benchmarks/communication.py --size tiny --ranks 2 --output /tmp

One process is rank 0 of a process group whose other ranks do not exist: every collective is called with real shapes and
counted, and nothing is sent. The model is sharded as the strategy shards it. Its forward and backward run on one token,
because their traffic does not depend on the batch. Then the optimizer takes two steps on random gradients, and the
second one counts. Bytes are those of the whole tensors that are gathered, reduced and scattered; a ring sends an
all-reduced byte twice, which the column "share on a ring" counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
import torch.distributed as dist
from _report import OUTPUT, ROOT, markdown, provenance, show
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT))

import lightning_memopt as lm
from lightning_memopt.plans.placement import shard_dims
from lightning_memopt.sharding import collectives
from lightning_memopt.sharding.wrapping import find_units
from tests._traffic import Traffic

# hidden, intermediate, layers, heads, vocabulary
SIZES = {"7b": (4096, 11008, 32, 32, 32000), "1b": (2048, 5461, 24, 32, 32000), "tiny": (64, 172, 2, 4, 512)}
HEAD = [
    "ranks, recipe, precision",
    "FSDP2 (GB)",
    "optimizer (MB)",
    "collectives",
    "share",
    "share on a ring",
    "state per rank (MB)",
    "× ideal",
]


@dataclass(frozen=True)
class Result:
    """Bytes and calls of one step; bytes of state on this rank and over all ranks."""

    fsdp: int
    fsdp_ring: int
    optimizer: int
    optimizer_ring: int
    calls: int
    local: int
    whole: int


def llama(size: str) -> nn.Module:
    """Return a LLaMA on the meta device."""
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def sharded(size: str, ranks: int, half: bool) -> nn.Module:
    """Return the model as the strategy shards it, with random weights."""
    mesh = init_device_mesh("cpu", (ranks,))
    root = nn.ModuleList([llama(size)])
    dims = shard_dims(root, ranks)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    )
    for unit in find_units(root):
        fully_shard(unit.module, mesh=mesh, shard_placement_fn=lambda param: Shard(dims[param]), mp_policy=policy)
    root.to_empty(device="cpu")
    for tensor in (*root.parameters(), *root.buffers()):
        (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data.normal_(std=0.02)
    return root[0]


def ring(traffic: Traffic) -> int:
    """Return the bytes that a ring sends: those of an all-reduce count twice."""
    return sum(traffic.nbytes.values()) + traffic.nbytes["allreduce"]


def measure(size: str, ranks: int, recipe: str, half: bool) -> Result:
    """Count one step."""
    model = sharded(size, ranks, half)
    optimizer = lm.MemOpt(model.named_parameters(), recipe=recipe, lr=1e-3)
    token = torch.zeros(1, 1, dtype=torch.int64)
    with Traffic() as training:
        model(input_ids=token, labels=None, use_cache=False).logits.sum().backward()
    for _ in range(2):
        for param in model.parameters():
            param.grad.to_local().normal_(std=1e-3)
        with Traffic() as stepping:
            optimizer.step()
    snapshot = optimizer.snapshot()
    return Result(
        sum(training.nbytes.values()),
        ring(training),
        sum(stepping.nbytes.values()),
        ring(stepping),
        stepping.total(),
        snapshot.local_bytes,
        snapshot.state_bytes,
    )


def row(ranks: int, recipe: str, half: bool, result: Result) -> list[str]:
    """Return a result as a row of the table."""
    return [
        f"{ranks}, {recipe}, {'bf16-mixed' if half else '32-true'}",
        f"{result.fsdp / 1e9:.2f}",
        f"{result.optimizer / 1e6:.1f}",
        str(result.calls),
        f"{result.optimizer / result.fsdp:.2%}",
        f"{result.optimizer_ring / result.fsdp_ring:.2%}",
        f"{result.local / 1e6:.2f}",
        f"{result.local * ranks / result.whole:.3f}",
    ]


def fill_gathered(output: torch.Tensor, piece: torch.Tensor, group: object) -> None:
    """Gather in a group that sends nothing: the output holds this rank's piece for every rank."""
    real(output, piece, group=group)
    output.view(-1, piece.numel()).copy_(piece)


def main() -> None:
    """Parse the command line, count, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--recipes", nargs="+", default=["adapm_lean", "adapm_mini", "adam_snsm"])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    collectives._all_gather = fill_gathered
    rows = []
    for ranks in options.ranks:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        for recipe in options.recipes:
            for half in (False, True):
                rows.append(row(ranks, recipe, half, measure(options.size, ranks, recipe, half)))
                print(*rows[-1], sep="  ", flush=True)
        dist.destroy_process_group()
    show("One training step", HEAD, rows)
    about = (
        f"LLaMA {options.size}, one training step: FSDP2 gathers the weights twice and scatters the gradients, and the "
        "optimizer adds its own collectives. The counts are from rank 0 of a process group whose other ranks do not "
        "exist: every collective is called with real shapes, and nothing is sent. Bytes are those of the whole "
        "tensors; a ring sends an all-reduced byte twice. Payloads over 64 MiB go out in several collectives of that "
        'size, so that buffers stay bounded. "× ideal" is the state on rank 0, which holds the most, over the total '
        "divided by the number of ranks."
    )
    text = f"# What a step sends\n\n{fill(about, 120)}\n\n{markdown(HEAD, rows)}\n\n{provenance()}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "communication.md").write_text(text)


real = collectives._all_gather

if __name__ == "__main__":
    main()
