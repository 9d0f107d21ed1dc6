"""Whether a plan has the effect that whoever wrote it expects."""

from __future__ import annotations

from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipe import Recipe


class PlanWarning(UserWarning):
    """A recipe, an override, an option or a naming scheme has less effect than its words promise."""


def compresses(recipe: Recipe) -> bool:
    """Return whether the kinds of a recipe differ from AdamW's, of which both averages are dense."""
    return (recipe.momentum.name, recipe.second_moment.name) != ("dense", "dense")


def compresses_any(plan: Plan) -> bool:
    """Return whether a plan compresses the matrices of any role, or any blocks that match an override."""
    roles = [recipe for role, recipe in plan.roles.items() if role != "vector"]
    changed = [recipe.changed(change) for recipe in roles for change in plan.kinds_of_overrides()]
    return any(map(compresses, [*roles, *changed]))
