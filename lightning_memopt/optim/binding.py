"""Maps the parameters of an optimizer to blocks: names → roles → plans → blocks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memopt.kinds.tick import block_key
from lightning_memopt.memory.temporaries import StepMemory
from lightning_memopt.optim import groups as parsing
from lightning_memopt.optim.block import Block, initial_state
from lightning_memopt.optim.checkpoint.values import described
from lightning_memopt.optim.gradient_release import GradientRelease
from lightning_memopt.optim.options import HYPERPARAMETERS
from lightning_memopt.optim.owner import owner_of, still_owns
from lightning_memopt.optim.weights import WeightBits
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipe import Recipe, known_options
from lightning_memopt.plans.recipes import load_plan
from lightning_memopt.plans.roles import Part, canonical_names, classify, unsplit
from lightning_memopt.sharding.layout import Layout

Blocks = dict[Tensor, tuple[Block, ...]]


class Binding:
    """The names, parts, plans and blocks of an optimizer's parameters.

    All tables change in place and are never rebound, since Lightning's ``LightningOptimizer`` copies the optimizer's
    attributes.

    Attributes:
        plan: The plan of every group without a recipe of its own.
        names: Parameter → canonical name, where known.
        parts: Name → the roles in it.
        plans: Parameter → the plan of its group.
        blocks: Parameter → its blocks; empty until names are known.
        reformatted: Block name → the recipe that a reformat or a checkpoint gave it.
        fused: Whether to use kernels; None for where they are available.
        head_dim: Outputs per attention head, if the user has given them.
        weights: How bfloat16 weights are kept.
        clip_update: Bound on the root mean square of a block's update.
        release: What updates layers in the backward pass, if anything does.
        measured: Where the temporaries of updates are counted, while somebody measures them.
        observers: Called after every update with the parameters that were updated.
        bound: Whether a model has told its modules and config.
        owner: The module whose ``parameters()`` the optimizer was created from. It is asked if nobody else gives names.
    """

    fused: bool | None = None  # of what an earlier version has pickled, too
    weights: WeightBits = WeightBits()
    release: GradientRelease | None = None
    measured: StepMemory | None = None
    clip_update: float | None = None
    bound: bool = False
    owner: nn.Module | None = None

    def __init__(
        self,
        plan: Plan,
        *,
        overrides: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        betas: tuple[float, float] | None,
        state_dtype: torch.dtype | None,
        seed: int,
        head_dim: int | None,
    ) -> None:
        """Store what the user asked for. With ``betas`` of None, a group uses those of its recipe."""
        self.plan, self._overrides, self._options, self._betas = plan, overrides, options, betas
        self.state_dtype, self._seed, self.head_dim = state_dtype, seed, head_dim
        self.names: dict[Tensor, str] = {}
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.plans: dict[Tensor, Plan] = {}
        self.blocks: Blocks = {}
        self.reformatted: dict[str, Recipe] = {}
        self.observers: OrderedDict[int, Callable[[set[Tensor]], None]] = OrderedDict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled, here or by an earlier version."""
        self.__dict__.update({"observers": OrderedDict(), **state})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what refers to a model: a pickled optimizer must not contain one."""
        left_out: dict[str, Any] = {"release": None, "measured": None, "observers": OrderedDict()}
        return {key: left_out.get(key, value) for key, value in self.__dict__.items() if key != "owner"}

    # ------------------------------------------------------------------ groups

    def parsed(
        self, group: dict[str, Any], names: Mapping[Tensor, str], optimizer: Optimizer
    ) -> tuple[dict[str, Any], Plan]:
        """Check a new group. Return it in the form that torch takes, with the plan of its parameters."""
        recipe, defaults, options = group.get("recipe"), optimizer.defaults, known_options()
        plan = self.plan if recipe in (None, self.plan.name) else self._plan_of(recipe)
        own = {key: group[key] for key in group if key in options}
        where = f"parameter group {len(optimizer.param_groups)}"
        parsing.check_keys(group, where)
        known = {key: defaults[key] for key in (*HYPERPARAMETERS, "recipe")}
        parsing.check_group({**known, **group}, where)
        plan = plan.updated(options=own)
        left_out = {*own, *parsing.TORCHS_OWN}
        # As in torch: either all groups have names, or none.
        if parsing.NAMES not in (optimizer.param_groups or [group])[0]:
            left_out.add(parsing.NAMES)
        elif parsing.NAMES not in group:
            group[parsing.NAMES] = [{**self.names, **names}.get(param) for param in group["params"]]
        group = parsing.plain_group({key: value for key, value in group.items() if key not in left_out})
        group["recipe"] = plan.name
        if recipe is not None and "betas" not in group and self._betas is None:
            group["betas"] = plan.betas
        return group, plan

    def _plan_of(self, recipe: Any) -> Plan:
        """Return the plan of a group's own recipe, with the optimizer's options that apply to it."""
        plan = load_plan(recipe)
        known = {key for entry in plan.roles.values() for key in entry.options()}
        options = {key: value for key, value in self._options.items() if key in known}
        return plan.updated(overrides=self._overrides, options=options)

    def complete_groups(self, optimizer: Optimizer) -> None:
        """Fill in groups that were put into ``param_groups`` directly, and find the plans of their parameters.

        On resume, Lightning's BaseFinetuning replaces the whole list with groups that hold the same hyperparameters.
        """
        for number, group in enumerate(optimizer.param_groups):
            for key, value in optimizer.defaults.items():
                group.setdefault(key, value)
            new = [param for param in group["params"] if param not in self.plans]
            if new:
                parsing.check_group(group, f"parameter group {number}")
                known = {plan.name: plan for plan in (*self.plans.values(), self.plan)}
                recipe = group["recipe"]
                plan = known[recipe] if recipe in known else self._plan_of(recipe)
                self.plans.update(dict.fromkeys(new, plan))

    # ------------------------------------------------------------------ names

    def take(self, params: Any) -> list[dict[str, Any]]:
        """Return groups of parameters without names, and remember the names or who knows them."""
        self.owner = owner_of(params)
        groups, names = parsing.split_names(params)
        self.learn(names)
        return groups

    def learn(self, names: Mapping[Tensor, str]) -> None:
        """Add names that came with parameters."""
        self.names.update(zip(names, canonical_names(names.values()), strict=True))

    def find_names(self, optimizer: Optimizer) -> None:
        """Build the blocks of all parameters. If nobody gave names until now, ask the module that owns them."""
        self.build_missing(optimizer)
        if not self.blocks and still_owns(self.owner, params_of(optimizer)):
            self.bind(self.owner, optimizer)

    def require_names(self, optimizer: Optimizer) -> None:
        """Raise an error that explains how to give names, if a parameter has none."""
        self.find_names(optimizer)
        if not self.blocks:
            parsing.named(self.names, params_of(optimizer))

    def parameter_names(self, optimizer: Optimizer) -> list[list[str]] | None:
        """Return the names of every group's parameters, or None if not all have one."""
        if any(param not in self.names for param in params_of(optimizer)):
            return None
        return [[self.names[param] for param in group["params"]] for group in optimizer.param_groups]

    def _classify(self) -> None:
        """Find the parts of all named parameters. Parts that came from a model stay."""
        pairs = [(name, param.shape) for param, name in self.names.items()]
        known = dict(self.parts)
        self.parts.update(classify(pairs, head_dim=self.head_dim))
        self.parts.update(known)

    # ------------------------------------------------------------------ blocks

    def entries(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Block]]:
        """Yield all current blocks, each with its parameter group and its parameter."""
        self.build_missing(optimizer)
        for group in optimizer.param_groups:
            for param in group["params"]:
                for block in self.blocks.get(param, ()):
                    yield group, param, block

    def build(self, optimizer: Optimizer) -> None:
        """Build the blocks of all parameters, if names are known or no parameter needs one."""
        if self.names or not any(param.ndim > 1 for param in params_of(optimizer)):
            self._classify()
            self._adopt(self._all_blocks(optimizer), optimizer)

    def build_missing(self, optimizer: Optimizer) -> None:
        """Build the blocks of parameters that have none, if any names are known."""
        self.complete_groups(optimizer)
        missing = [param for param in params_of(optimizer) if param not in self.blocks]
        if missing and (self.blocks or self.names):
            with self.undone_on_error(optimizer):
                self._classify()
                blocks = self._all_blocks(optimizer)
                self._adopt({param: blocks[param] for param in missing}, optimizer)

    def bind(self, model: Any, optimizer: Optimizer) -> None:
        """Read names and attention head sizes from a model; see :meth:`MemOpt.bind`."""
        if not hasattr(model, "named_parameters"):
            raise TypeError(f"`model` must be a module, got {described(model)}: pass the model itself.")
        self.complete_groups(optimizer)
        named = list(model.named_parameters())
        theirs = dict(zip((param for _, param in named), canonical_names(name for name, _ in named), strict=True))
        for param in params_of(optimizer):
            if param not in theirs and (param not in self.names or not theirs.keys() & self.names.keys()):
                known = self.names.get(param)
                name = "A parameter without a name," if known is None else f"The parameter {known!r}"
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} is not a parameter of the given {type(model).__name__}: "
                    "bind the model that the optimizer trains."
                )
        parts = classify(model, head_dim=self.head_dim)
        with self.undone_on_error(optimizer):
            self.names.update({param: name for param, name in theirs.items() if param not in self.names})
            self._classify()
            self.bound = True
            told = {self.names[param]: parts[name] for param, name in theirs.items()}
            # A model tells more roles than names do. What has taken steps without one keeps its kinds and its state.
            kept = {name for name in self._stepped(optimizer) if self._is_other(name) and len(told.get(name, ())) == 1}
            self.parts.update({name: each for name, each in told.items() if name not in kept})
            blocks, before = self._all_blocks(optimizer), _identity(self.blocks)
            changed = [param for param, identity in _identity(blocks).items() if before.get(param) != identity]
            if {self.names.get(param) for param in changed} & set(self._stepped(optimizer)):
                raise ValueError(
                    "bind(model) would change names, splits or head sizes of blocks that have taken steps already; "
                    "call it before the first step."
                )
            self.blocks.update(blocks)  # also those about which only a fact is new
            self._adopt({param: blocks[param] for param in changed}, optimizer)
        self.owner = None

    def _stepped(self, optimizer: Optimizer) -> list[str]:
        """Return the names of parameters that have taken steps."""
        stepped = (param for param, state in optimizer.state.items() if state and float(state["step"]) > 0)
        return [self.names[param] for param in stepped if param in self.names]

    def _is_other(self, name: str) -> bool:
        """Return whether the parameter's role is unknown."""
        return [part.role for part in self.parts.get(name, ())] == ["other"]

    @contextmanager
    def undone_on_error(self, optimizer: Optimizer) -> Iterator[None]:
        """Restore groups, names and blocks if the body raises."""
        before = [(table, dict(table)) for table in (self.names, self.parts, self.plans, self.blocks)]
        groups, bound = len(optimizer.param_groups), self.bound
        try:
            yield
        except Exception:
            self.bound = bound
            for table, entries in before:
                table.clear()
                table.update(entries)  # type: ignore[arg-type]
            del optimizer.param_groups[groups:]
            raise

    def _adopt(self, blocks: Mapping[Tensor, tuple[Block, ...]], optimizer: Optimizer) -> None:
        """Add blocks and allocate the state of those that train.

        State is complete before the first step, so every checkpoint holds all of it, and no dummy step is needed to
        learn its structure.
        """
        fresh = {param: initial_state(entries) for param, entries in blocks.items() if param.requires_grad}
        self.blocks.update(blocks)
        optimizer.state.update(fresh)

    def _all_blocks(self, optimizer: Optimizer) -> Blocks:
        """Return the blocks of all parameters under the current names, parts and plans."""
        blocks: Blocks = {}
        known: list[tuple[str, str, Recipe]] = []
        names = parsing.named(self.names, params_of(optimizer))
        for param in params_of(optimizer):
            name, plan = names[param], self.plans[param]
            own = self.parts.get(name, (Part("vector"),))
            blocks[param] = tuple(
                self._block(param, name, part, plan, len(known) + offset, fused=len(own) > 1)
                for offset, part in enumerate(own)
            )
            known += [(block.name, block.role, block.recipe) for block in blocks[param]]
        twice = [name for name, count in Counter(name for name, _, _ in known).items() if count > 1]
        if twice:
            raise ValueError(f"Two blocks have the name {twice[0]!r}; give every parameter a unique name.")
        # Modules tell both.
        parts = [part for each in self.parts.values() for part in each]
        undecided = not self.bound and any(unsplit(part) or part.role == "other" for part in parts)
        for plan in self.all_plans():
            plan.check_overrides(known, final=not undecided)
        return blocks

    def settle(self, optimizer: Optimizer) -> None:
        """Refuse overrides of roles that no weight has, now that no model will tell more of them.

        Raises:
            ValueError: If there are any. The message says what could have matched.
        """
        known = [(block.name, block.role) for *_, block in self.entries(optimizer)]
        for plan in self.all_plans():
            plan.check_matches(known)

    def all_plans(self) -> Iterable[Plan]:
        """Return the plans of all groups, each once."""
        return {id(plan): plan for plan in self.plans.values()}.values()

    def _block(self, param: Tensor, name: str, part: Part, plan: Plan, index: int, *, fused: bool) -> Block:
        full_name = f"{name}:{part.role}" if fused else name
        layout = Layout.of(
            param,
            slot=part.slot,
            state_dtype=self.state_dtype,
            output_dim=part.output_dim,
            head_dim=part.head_dim,
            flatten=part.flatten,
        )
        recipe = self.reformatted.get(full_name, plan.recipe(full_name, part.role))
        return Block(
            name=full_name,
            role=part.role,
            recipe=recipe.resolve(layout),
            layout=layout,
            prefix=f"{part.role}." if fused else "",
            key=block_key(self._seed, full_name),
            index=index,
            dtype=param.dtype,
            plan=plan,
            why=part.why,
            rates=plan.rates(full_name, part.role),
            weights=self.weights,
            clip_update=self.clip_update,
        )


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters, in the order of the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _identity(blocks: Mapping[Tensor, tuple[Block, ...]]) -> dict[Tensor, list[Any]]:
    """Return everything that decides how blocks are updated."""
    return {
        param: [(block.name, block.role, block.recipe, block.layout.slot, block.layout.matrix) for block in entries]
        for param, entries in blocks.items()
    }
