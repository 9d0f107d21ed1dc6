"""Named recipes, and recipe files."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_memopt._registry import Registry, listed, nearest, unknown
from lightning_memopt.kinds.momentum import (
    ApolloMomentum,
    DenseMomentum,
    FiraMomentum,
    GaLoreMomentum,
    LowRankMomentum,
    Momentum,
    SubspaceMomentum,
)
from lightning_memopt.kinds.ranges import check_betas
from lightning_memopt.kinds.second_moment import (
    DenseSecondMoment,
    NormalizedSecondMoment,
    SecondMoment,
    SubsetNormSecondMoment,
)
from lightning_memopt.plans.effect import PlanWarning, compresses_any
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipe import Recipe, located
from lightning_memopt.plans.recipe_file import plain, read
from lightning_memopt.plans.roles import ROLES
from lightning_memopt.sharding.consensus import rank

PLANS: Registry[Plan] = Registry("recipe")

_ADAM = Recipe("dense", "dense")
_BASE = "adamw"
_FILE_KEYS = ("name", "base", "betas", "roles", "overrides")
# Momentum of adapters, whose short side is their own rank. Rank 4 is hardly better (docs/benchmarks/lora.md).
_LORA_RANK = 2
# A linear layer is one whatever its part: what the papers do to those of a transformer, they do to all.
_LINEAR = ("query", "key", "value", "attention_output", "mlp", "head", "linear")


def _named(name: str, default: Recipe, betas: tuple[float, float] = (0.9, 0.999), **roles: Recipe) -> Plan:
    """Register a plan. Roles without a recipe get ``default``, and vectors get Adam's kinds."""
    plan = Plan(name, {"vector": _ADAM, **{role: default for role in ROLES if role != "vector"}, **roles}, betas)
    return PLANS.register(name)(plan)


def _adapm(name: str, second_moment: str) -> Plan:
    """Register AdaPM's roles: no momentum (embedding, attention output), dense (value, other), else low rank."""
    low, none, dense = (Recipe(kind, second_moment) for kind in (LowRankMomentum(rank=1 / 64), "none", "dense"))
    roles = {"embedding": none, "attention_output": none, "value": dense, "other": dense}
    roles["lora"] = Recipe(LowRankMomentum(rank=_LORA_RANK), second_moment)
    roles["linear"] = low  # unknown parts of a layer are mostly projections in and out, as an MLP's
    roles["convolution"] = roles["router"] = dense  # the paper has none; they are small, and a router decides much
    return _named(name, low, (0.9, 0.95), **roles)


def _on_linear(name: str, default: Recipe, linear: Recipe, betas: tuple[float, float], **roles: Recipe) -> Plan:
    """Register a plan with a different recipe for linear weights.

    Convolutions and routers get the default, since the papers leave all but linear layers to Adam.
    """
    lora = linear
    if isinstance(linear.momentum, SubspaceMomentum):
        lora = linear.with_options({"rank": _LORA_RANK})
    return _named(name, default, betas, **{**dict.fromkeys(_LINEAR, linear), "lora": lora, **roles})


def _on_layers(name: str, momentum: Momentum) -> Plan:
    """Register a plan with Adam in a projection for the linear weights of attention and MLP.

    All else gets Adam, as in the authors' code, and so do adapters, which are small already.
    """
    return _on_linear(name, _ADAM, Recipe(momentum, "none"), (0.9, 0.999), head=_ADAM, lora=_ADAM)


