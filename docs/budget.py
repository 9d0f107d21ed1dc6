"""Write docs/memory-budget.md: how many devices a model needs, by memory and settings, as the planner says.

python docs/budget.py > docs/memory-budget.md    # ten minutes
"""

from __future__ import annotations

from collections.abc import Iterator

import lightning_memopt as lm
from lightning_memopt.memory.sizes import format_bytes
from lightning_memopt.planner.memory_plan import ADAMW, MemoryPlan

MODELS = ("llama-1b", "llama-7b", "llama-2-13b", "llama-3-70b")
CARDS = (24, 48, 80)
RANKS = (1, 2, 4, 8, 16, 32, 64)
RECIPE = "adapm_lean"
# Share of a device's memory that must be left for activations and the rest.
FREE = 0.15
HALF, RELEASE, BITS = {"precision": "bf16-true"}, {"gradient_release": True}, {"master_weight_bits": 24}
SETTINGS = (
    ("AdamW, float32", ADAMW, {}),
    ("AdamW, bfloat16", ADAMW, HALF),
    (f"`{RECIPE}`, float32", RECIPE, {}),
    (f"`{RECIPE}`, float32, gradient release", RECIPE, RELEASE),
    (f"`{RECIPE}`, bfloat16", RECIPE, HALF),
    (f"`{RECIPE}`, bfloat16, gradient release", RECIPE, {**HALF, **RELEASE}),
    (f"`{RECIPE}`, bfloat16 with 24 bits, gradient release", RECIPE, {**HALF, **RELEASE, **BITS}),
)


def devices(plans: list[MemoryPlan], recipe: str, card: int) -> str:
    """Return the smallest number of devices that leave enough memory free."""
    for plan in plans:
        if plan.row(recipe).total_bytes <= (1 - FREE) * card * 2**30:
            return str(plan.world_size)
    return f"> {RANKS[-1]}"


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield f"""# What fits on my card

`python docs/budget.py` generates this page with the planner, which builds the optimizer itself on the meta device. A
cell is the smallest number of devices (of {", ".join(map(str, RANKS))}) on which the peak takes at most {1 - FREE:.0%}
of the memory: parameters, gradients, optimizer state, gathered units and their gradients, and the step's scratch
([memory.md](memory.md#before-training)). The rest is for activations, which depend on your batch; with activation
checkpointing and short sequences, less is enough. "float32" is `precision="32-true"`,
"bfloat16" is `bf16-true` ([bfloat16.md](bfloat16.md)); [gradient_release.md](gradient_release.md) says what gradient
release changes. One device is planned as with `strategy="auto"`, where nothing is copied, and with
`optimizer.release_gradients(model)`. For your own model and numbers: `lightning-memopt plan`.
"""
    for model in MODELS:
        plans = {
            name: [lm.plan_memory(model, RECIPE, world_size=ranks, **options) for ranks in RANKS]
            for name, _, options in SETTINGS
        }
        first = next(iter(plans.values()))[0]
        yield f"## {model}: {first.parameters / 1e9:.1f} billion parameters\n"
        cards = " | ".join(f"{card} GiB" for card in CARDS)
        yield f"| settings | bytes per parameter | on one device | {cards} |"
        yield f"| --- | ---: | ---: |{' ---: |' * len(CARDS)}"
        for name, recipe, _ in SETTINGS:
            total = plans[name][0].row(recipe).total_bytes
            cells = " | ".join(devices(plans[name], recipe, card) for card in CARDS)
            yield f"| {name} | {total / first.parameters:.2f} | {format_bytes(total)} | {cells} |"
        yield ""


if __name__ == "__main__":
    print("\n".join(page()).rstrip())
