"""Print docs/recipes.md, whose tables come from the registries: ``python docs/tables.py > docs/recipes.md``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from docstrings import table  # noqa: E402

import lightning_memopt as lm  # noqa: E402
from lightning_memopt.optim.groups import MAX_UPDATE  # noqa: E402
from lightning_memopt.planner.skeletons import skeleton  # noqa: E402
from lightning_memopt.plans.roles import ROLES  # noqa: E402

INTRO = """# Recipes and the size of their state

`python docs/tables.py` generates this page; a test checks that it is up to date.

## What each role gets

Each cell is momentum × second moment. Ranks are fractions of a matrix's short side, at least 4.
"""
COVERED = {
    "linear": (
        "Linear layers of unknown part: Mamba's projections, latent projections, poolers, projectors.",
        "`adapm*`, `galore`, `fira`, `apollo*`: as `mlp`, since most are projections in and out of a layer. `adam_sn*`,"
        " `adagrad_snsm`, `rmsprop_sn`, `muon`, `muon_lean`: as all linear layers, which is how the papers choose.",
    ),
    "convolution": (
        "Kernels of convolutions, but for patch embeddings.",
        "As `other`: the papers' models have none, and they are a small part of most models. `muon`,"
        " `muon_lean`: as linear layers, flattened to matrices, as its author does.",
    ),
    "router": (
        "Routers of a mixture of experts.",
        "As `other`: they are small, and every expert's training depends on them.",
    ),
    "lora": (
        "Both factors of low-rank adapters.",
        "As linear layers, with momentum of rank 2: with r=16, that did better than AdamW"
        " ([benchmarks/lora.md](benchmarks/lora.md)). `muon_lean`: as the embedding,"
        " with rank 2. `galore`, `fira`, `apollo*`: Adam's kinds.",
    ),
    "vector": (
        "Parameters with at most one size above 1, norms, and biases of any shape.",
        "Adam's kinds: vectors take little memory.",
    ),
    "other": (
        "Matrices whose part in the model is unknown.",
        "`adapm`, `adapm_mini`: dense momentum. `adapm_lean`, `scale`: as all matrices. `muon_lean`: as the"
        " embedding. `adam_sn*`, `muon`: Adam's kinds, since nothing says that they are linear layers.",
    ),
}
MODELS = {f"LLaMA {size.upper()}": f"llama-{size}" for size in ("60m", "130m", "350m", "1b", "7b")} | {
    "GPT-2 1.5B": "gpt2-1.5b"
}
BOUND = f"""
## The bound on one step

Apart from weight decay, no step moves a weight by more than `max_update` times the learning rate ({MAX_UPDATE:g} by
default, per parameter group) in blocks whose kinds do not bound the step themselves: every element of |U / D| is
bounded. In ordinary training |U / D| is about 1. But low-rank and subspace momentum mix the elements of a gradient, and
means of squares hide small ones. Where gradients are mostly zero, after a spike or after a long silence, D is almost 0
where U is not. Without a bound, one step has moved a weight by millions of learning rates
([benchmarks/bound.md](benchmarks/bound.md)).

- Not bounded: dense or no momentum with dense second moment (AdamW, RMSProp). There |U / D| is at most about
  1/√(1 − β₂) without momentum: 4.5 for 0.95, 32 for 0.999. So `adamw` stays equal to torch's AdamW.
- Not bounded: second moment `normalized` or `orthogonal`. U is divided by a norm of its own, which bounds U / D by the
  root of the number of weights that share it, and by 1.2 times the factor of `adjust_lr_fn`.
- Not bounded: second moment `none`, except beside `galore`, `fira` and `apollo`, which divide by a root of squares
  themselves. Elsewhere U has the unit of a gradient, so clip gradients to bound it.
- Momentum that a smaller rank releases at once is bounded like one step, for all kinds.
- The plan table shows the bound of each block. If more than 1% of all elements in bounded blocks exceed it in three
  counts in a row (every tenth step, from step 20), the first process warns once.
- `max_update=None` removes the bound. A checkpoint from before the bound existed gets the configured one.
- `clip_update=1.0` bounds the root mean square of each block's update as well, as Adafactor does: a block that is above
  it is scaled down as a whole. It is off by default, since it takes another pass over the update and another sum over
  the ranks that share a block.