ADAMW = _named("adamw", _ADAM)
ADAPM = _adapm("adapm", "dense")
ADAPM_MINI = _adapm("adapm_mini", "blockwise")
_LEAN_LORA = Recipe(LowRankMomentum(rank=_LORA_RANK), "factored")
ADAPM_LEAN = _named("adapm_lean", Recipe("low_rank", "factored"), (0.9, 0.95), lora=_LEAN_LORA)
_SNSM_LORA = Recipe(SubspaceMomentum(rank=_LORA_RANK), "factored")
SNSM_LEAN = _named("snsm_lean", Recipe("subspace", "factored"), (0.9, 0.95), lora=_SNSM_LORA)
# Matrices that map hidden vectors to hidden vectors.
_HIDDEN = ("query", "key", "value", "attention_output", "mlp", "linear", "convolution")
MUON_LEAN = _named(
    "muon_lean",
    Recipe("low_rank", "factored"),
    (0.9, 0.95),
    **dict.fromkeys(_HIDDEN, Recipe("low_rank", "orthogonal")),
    lora=_LEAN_LORA,
)
ADAM_SN = _on_linear("adam_sn", _ADAM, Recipe("dense", "subset_norm"), (0.9, 0.999))
ADAM_SNSM = _on_linear("adam_snsm", _ADAM, Recipe("subspace", "subset_norm"), (0.9, 0.999))
# The authors run AdaGrad and RMSProp without bias correction, and with sums over subsets.
_SUMS = SubsetNormSecondMoment(reduction="sum", bias_correction=False)
_RAW: SecondMoment = DenseSecondMoment(bias_correction=False)
_ADAGRAD = Recipe(DenseMomentum(bias_correction=False), _RAW)
ADAGRAD_SNSM = _on_linear(
    "adagrad_snsm", _ADAGRAD, Recipe(SubspaceMomentum(bias_correction=False), _SUMS), (0.9, 1.0), vector=_ADAGRAD
)
_RMSPROP = Recipe("none", _RAW)
RMSPROP_SN = _on_linear("rmsprop_sn", _RMSPROP, Recipe("none", _SUMS), (0.0, 0.999), vector=_RMSPROP)
ADAM_MINI = _named("adam_mini", Recipe("dense", "blockwise"))
ADAFACTOR = _named("adafactor", Recipe("none", "factored"))
# One number per output of a layer, which are the columns of an embedding.
_OUTPUTS = Recipe("none", NormalizedSecondMoment(per="input"))
SCALE = _named("scale", Recipe("none", "normalized"), embedding=_OUTPUTS, head=Recipe("dense", "normalized"))
_MUON = Recipe(DenseMomentum(nesterov=True), "orthogonal")
MUON = _on_linear("muon", _ADAM, _MUON, (0.95, 0.95), head=_ADAM, convolution=_MUON)
GALORE = _on_layers("galore", GaLoreMomentum())
FIRA = _on_layers("fira", FiraMomentum())
APOLLO = _on_layers("apollo", ApolloMomentum())
APOLLO_MINI = _on_layers("apollo_mini", ApolloMomentum(rank=1, scale=math.sqrt(128), scaling="tensor"))


def recipe_names() -> list[str]:
    """Return the names that ``recipe=`` accepts."""
    return PLANS.names()


def load_plan(recipe: str | os.PathLike[str] | Mapping[str, Any] | Plan) -> Plan:
    """Return the plan for a recipe's name, the path of a recipe file (YAML), the content of one, or a plan.

    A recipe file has the keys ``name``, ``base`` (the recipe it starts from; default ``adamw``), ``betas``, ``roles``
    (role → kinds and options) and ``overrides`` (role or name pattern → kinds, options and rates, see
    :class:`Plan`). A value may refer to another one (``${roles.mlp.rank}``), but may not call a resolver
    (``${oc.env:HOME}``).

    Raises:
        TypeError: If ``recipe`` has another type, or an entry of a file has the wrong type.
        ValueError: If a name, key, kind, role or option is unknown, a number is out of range, or a resolver is called.
        FileNotFoundError: If ``recipe`` looks like a path and the file does not exist.
    """
    if isinstance(recipe, Plan):
        return recipe
    if isinstance(recipe, Mapping):
        data = plain(recipe, "a mapping")
        return _checked(_from_mapping(data, ""), data, "The recipe")
    if isinstance(recipe, type):
        raise TypeError(
            f"`recipe` must be a name, got the class {recipe.__name__}.{nearest(recipe.__name__, PLANS.names())}"
        )
    if isinstance(recipe, int | float):
        raise TypeError(f"`recipe` must be a name, got {recipe}: if it is the learning rate, write lr={recipe}.")
    if not isinstance(recipe, str | os.PathLike):
        raise TypeError(f"`recipe` must be a name, a path, a mapping or a Plan, got {recipe!r}.")
    path = Path(recipe)
    if isinstance(recipe, str) and recipe in PLANS:
        return PLANS.get(recipe)
    if path.suffix in (".yaml", ".yml"):
        data = read(path)
        with located(f"the recipe file {str(path)!r}"):
            plan = _from_mapping(data, path.stem, path.parent)
        return _checked(plan, data, f"The recipe file {str(path)!r}")
    raise ValueError(
        f"{unknown('recipe', str(recipe), recipe_names())} Or give the path of a recipe file that ends in .yaml."
    )


