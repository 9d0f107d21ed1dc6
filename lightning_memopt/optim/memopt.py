"""MemOpt: one optimizer for every recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_memopt._registry import listed, unknown
from lightning_memopt.kinds.tick import block_key
from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.memory.storages import Storages
from lightning_memopt.optim import groups as parsing
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounding import Tally, Watch
from lightning_memopt.optim.checking import Share, Values, check_structure
from lightning_memopt.optim.checkpoint import allocated, examine, loaded, loaded_groups, require_known_state
from lightning_memopt.optim.conversion import DROPPED, converted, release
from lightning_memopt.optim.guards import Judged, exact_arithmetic, verdict
from lightning_memopt.optim.naming import arranged, places, saved_names, warn_of_positions
from lightning_memopt.optim.resuming import Facts, facts, tell
from lightning_memopt.optim.stepping import Step, Update
from lightning_memopt.plans.plan import Plan, Recipe, known_options
from lightning_memopt.plans.recipes import load_plan
from lightning_memopt.plans.roles import Part, canonical_names, classify
from lightning_memopt.sharding.consensus import decided_alike, world_size
from lightning_memopt.sharding.layout import Layout, aligned, arithmetic_dtype, is_aligned, local_tensor

NONFINITE = ("raise", "skip")
ParamsT = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MemOpt(torch.optim.Optimizer):
    """Optimizer whose state is compressed per block: a momentum kind × a second-moment kind for every role.

    With U the direction of the block's momentum kind, D the denominator of its second-moment kind and c the bound
    ``max_update``, element by element::

        W ← (1 − lr · weight_decay) W − lr · min(max(U / D, −c), c)

    Args:
        params: ``model.named_parameters()``, or group dicts whose ``params`` are such pairs. With bare parameters the
            names come from :meth:`bind`. A group may have its own values of ``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``maximize``, ``max_update``, ``recipe`` and of any option of a kind. Other keys are the
            user's own, and stay in the group, also through checkpoints, unless they look like one of these misspelt.
        recipe: Name of a recipe (see :func:`~lightning_memopt.recipe_names`), path of a recipe file, or a plan.
        lr: Learning rate.
        betas: Decay of the momentum, in [0, 1), and of the second moment, in [0, 1]; a second value of 1 adds
            squares up instead of averaging them, as AdaGrad does. None takes those of the recipe.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Rank of compressed momentum: an integer, or a fraction of each block's short side.
        overrides: Changes by role or by name pattern, for instance
            ``{"value": {"momentum": "dense"}, "*.layers.0.*": {"rank": 16}}``.
        maximize: Ascend instead of descend.
        max_update: Bound c on every element of |U / D|, which is about 1 in ordinary training: no step moves a weight
            by more than lr · c. A direction that mixes elements can be large where D is almost 0: without a bound one
            step may move a weight by 1e13 · lr (``docs/benchmarks/bound.md``). Not applied where the second moment is
            ``dense`` and the momentum ``dense`` or ``none`` (the betas bound U / D there), nor where the second moment
            is ``none`` (U has the unit of a gradient). None for no bound.
        nonfinite: What to do with a gradient that has an infinite or undefined element, or one so large that sums of
            squares overflow: ``raise``, naming the blocks, or ``skip`` the step and count it.
        state_dtype: ``float32`` or ``bfloat16``, which is rounded stochastically. None keeps state in float32, and in
            float64 for float64 parameters.
        seed: Seed of all random draws; they do not touch torch's generator.
        head_dim: Outputs per attention head, for the blockwise second moment, where no model tells.
        gap: Steps between two choices of a subspace.
        projection: How a subspace is chosen: ``power``, ``svd``, ``random`` or ``topk``.
        handover: What becomes of momentum in a new subspace: ``reset``, ``rotate`` or ``keep``.
        reduction: How a subset's squares are reduced: ``mean`` or ``sum``.
        subset_size: Elements per subset of a subset norm.
        options: Options of kinds that were registered from outside.

    Raises:
        ValueError: If any name, pattern or value is not valid; the message says what is.
        TypeError: If a value has the wrong type.
    """

    def __init__(
        self,
        params: ParamsT,
        recipe: str | Plan | Mapping[str, Any] = "adapm_lean",
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        overrides: Mapping[str, Any] | None = None,
        maximize: bool = False,
        max_update: float | None = parsing.MAX_UPDATE,
        nonfinite: str = "raise",
        state_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        head_dim: int | None = None,
        gap: int | None = None,
        projection: str | None = None,
        handover: str | None = None,
        reduction: str | None = None,
        subset_size: int | None = None,
        **options: Any,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(unknown("value of `nonfinite`", nonfinite, list(NONFINITE)))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"`seed` must be an integer, got {seed!r}.")
        options |= {"rank": rank, "gap": gap, "projection": projection, "handover": handover}
        options |= {"reduction": reduction, "subset_size": subset_size}
        parsing.check_head_dim(head_dim)
        known = [*parsing.HYPERPARAMETERS, *parsing.OF_THE_OPTIMIZER, *known_options()]
        for key in options:
            if key not in known_options():
                raise ValueError(unknown("option", key, known))
        self._plan = load_plan(recipe).updated(overrides=overrides, options=options)
        if head_dim is not None and not self._plan.has("second_moment", "blockwise"):
            raise ValueError(
                f"Option 'head_dim' has no effect in the recipe {self._plan.name!r}: it belongs to second moment "
                "'blockwise', which no role has."
            )
        self._overrides, self._options, self._betas = overrides, options, betas
        self._state_dtype = parsing.state_dtype(state_dtype)
        self._nonfinite, self._seed, self._head_dim = nonfinite, seed, head_dim
        self._counts = {"skipped": 0}
        self._tally = Tally()
        # Changed in place only: Lightning hands out a wrapper that shares these, but not what they are rebound to.
        self._names: dict[Tensor, str] = {}
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._plans: dict[Tensor, Plan] = {}
        self._blocks: dict[Tensor, tuple[Block, ...]] = {}
        self._reformatted: dict[str, Recipe] = {}
        self._trusted: set[Tensor] = set()
        self._complete = False
        groups, names = parsing.split_names(params)
        self._learn(names)
        defaults = {
            "lr": lr,
            "betas": self._plan.betas if betas is None else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "max_update": max_update,
            "recipe": self._plan.name,
        }
        parsing.check_group(defaults, "the defaults")
        defaults = parsing.plain_group(defaults)
        super().__init__(groups, defaults)
        self._complete = True
        if self._names or not any(param.ndim > 1 for param in self._all_params()):
            self._classify()
            self._build(self._all_blocks())

    # ------------------------------------------------------------------ parameters, names, plans

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with the hyperparameters and the recipe of their own.

        Raises:
            ValueError: If the optimizer knows names and these parameters have none; nothing is added then.
        """
        self._register()
        (group,), names = parsing.split_names([param_group]) if self._complete else ([param_group], {})
        recipe = group.get("recipe")
        plan = self._plan
        if recipe is not None and recipe != self._plan.name:
            plan = load_plan(recipe).updated(overrides=self._overrides, options=self._shared_options(recipe))
        own = {key: group[key] for key in group if key in known_options()}
        defaults = {key: self.defaults[key] for key in (*parsing.HYPERPARAMETERS, "recipe")}
        where = f"parameter group {len(self.param_groups)}"
        parsing.check_keys(group, where)
        parsing.check_group({**defaults, **group}, where)
        plan = plan.updated(options=own)
        left_out = {*own, *parsing.TORCHS_OWN}
        # As torch has it: names are in all groups, or in none.
        if not (parsing.NAMES in self.param_groups[0] if self.param_groups else parsing.NAMES in group):
            left_out.add(parsing.NAMES)
        elif parsing.NAMES not in group:
            group[parsing.NAMES] = [{**self._names, **names}.get(param) for param in group["params"]]
        group = parsing.plain_group({key: value for key, value in group.items() if key not in left_out})
        group["recipe"] = plan.name
        if recipe is not None and "betas" not in group and self._betas is None:
            group["betas"] = plan.betas
        if not self._complete:
            super().add_param_group(group)
            self._plans.update(dict.fromkeys(group["params"], plan))
            return
        self._extend(group, plan, names)

    def _shared_options(self, recipe: Any) -> dict[str, Any]:
        """Return those of the optimizer's options that mean something to a group's own recipe."""
        known = {key for entry in load_plan(recipe).roles.values() for key in entry.options()}
        return {key: value for key, value in self._options.items() if key in known}

    def _extend(self, group: dict[str, Any], plan: Plan, names: dict[Tensor, str]) -> None:
        """Add a group to a complete optimizer, or leave it as it was."""
        with self._undo_on_error():
            super().add_param_group(group)
            self._plans.update(dict.fromkeys(group["params"], plan))
            self._learn(names)
            self._build_missing()

    def _register(self) -> None:
        """Complete groups that somebody has put into ``param_groups``, and find the plans of their parameters.

        Lightning's BaseFinetuning replaces the whole list on resume, by groups that hold the same hyperparameters.
        """
        for number, group in enumerate(self.param_groups):
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            new = [param for param in group["params"] if param not in self._plans]
            if new:
                parsing.check_group(group, f"parameter group {number}")
                known = {plan.name: plan for plan in (*self._plans.values(), self._plan)}
                recipe = group["recipe"]
                plan = (
                    known[recipe]
                    if recipe in known
                    else load_plan(recipe).updated(overrides=self._overrides, options=self._shared_options(recipe))
                )
                self._plans.update(dict.fromkeys(new, plan))

    def _build_missing(self) -> None:
        """Make the blocks of parameters that have none, once any names are known."""
        self._register()
        missing = [param for param in self._all_params() if param not in self._blocks]
        if missing and (self._blocks or self._names):
            with self._undo_on_error():
                self._classify()
                blocks = self._all_blocks()
                self._build({param: blocks[param] for param in missing})

    def bind(self, model: Any) -> None:
        """Take names, and the size of attention heads, from the model whose parameters these are.

        Names that were given with the parameters stay, since overrides are written for them.

        Raises:
            ValueError: If a parameter has no name and is not the model's, or if steps were taken and what the model
                tells would change the blocks.
        """
        self._register()
        named = list(model.named_parameters())
        theirs = dict(zip((param for _, param in named), canonical_names(name for name, _ in named), strict=True))
        for param in self._all_params():
            if param not in theirs and (param not in self._names or not theirs.keys() & self._names.keys()):
                known = self._names.get(param)
                name = "A parameter without a name," if known is None else f"The parameter {known!r}"
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} is not a parameter of the given {type(model).__name__}: "
                    "bind the model that the optimizer trains."
                )
        parts = classify(model, head_dim=self._head_dim)
        with self._undo_on_error():
            self._names.update({param: name for param, name in theirs.items() if param not in self._names})
            self._classify()
            self._parts.update({self._names[param]: parts[name] for param, name in theirs.items()})
            blocks, before = self._all_blocks(), _identity(self._blocks)
            changed = [param for param, identity in _identity(blocks).items() if before.get(param) != identity]
            if any(float(self.state[param]["step"]) > 0 for param in changed if self.state.get(param)):
                raise ValueError(
                    "bind(model) would change names or head sizes of blocks that have taken steps already; "
                    "call it before the first step."
                )
            self._build({param: blocks[param] for param in changed})

    @torch.no_grad()
    def rebind(self, params: Mapping[Tensor, Tensor]) -> None:
        """Replace parameters by others of the same weights, such as those that FSDP2's ``fully_shard`` makes of them.

        Names, recipes, hyperparameters and state stay; every rank keeps its part of the state.

        Args:
            params: Old parameter → new parameter. Parameters that are not among the keys stay.

        Raises:
            ValueError: If a new parameter has another shape.
            NotImplementedError: If one is sharded in a way that is not supported. Nothing has changed then.
        """
        self._build_missing()
        table = {old: params.get(old, old) for old in self._all_params()}
        for old, new in table.items():
            if old.shape != new.shape:
                raise ValueError(
                    f"{self._names.get(old, 'A parameter')!r} has shape {tuple(old.shape)}, what is to replace it "
                    f"{tuple(new.shape)}: rebind replaces parameters by others of the same weights."
                )
        if len(set(table.values())) < len(table):
            raise ValueError("Two parameters are to be replaced by the same one: rebind takes a new one for each.")
        blocks = {new: tuple(block.moved(new) for block in self._blocks.get(old, ())) for old, new in table.items()}
        names = {table.get(param, param): name for param, name in self._names.items()}
        states = {
            table[param]: self._moved(blocks[table[param]], state) if blocks[table[param]] else state
            for param, state in self.state.items()
            if param in table
        }
        plans = {table.get(param, param): plan for param, plan in self._plans.items()}
        kept = {param: entries for param, entries in blocks.items() if entries}
        for own, entries in ((self._names, names), (self._plans, plans), (self._blocks, kept)):
            own.clear()
            own.update(entries)  # type: ignore[arg-type]
        for group in self.param_groups:
            group["params"] = [table[param] for param in group["params"]]
        self.state.clear()
        self.state.update(states)

    def _moved(self, blocks: tuple[Block, ...], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return state where its blocks lie now; before the first step it is made anew, also from the meta device."""
        if not state or float(state["step"]) == 0:
            return self._init(blocks) if state else {}
        return loaded(blocks, state, convert=True)[1]

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        """Restore groups, names and blocks if what follows fails."""
        before = [(table, dict(table)) for table in (self._names, self._parts, self._plans, self._blocks)]
        groups = len(self.param_groups)
        try:
            yield
        except Exception:
            for table, entries in before:
                table.clear()
                table.update(entries)  # type: ignore[arg-type]
            del self.param_groups[groups:]
            raise

    def _learn(self, names: Mapping[Tensor, str]) -> None:
        self._names.update(zip(names, canonical_names(names.values()), strict=True))

    def _classify(self) -> None:
        """Find the parts of all named parameters; what a model has told before stays."""
        pairs = [(name, param.shape) for param, name in self._names.items()]
        known = dict(self._parts)
        self._parts.update(classify(pairs, head_dim=self._head_dim))
        self._parts.update(known)

    def _require_names(self) -> None:
        """Raise the error that tells how to give names, if a parameter has none."""
        self._build_missing()
        if not self._blocks:
            parsing.named(self._names, self._all_params())

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _all_blocks(self) -> dict[Tensor, tuple[Block, ...]]:
        """Return the blocks of all parameters, as names, parts and plans are now."""
        blocks: dict[Tensor, tuple[Block, ...]] = {}
        known: list[tuple[str, str, Recipe]] = []
        names = parsing.named(self._names, self._all_params())
        for group in self.param_groups:
            for param in group["params"]:
                name, plan = names[param], self._plans[param]
                parts = self._parts.get(name, (Part("vector"),))
                blocks[param] = tuple(
                    self._block(param, name, part, plan, len(known) + offset, fused=len(parts) > 1)
                    for offset, part in enumerate(parts)
                )
                known += [(block.name, block.role, block.recipe) for block in blocks[param]]
        twice = [name for name, count in Counter(name for name, _, _ in known).items() if count > 1]
        if twice:
            raise ValueError(f"Two blocks have the name {twice[0]!r}; give every parameter a name of its own.")
        for plan in {id(plan): plan for plan in self._plans.values()}.values():
            plan.check_overrides(known)
        return blocks

    def _block(self, param: Tensor, name: str, part: Part, plan: Plan, index: int, *, fused: bool) -> Block:
        full_name = f"{name}:{part.role}" if fused else name
        layout = Layout.of(
            param,
            slot=part.slot,
            state_dtype=self._state_dtype,
            output_dim=part.output_dim,
            head_dim=part.head_dim,
            flatten=part.flatten,
        )
        recipe = self._reformatted.get(full_name, plan.recipe(full_name, part.role))
        return Block(
            name=full_name,
            role=part.role,
            recipe=recipe.resolve(layout),
            layout=layout,
            prefix=f"{part.role}." if fused else "",
            key=block_key(self._seed, full_name),
            index=index,
            itemsize=param.element_size(),
            plan=plan,
        )

    def _build(self, blocks: Mapping[Tensor, tuple[Block, ...]]) -> None:
        """Adopt blocks and allocate the state of those that train.

        State is complete before the first step: every checkpoint has it all, and nothing has to take a dummy step
        to find out what the state will look like.
        """
        fresh = {param: self._init(entries) for param, entries in blocks.items() if param.requires_grad}
        self._blocks.update(blocks)
        self.state.update(fresh)

    def _init(self, blocks: tuple[Block, ...]) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
        for block in blocks:
            state.update(block.init())
        return state

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluated first, with gradients enabled; its value is returned.

        Raises:
            ValueError: If names are not known yet, or a gradient is sparse or complex; nothing has changed then.
            RuntimeError: If ranks disagree about which sharded parameters have a gradient; nothing has changed then.
            FloatingPointError: If a gradient is not finite and ``nonfinite="raise"``, or the weights were not finite
                before the first step; nothing has changed then. Also if a weight would become infinite or undefined,
                which can only be seen while updating: such weights keep their values.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Nothing is written before all ranks agree that everything can be.
        active, bad, broken = self._usable()
        self._tally.read()
        if broken:
            raise FloatingPointError(
                f"Weights with non-finite elements before the first step in: {listed(broken)}. Weights and state "
                "are unchanged. Look at how these weights are initialised or loaded."
            )
        if bad and self._nonfinite == "raise":
            raise FloatingPointError(
                f"Gradients with non-finite or overflowing elements in: {listed(bad)}. Weights and state are "
                "unchanged. Lower the learning rate, clip gradients, or skip such steps with nonfinite='skip'."
            )
        if bad:
            self._counts["skipped"] += 1
            return loss
        self._trusted.update(param for _, param in active)
        self._trusted.intersection_update(self._all_params())
        for _, param in active:
            if not self.state.get(param):  # frozen when the optimizer was made
                self.state[param] = self._init(self._blocks[param])
        step = Step(
            Update(block, param, self.state[param], group) for group, param in active for block in self._blocks[param]
        )
        for _, param in active:
            self.state[param]["step"] += 1
        watch = self._tally.watch(self.state[param]["step"] for _, param in active)
        with exact_arithmetic({param.device.type for _, param in active}):
            step.run(watch)
        self._tally.take(watch)
        watch.require_finite()
        return loss

    def _usable(self) -> tuple[list[tuple[dict[str, Any], Tensor]], list[str], list[str]]:
        """Return all parameters with a gradient, and the names of gradients and of weights that cannot be used."""
        active, refusal = [], None
        try:
            active = self._active()
        except Exception as error:  # whatever it is, other ranks must hear of it
            refusal = error
        judged = [
            Judged(
                self._names.get(param, self._blocks[param][0].name),
                param,
                self._blocks[param][0].layout,
                fresh=param not in self._trusted,
            )
            for param in self._all_params()
            if param in self._blocks
        ]
        bad, broken = verdict(judged, refusal)
        if not all(is_aligned(param.grad, param) for _, param in active):  # type: ignore[arg-type]
            for _, param in active:
                param.grad = aligned(param.grad, param)  # type: ignore[arg-type]
            bad, broken = verdict(judged)
        return active, bad, broken

    def _active(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Return all parameters with a gradient, checked."""
        active = [(group, param) for group in self.param_groups for param in group["params"] if param.grad is not None]
        if active or any(local_tensor(param) is not param for param in self._all_params()):
            self._require_names()  # on all ranks, also on one without gradients
        for _, param in active:
            name, layout = self._blocks[param][0].name, self._blocks[param][0].layout
            if param.grad.is_sparse or param.grad.layout is not torch.strided:
                raise ValueError(f"The gradient of {name!r} is sparse; create the layer with sparse=False.")
            if param.grad.is_complex():
                raise ValueError(f"The gradient of {name!r} is complex ({param.grad.dtype}), which is not supported.")
            if param.device != layout.device or arithmetic_dtype(param) != layout.dtype:
                self._follow(param)
        return active

    def _follow(self, param: Tensor) -> None:
        """Move the state of a parameter that has been moved to another device since the optimizer was made.

        Raises:
            ValueError: If its dtype has changed, too, and steps were taken in the old one.
        """
        blocks, state = self._blocks[param], self.state.get(param, {})
        dtype = arithmetic_dtype(param)
        if dtype != blocks[0].layout.dtype and state and float(state["step"]) > 0:
            raise ValueError(
                f"{blocks[0].name!r} is {param.dtype} now, but has taken steps in {blocks[0].layout.dtype} arithmetic: "
                "create a new optimizer after changing a model's dtype."
            )
        changes: dict[str, Any] = {"device": param.device, "dtype": dtype}
        if dtype != blocks[0].layout.dtype:  # otherwise that of the state at hand, which a checkpoint may have brought
            changes["state_dtype"] = self._state_dtype or dtype
        self._blocks[param] = tuple(
            replace(block, layout=replace(block.layout, **changes), itemsize=param.element_size()) for block in blocks
        )
        self.state[param] = self._moved(self._blocks[param], state)

    # ------------------------------------------------------------------ changing and reading the plan

    @torch.no_grad()
    def reformat(self, changes: Mapping[str, Recipe | Mapping[str, Any]], *, dropped: str = "release") -> None:
        """Change kinds or ranks of blocks between two steps, converting their state one block at a time.

        A larger rank keeps the momentum exactly, a smaller one its best approximation. Where parameters are sharded,
        all ranks call this together, and it first checks that they ask for the same.

        Args:
            changes: Block name → a :class:`Recipe`, or a mapping such as ``{"momentum": "low_rank", "rank": 7}``;
                carried out in this order.
            dropped: What becomes of momentum that the new state cannot hold: ``release`` moves the weights now by what
                it would have moved them in the steps to come, lr · β₁/(1−β₁) · ΔM / D; ``discard`` forgets it.

        Raises:
            ValueError: If a block, kind or option is unknown, or a state cannot be converted; nothing has changed.
            NotImplementedError: If a kind cannot work with a block as it is sharded; nothing has changed.
            RuntimeError: If ranks ask for different changes; nothing has changed.
        """
        self._require_names()
        watch = Watch()
        for group, param, old, new in self._agreed(changes, dropped):
            state = self.state.get(param, {})
            if state:
                nothing_to_release = dropped == "discard" or float(state["step"]) == 0
                on_loss = None if nothing_to_release else release(old, new, param, state, group, watch)
                fresh = converted(old, new, state, keep=True, on_loss=on_loss, group=group)
                for kind in old.kinds:
                    for key in kind.keys:
                        del state[old.prefix + key]
                state.update(fresh)
            self._reformatted[old.name] = new.recipe
            self._blocks[param] = tuple(new if entry is old else entry for entry in self._blocks[param])
        watch.require_finite()

    def _agreed(self, changes: Mapping[str, Any], dropped: str) -> list[tuple[dict[str, Any], Tensor, Block, Block]]:
        """Return what changes, once all ranks that share parameters have found the same, or raise on all of them."""
        layouts = [block.layout for blocks in self._blocks.values() for block in blocks]
        groups = {id(group): (group, layout.device) for layout in layouts for group in layout.mesh_groups()}
        return decided_alike(
            "what to reformat",
            lambda: self._planned(changes, dropped),
            lambda planned: [
                *(f"{new.name}: {new.recipe.momentum}, {new.recipe.second_moment}" for *_, new in planned),
                f"dropped={dropped}",
            ],
            [group for group, _ in groups.values()],
            next((device for _, device in groups.values()), torch.device("cpu")),
        )

    def _planned(self, changes: Mapping[str, Any], dropped: str) -> list[tuple[dict[str, Any], Tensor, Block, Block]]:
        """Return group, parameter, block as it is and block as it will be, for every block that changes, checked."""
        if dropped not in DROPPED:
            raise ValueError(unknown("value of `dropped`", dropped, list(DROPPED)))
        places = {block.name: (group, param, block) for group, param, block in self.blocks()}
        planned = []
        for name, change in changes.items():
            if name not in places:
                raise ValueError(unknown("block", name, list(places)))
            group, param, old = places[name]
            new = old.changed(change)
            for old_kind, new_kind in zip(old.kinds, new.kinds, strict=True):
                if not old_kind.restorable and not new_kind.keeps_state_of(old_kind, old.layout):
                    raise ValueError(
                        f"The block {name!r} has kind {old_kind.name!r}, which keeps nothing that "
                        f"{new_kind.name!r} could go on from; build a new optimizer instead."
                    )
            new.check()
            if new.recipe != old.recipe:
                planned.append((group, param, old, new))
        return planned

    def blocks(self) -> Iterator[tuple[dict[str, Any], Tensor, Block]]:
        """Yield all blocks as they are now, each with its parameter group and its parameter."""
        self._build_missing()
        for group in self.param_groups:
            for param in group["params"]:
                for block in self._blocks.get(param, ()):
                    yield group, param, block

    @property
    def skipped(self) -> int:
        """Steps that were skipped because of a non-finite gradient."""
        return self._counts["skipped"]

    def snapshot(self) -> Snapshot:
        """Return frozen facts about all blocks.

        Raises:
            ValueError: If names are not known yet.
        """
        self._require_names()
        states = [state for state in self.state.values() if state]
        storages = Storages()
        return Snapshot(
            blocks=tuple(
                block.facts(self.state.get(param, {}), storages, group["max_update"])
                for group in self.param_groups
                for param in group["params"]
                if param.requires_grad or self.state.get(param)
                for block in self._blocks[param]
            ),
            step=max((int(state["step"].item()) for state in states), default=0),
            counter_bytes=storages.count(state["step"] for state in states),
            skipped=self.skipped,
            world_size=world_size(),
        )

    def plan_table(self) -> str:
        """Return a table of all blocks: name, role, shape, kinds, rank, bytes, bytes under AdamW."""
        return self.snapshot().table()

    def __repr__(self) -> str:
        self._register()
        lines = [
            f"{type(self).__name__}(recipe={group['recipe']!r}, lr={float(group['lr']):g}, betas={group['betas']}, "
            f"eps={group['eps']:g}, weight_decay={group['weight_decay']:g}, max_update={group['max_update']}, "
            f"{len(group['params'])} parameters)"
            for group in self.param_groups
        ]
        table = self.plan_table() if self._blocks else "Names are not known yet: call bind(model)."
        return "\n".join([*lines, table])

    # ------------------------------------------------------------------ saving and loading

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key in _OWN_ATTRIBUTES}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as torch's optimizers do, and the parameters' names under ``param_names``.

        The names of every group's parameters are in a list beside the groups, not in them: torch's distributed
        checkpoints know names, and break on keys in groups that an older checkpoint does not have.
        """
        self._build_missing()
        mine = set(self._all_params())
        # State of a parameter that somebody has taken out of its group, which has no position.
        apart = {param: self.state.pop(param) for param in list(self.state) if param not in mine}
        try:
            saved = super().state_dict()
        finally:
            self.state.update(apart)
        saved["param_groups"] = [parsing.plain_group(group) for group in saved["param_groups"]]
        names = self.parameter_names()
        return saved if names is None else {**saved, parsing.NAMES: names}

    def parameter_names(self) -> list[list[str]] | None:
        """Return the names of every group's parameters, or None if not all have one."""
        if any(param not in self._names for param in self._all_params()):
            return None
        return [[self._names[param] for param in group["params"]] for group in self.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, with every dtype kept.

        State goes to the parameter of its name, whatever the order; without names, to the one of its position, with a
        warning. Keys and shapes of the state decide kinds and ranks, so that a checkpoint from after a
        :meth:`reformat` loads into an optimizer that was made without it. A state dict of ``torch.optim.AdamW``, or of
        the recipe ``adamw``, loads into every recipe: its state is compressed a block at a time. Tensors may be whole,
        or DTensors of any placement; every rank keeps its part. A :class:`ResumeWarning` tells what has changed.

        Raises:
            ValueError: If it belongs to another model or another recipe, or holds what is no state, such as NaN.
            TypeError: If it is no state dict at all. Nothing has changed then.
        """
        self.prepare_load(state_dict)()

    @torch.no_grad()
    def prepare_load(
        self, state_dict: Mapping[str, Any], *, share: Share = (0, 1), ordered: bool = False
    ) -> Callable[[], None]:
        """Check all of a state dict and return a function that loads it, for when others have been checked as well.

        Args:
            state_dict: As for :meth:`load_state_dict`.
            share: This process's position, and how many processes with the same tensors divide looking at values.
            ordered: Whether groups and parameters are known to be in this optimizer's order.

        Raises:
            ValueError: As :meth:`load_state_dict` does.
            TypeError: As :meth:`load_state_dict` does.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict  # type: ignore[arg-type]
        check_structure(state_dict)
        require_known_state(state_dict, type(self).__name__)
        self._require_names()
        found = None if ordered else self._places(state_dict)
        by_torch = any(isinstance(index, str) for group in state_dict["param_groups"] for index in group["params"])
        if found is not None:
            state_dict = arranged(state_dict, found)
        groups = loaded_groups(state_dict["param_groups"], self.param_groups)
        saved = self._saved_state(state_dict)
        values = Values(share)
        for param, entries in saved.items():
            if entries:
                examine(self._blocks[param], entries, values)
        values.check()

        def load() -> None:
            if found is None and not (ordered or by_torch):
                warn_of_positions(state_dict)
            self._load(state_dict["param_groups"], groups, saved)

        return load

    @torch.no_grad()
    def _load(
        self,
        saved_groups: Sequence[Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        saved: Mapping[Tensor, Mapping[str, Any]],
    ) -> None:
        """Adopt groups and state that have been checked."""
        before, was_converted = self._facts(), False
        blocks, states = {}, {}
        for group, theirs in zip(self.param_groups, saved_groups, strict=True):
            convert = theirs.get("recipe", "adamw") != group["recipe"]
            for param in group["params"]:
                if saved[param]:
                    blocks[param], states[param] = loaded(self._blocks[param], saved[param], convert=convert)
                    was_converted |= convert
                elif param.requires_grad:
                    states[param] = self._init(self._blocks[param])
        for ours, values in zip(self.param_groups, groups, strict=True):
            ours.update(values)
        self._reformatted.update({block.name: block.recipe for entries in blocks.values() for block in entries})
        self._blocks.update(blocks)
        self.state.clear()
        self.state.update(states)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        steps = [int(state["step"].item()) for state in states.values()]
        tell(type(self).__name__, before, self._facts(), step=max(steps, default=0), converted=was_converted)

    def _facts(self) -> Facts:
        return facts(self.param_groups, (block for *_, block in self.blocks()))

    def _places(self, state_dict: Mapping[str, Any]) -> list[tuple[int, list[int]]] | None:
        """Return where the state of every parameter is, by name, or None if it goes by position."""
        theirs, ours = saved_names(state_dict), self.parameter_names()
        if theirs is None or ours is None:
            return None
        try:
            return places(theirs, ours, "state dict")
        except ValueError:
            if any(isinstance(index, str) for group in state_dict["param_groups"] for index in group["params"]):
                return None  # torch's set_optimizer_state_dict has put everything into our order, by its own names
            raise

    def allocate_state_dict(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict like ``saved``, zeros for tensors, which lie where this rank would hold them.

        For readers of sharded checkpoints, which write into tensors that are there: they fill what is returned and
        pass it to :meth:`load_state_dict`. This optimizer does not change.

        Args:
            saved: A state dict in this optimizer's order, whose tensors are only looked at for shapes (global ones)
                and dtypes: the meta device will do.

        Raises:
            ValueError: As :meth:`load_state_dict` does.
        """
        self._require_names()
        loaded_groups(saved["param_groups"], self.param_groups)
        found = self._saved_state(saved)
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        states = {
            index: allocated(param, self._blocks[param], found[param])
            for index, param in zip(indices, self._all_params(), strict=True)
            if found[param]
        }
        return {"state": states, "param_groups": saved["param_groups"]}

    def _saved_state(self, state_dict: Mapping[str, Any]) -> dict[Tensor, Mapping[str, Any]]:
        """Return the saved state of every parameter; empty where there is none and none is missed."""
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        known = set(indices)
        unknown_indices = [index for index in state_dict["state"] if index not in known]
        if unknown_indices:
            raise ValueError(f"The state dict has state for parameters {unknown_indices[:5]} that no group lists.")
        ours = any("recipe" in group for group in state_dict["param_groups"])
        found = {}
        for index, param in zip(indices, self._all_params(), strict=True):
            found[param] = state_dict["state"].get(index) or {}
            if not found[param] and param.requires_grad and ours and any(state_dict["state"].values()):
                raise ValueError(
                    f"The state dict has no state for {self._blocks[param][0].name!r}: it was frozen when that was "
                    "saved. Freeze it (requires_grad_(False)), load, and then let it train."
                )
        return found


_OWN_ATTRIBUTES = (
    "_plan", "_overrides", "_options", "_betas", "_state_dtype", "_nonfinite", "_seed", "_head_dim", "_counts",
    "_names", "_parts", "_plans", "_blocks", "_reformatted", "_tally", "_trusted", "_complete",
)  # fmt: skip


def _identity(blocks: Mapping[Tensor, tuple[Block, ...]]) -> dict[Tensor, list[Any]]:
    """Return what decides how blocks are updated."""
    return {
        param: [(block.name, block.role, block.recipe, block.layout.slot, block.layout.matrix) for block in entries]
        for param, entries in blocks.items()
    }