- Weights stay finite, or `FloatingPointError` names the block. This holds without a bound and in float16 too.
"""
SIZES = """
## Size of the state

The tables count bytes of momentum and second moments, projections included, in float32, as a share of
`torch.optim.AdamW`'s on the same float32 parameters. Both sides leave out step counters. LLaMA has a vocabulary of
32,000 and an untied head (the sizes of the GaLore and SNSM papers, and 7B); GPT-2 has 50,257 tokens and tied
embeddings.
"""
MOMENTUM = """
Momentum only, as a share of AdamW's momentum. For `galore`, `fira` and `apollo*`, that includes the second moment
inside of the projection, which belongs to the momentum kind:
"""
FILES = """
## Recipe files

A file (YAML) takes the place of a recipe's name: `lm.MemOpt(params, recipe="mine.yaml")`.

```yaml
name: wide_mlp          # for messages and checkpoints; the file's name if left out
base: adapm_lean        # what it starts from: a recipe's name, or another file
betas: [0.9, 0.95]
roles:                  # roles of the tables above: kinds and options
  mlp: {momentum: low_rank, rank: 8}
overrides:              # roles or patterns: kinds, options and rates
  "*.layers.0.*": {momentum: dense}
  vector: {weight_decay: 0}
```

Without `base`, a file starts from `adamw`: roles that it does not name have AdamW's state. If nothing is compressed
then, a `PlanWarning` says so. Patterns that begin with `*` need quotes in YAML. Errors name the file, and the role or
override. Before the first step, a `PlanWarning` names roles of the file that no weight has.
"""
NOTES = """
`adam_snsm` and `muon` keep AdamW's full state for embeddings, and `muon` also for the head, so small models with large
vocabularies keep more. `scale` keeps the head's momentum: next to nothing where embeddings are tied.
With `state_dtype="bfloat16"`, every number above is halved.
"""


def recipe_table() -> str:
    """Return the table of the kinds that each recipe gives each role."""

    def cell(recipe: lm.Recipe) -> str:
        rank = getattr(recipe.momentum, "rank", None)
        suffix = "" if rank is None else f" {rank}" if isinstance(rank, int) else f" 1/{round(1 / rank)}"
        return f"{recipe.momentum.name}{suffix} × {recipe.second_moment.name}"

    plans = [lm.load_plan(name) for name in lm.recipe_names()]
    rows = ([f"`{plan.name}`", str(plan.betas), *(cell(plan.roles[role]) for role in ROLES)] for plan in plans)
    return table(["recipe", "betas", *ROLES], rows)


def covered_table() -> str:
    """Return the table of the roles whose names do not tell everything."""
    return table(["role", "covers", "what recipes do, and why"], ([f"`{role}`", *COVERED[role]] for role in COVERED))


def size_tables() -> tuple[str, str]:
    """Return the tables of each recipe's share of AdamW's state and of its momentum, per architecture."""
    models = {label: skeleton(name) for label, name in MODELS.items()}
    variants = {f"`{name}`": {"recipe": name} for name in lm.recipe_names()}
    variants["`adam_snsm`, rank 1/4"] = {"recipe": "adam_snsm", "rank": 1 / 4}
    whole, momentum = [], []
    for label, options in variants.items():
        snapshots = []
        for model in models.values():
            optimizer = lm.MemOpt(model.named_parameters(), **options)
            optimizer.bind(model)
            snapshots.append(optimizer.snapshot())
        whole.append([label, *(f"{entry.state_bytes / entry.adamw_bytes:.2%}" for entry in snapshots)])
        momentum.append([label, *(f"{2 * entry.momentum_bytes / entry.adamw_bytes:.2%}" for entry in snapshots)])
    header = ["recipe", *models]
    return table(header, whole), table(header, momentum)


def page() -> str:
    """Return the whole page."""
    whole, momentum = size_tables()
    roles = f"{recipe_table()}\n\n{covered_table()}"
    return f"{INTRO}\n{roles}\n{FILES}{BOUND}\n{SIZES.lstrip()}\n{whole}\n{MOMENTUM}\n{momentum}\n{NOTES}"


if __name__ == "__main__":
    print(page(), end="")