def _base(base: Any, folder: Path | None) -> Plan:
    """Return the plan that a recipe file starts from: a name, or a file path relative to the recipe file."""
    if isinstance(base, str) and folder is not None and base not in PLANS and base.endswith((".yaml", ".yml")):
        data = read(folder / base)
        if str(data.get("base", "")).endswith((".yaml", ".yml")):
            raise ValueError(f"The recipe file {base!r} has a base itself; start from the name of a recipe instead.")
        return _from_mapping(data, Path(base).stem, folder)
    if isinstance(base, str) and base.endswith((".yaml", ".yml")):
        raise ValueError(f"The base {base!r} of a mapping must be a recipe's name: {', '.join(recipe_names())}.")
    return load_plan(base)


def _digest(roles: Mapping[str, Recipe]) -> str:
    """Return a name for a recipe without one. It identifies the structure of its state."""
    kinds = [f"{role}={recipe.momentum.name}*{recipe.second_moment.name}" for role, recipe in sorted(roles.items())]
    return f"custom-{hashlib.blake2b(' '.join(kinds).encode(), digest_size=4).hexdigest()}"


def _from_mapping(data: Mapping[str, Any], fallback_name: str, folder: Path | None = None) -> Plan:
    for key in data:
        if key not in _FILE_KEYS:
            hint = " A role belongs under 'roles'." if key in ROLES else ""
            raise ValueError(f"{unknown('key of a recipe file', key, list(_FILE_KEYS))}{hint}")
    base = _base(data.get("base", _BASE), folder)
    roles = dict(base.roles)
    for role, change in _section(data, "roles").items():
        if role not in ROLES:
            raise ValueError(unknown("role", role, list(ROLES)))
        with located(f"the role {role!r}"):
            roles[role] = roles[role].with_options(base.options).changed(change)
    plan = Plan(
        name=str(data.get("name", fallback_name or _digest(roles))),
        roles=roles,
        betas=_betas(data.get("betas", base.betas)),
        overrides=base.overrides,
        options=base.options,
        named_roles=tuple(_section(data, "roles")),
    )
    return plan.updated(overrides=_section(data, "overrides"))


def _checked(plan: Plan, data: Mapping[str, Any], what: str) -> Plan:
    """Return a plan. Warn if nobody has said what it starts from, and some roles depend on that."""
    left = [role for role in ROLES if role not in {*plan.named_roles, *plan.overrides, "vector"}]
    if "base" not in data and left and rank() == 0:
        if compresses_any(plan):
            so_far = f"{what} has no `base`, so roles that it does not name ({listed(left, 3)}) are those of {_BASE!r}."
        else:
            so_far = f"{what} compresses nothing: it has no `base` and starts from {_BASE!r}."
        warnings.warn(
            f"{so_far} Add `base: adapm_lean`, or `base: {_BASE}` if this is meant.", PlanWarning, stacklevel=4
        )
    return plan


def _section(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = data.get(key) or {}
    if not isinstance(section, Mapping):
        raise TypeError(f"{key!r} of a recipe file must be a mapping, got {section!r}.")
    return section


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"'betas' of a recipe file must be two numbers, got {value!r}.")
    check_betas(value, "a recipe file")
    return (float(value[0]), float(value[1]))
