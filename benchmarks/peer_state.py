"""Count the optimizer state of this package's recipes and of other packages' optimizers, in bytes per weight.

python benchmarks/peer_state.py    # packages that are not installed are left out, with their names
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _report import OUTPUT, markdown, provenance
from torch import Tensor, nn

import lightning_memopt as lm

WIDTH = 1024
RANK = WIDTH // 4
ADAMW_BYTES = 8
Build = Callable[[nn.Module], torch.optim.Optimizer]


def matrices() -> nn.Module:
    """Return two square weights under names of an MLP, so that every recipe takes them for what most weights are."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("up_proj", "down_proj")}
    return nn.ModuleDict({"mlp": nn.ModuleDict(layers)})


def others() -> Iterator[tuple[str, str, Build]]:
    """Yield label, PyPI package and builder of the optimizers of other packages."""

    def made(module: str, name: str, **options: Any) -> Build:
        return lambda model: getattr(importlib.import_module(module), name)(model.parameters(), **options)

    def projected(module: str, **options: Any) -> Build:
        group = {"rank": RANK, "update_proj_gap": 200, "proj_type": "std", **options}
        return lambda model: importlib.import_module(module).AdamW([{"params": list(model.parameters()), **group}])

    for name in ("AdamW", "Muon", "Adafactor"):
        yield f"`torch.optim.{name}`", "torch", made("torch.optim", name)
    yield (
        "`Adam_mini`",
        "adam-mini",
        lambda model: importlib.import_module("adam_mini").Adam_mini(
            model.named_parameters(), dim=WIDTH, n_heads=8, verbose=False
        ),
    )
    yield f"GaLore's `AdamW`, rank {RANK}", "galore-torch", projected("galore_torch.adamw", scale=0.25)
    random = {"proj": "random", "scale_type": "channel", "scale": 1}
    yield f"APOLLO's `AdamW`, rank {RANK}", "apollo-torch", projected("apollo_torch.apollo", **random)
    for name in ("AdamW8bit", "AdamWFp8", "AdamW4bit"):
        yield f"`{name}`", "torchao", made("torchao.optim", name)
    yield "`AdamW8bit`", "bitsandbytes", made("bitsandbytes.optim", "AdamW8bit")


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that make up a value of an optimizer's state."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def measure(build: Build) -> float:
    """Return the bytes of state per weight after one step, without numbers such as step counters."""
    model = matrices()
    optimizer = build(model)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    optimizer.step()
    held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in tensors(state) if tensor.numel() > 1)
    return held / sum(param.numel() for param in model.parameters())


def rows() -> Iterator[list[str]]:
    """Yield the rows of the table."""
    for label, package, build in others():
        try:
            size = measure(build)
        except ImportError as error:
            yield [label, package, f"not measured: {error.name} is missing", ""]
            continue
        yield [label, f"{package} {importlib.metadata.version(package)}", f"{size:.2f}", f"{size / ADAMW_BYTES:.1%}"]
    for name in lm.recipe_names():
        size = measure(lambda model, name=name: lm.MemOpt(model.named_parameters(), name))
        yield [f"`{name}`", "this package", f"{size:.2f}", f"{size / ADAMW_BYTES:.1%}"]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    page = f"""# State beside that of other packages

Bytes of optimizer state per weight, for two MLP weights of {WIDTH:,} x {WIDTH:,} in float32 after one step, without
step counters. Ranks are {RANK} for GaLore, Fira and APOLLO, and otherwise the defaults. In a whole model, embeddings,
heads, values and norms count differently: [recipes.md](../recipes.md#size-of-the-state).

{markdown(["optimizer", "from", "bytes per weight", "share of AdamW"], list(rows()))}

{provenance()}
"""
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "peer_state.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
