"""MemOpt: one optimizer for every recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_memopt.memory.snapshot import Snapshot
from lightning_memopt.memory.temporaries import StepMemory
from lightning_memopt.optim import groups as parsing
from lightning_memopt.optim import rebinding, reformat
from lightning_memopt.optim.binding import Binding, params_of
from lightning_memopt.optim.block import Block, initial_state
from lightning_memopt.optim.bounds import Tally
from lightning_memopt.optim.checkpoint import load
from lightning_memopt.optim.checkpoint.values import Share
from lightning_memopt.optim.facts import snapshot_of
from lightning_memopt.optim.gradient_release import GradientRelease, units_of
from lightning_memopt.optim.gradients import refuse, usable
from lightning_memopt.optim.options import check_options
from lightning_memopt.optim.stepping import take_step
from lightning_memopt.optim.weights import full_weight, weight_bits
from lightning_memopt.plans.plan import Plan
from lightning_memopt.plans.recipe import Recipe
from lightning_memopt.plans.recipes import load_plan

_PICKLED = ("_binding", "_nonfinite", "_counts", "_tally", "_trusted", "_complete")
ParamsT = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MemOpt(torch.optim.Optimizer):
    """Optimizer with compressed state: every role has a momentum kind × a second-moment kind.

    With U the direction of the momentum kind, D the denominator of the second-moment kind and c = ``max_update``::

        W ← (1 − lr · weight_decay) W − lr · min(max(U / D, −c), c)

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, or group dicts whose ``params`` are named pairs.
            :meth:`bind` names all others. A group may have its own ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``maximize``, ``max_update``, ``recipe`` and kind options. Other keys are yours, unless they resemble one.
        recipe: Name of a recipe (see :func:`~lightning_memopt.recipe_names`), path of a recipe file, or a plan.
        lr: Learning rate.
        betas: Decay rates of the momentum, in [0, 1), and of the second moment, in [0, 1], where 1 sums squares as
            AdaGrad does. None takes those of the recipe.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Rank of compressed momentum: an integer, or a fraction of each block's short side.
        overrides: Changes by role or pattern: ``{"value": {"momentum": "dense"}, "*.layers.0.*": {"rank": 16}}``, also
            of the group's rates: ``{"embedding": {"lr_multiplier": 10}, "vector": {"weight_decay": 0}}``.
        maximize: Ascend instead of descend.
        max_update: Bound c on every element of |U / D|, which is about 1 in ordinary training; None for no bound.
            Without it, one step could move a weight by 1e13 · lr where D is almost 0 (``docs/benchmarks/bound.md``).
            Unused where U / D has a bound (dense × dense, none × dense, a norm of U), and where U has the unit of a
            gradient and no second moment divides it.
        clip_update: Bound on the root mean square of U / D over each block, which is scaled down where it is larger
            (Adafactor's update clipping, arXiv 1804.04235, whose bound is 1.0). None for no bound. It needs one more
            pass, and one more sum over ranks. Not saved.
        fused: Whether to use Triton kernels on CUDA. None: where they pass a check; True: always. Not saved.
        nonfinite: ``raise`` (naming blocks) or ``skip`` (and count) steps whose gradients, or their squares, overflow.
        bf16_stochastic_round: Whether the last bit of a bfloat16 weight rounds up with the probability of the
            remainder, or to nearest, which drops updates below 1/512 of a weight.
        master_weight_bits: 24 or 32 to keep 8 or 16 more bits of every bfloat16 weight, as state; 16 for none.
        state_dtype: ``float32``, or ``bfloat16`` with stochastic rounding. None: float32 (float64 for float64 weights).
        seed: Seed of all random draws, which do not use torch's generator.
        head_dim: Outputs per attention head, for the blockwise second moment, if no model provides it.
        gap: Steps between two choices of a subspace.
        projection: How to choose a subspace: ``power``, ``svd``, ``random`` or ``topk``.
        handover: What happens to momentum in a new subspace: ``reset``, ``rotate`` or ``keep``.
        reduction: How to reduce a subset's squares: ``mean`` or ``sum``.
        subset_size: Elements per subset of a subset norm.
        scale: Factor on the update of Adam in a projection (``galore``, ``fira``, ``apollo``).
        scaling: What shares a factor with ``apollo``: each ``channel`` or the whole ``tensor``.
        growth: Bound on the growth of the norm of a scaled gradient from one step to the next (``fira``, ``apollo``).
        options: Options of kinds that have no argument here: ``stagger``, ``correct_eps`` and others of this package
            (``docs/options.md``), and those of kinds that another package registered.

    Raises:
        ValueError: If a name, pattern or value is not valid. The message says what is.
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
        clip_update: float | None = None,
        fused: bool | None = None,
        nonfinite: str = "raise",
        bf16_stochastic_round: bool = True,
        master_weight_bits: int = 16,
        state_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        head_dim: int | None = None,
        gap: int | None = None,
        projection: str | None = None,
        handover: str | None = None,
        reduction: str | None = None,
        subset_size: int | None = None,
        scale: float | None = None,
        scaling: str | None = None,
        growth: float | None = None,
        **options: Any,
    ) -> None:
        options |= {"rank": rank, "gap": gap, "projection": projection, "handover": handover}
        options |= {"reduction": reduction, "subset_size": subset_size}
        options |= {"scale": scale, "scaling": scaling, "growth": growth}
        whole = {"nonfinite": nonfinite, "seed": seed, "head_dim": head_dim, "fused": fused}
        check_options(options, **whole, clip_update=clip_update)
        plan = load_plan(recipe).updated(overrides=overrides, options=options)
        given: dict[str, Any] = {"betas": betas, "state_dtype": parsing.state_dtype(state_dtype), "seed": seed}
        self._binding = Binding(plan, overrides=overrides, options=options, head_dim=head_dim, **given)
        self._binding.fused = fused
        self._binding.clip_update = None if clip_update is None else float(clip_update)
        self._binding.weights = weight_bits(master_weight_bits, stochastic=bf16_stochastic_round)
        # Like what Binding holds, changed only in place.
        self._nonfinite, self._counts, self._tally = nonfinite, {"skipped": 0}, Tally()
        self._trusted: set[Tensor] = set()  # parameters whose weights were finite in an earlier step
        groups = self._binding.take(params)
        defaults: dict[str, Any] = {"lr": lr, "betas": plan.betas if betas is None else betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "maximize": maximize, "max_update": max_update, "recipe": plan.name}
        parsing.check_group(defaults, f"the arguments of {type(self).__name__}")
        self._complete = False
        super().__init__(groups, parsing.plain_group(defaults))
        self._complete = True
        self._binding.build(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own hyperparameters and recipe.

        Raises:
            ValueError: If the optimizer knows names and these parameters have none. Nothing is added then.
        """
        binding = self._binding
        binding.complete_groups(self)
        group, names = parsing.split_group(param_group) if self._complete else (param_group, {})
        group, plan = binding.parsed(group, names, self)
        with binding.undone_on_error(self):
            super().add_param_group(group)
            binding.plans.update(dict.fromkeys(group["params"], plan))
            if self._complete:
                binding.learn(names)
                binding.build_missing(self)

    def bind(self, model: Any) -> Self:
        """Read names, modules and head sizes from the model that owns the parameters, and return the optimizer.

        Names that came with the parameters stay, since overrides refer to them.

        Raises:
            ValueError: If a parameter is not the model's, or if the model would change blocks that have taken steps.
            TypeError: If it is not a module.
        """
        self._binding.bind(model, self)
        return self

    @torch.no_grad()
    def rebind(self, params: Mapping[Tensor, Tensor]) -> None:
        """Replace parameters by others that hold the same weights, such as those that FSDP2's ``fully_shard`` creates.

        Names, recipes, hyperparameters and state stay. Every rank keeps its part of the state.

        Args:
            params: Old parameter → new parameter. All other parameters stay.

        Raises:
            ValueError: If a new parameter has another shape.
            NotImplementedError: If its sharding is not supported. Nothing has changed then.
            RuntimeError: After :meth:`release_gradients`, whose hooks are on the old parameters.
        """
        if self.releases_gradients and any(old is not new for old, new in params.items()):
            raise RuntimeError("Parameters cannot be replaced after `release_gradients`: call `rebind` first.")
        rebinding.rebind(self, self._binding, params)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Called first, with gradients enabled. Its value is returned.

        Raises:
            ValueError: If names are not known yet, or a gradient is sparse or complex. Nothing has changed then.
            RuntimeError: If ranks disagree about which parameters have a gradient, or required kernels are missing.
                Nothing has changed then.
            FloatingPointError: If gradients are not finite with ``nonfinite="raise"``, or weights before their first
                step. Nothing has changed then, except with :meth:`release_gradients`. Also if a weight would become
                infinite: that weight keeps its value.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._binding.release is not None:
            self._binding.release.end_step()
        self._update(params_of(self))
        return loss

    def _release(self, params: Sequence[Tensor]) -> None:
        """Update a layer in the backward pass."""
        self._update(params, released=True)

    def _update(self, params: Sequence[Tensor], *, released: bool = False) -> None:
        """Update those of the parameters that have a gradient; errors as for :meth:`step`."""
        # Write nothing before all ranks agree that they can take the step.
        active, bad, broken = usable(self, self._binding, self._trusted, params)
        if not released:
            self._tally.read()
        if broken or self._nonfinite == "raise":
            refuse(bad, broken, released=released)
        if bad:
            self._counts["skipped"] += 1
            return
        self._trusted.update(param for _, param in active)
        self._trusted.intersection_update(params_of(self))
        for _, param in active:
            if not self.state.get(param):  # frozen when the optimizer was created
                self.state[param] = initial_state(self._binding.blocks[param])
        take_step(
            active, self._binding.blocks, self.state, self._tally, self._binding.measured, fused=self._binding.fused
        )
        for hook in list(self._binding.observers.values()):
            hook({param for _, param in active})

    def register_update_hook(self, hook: Callable[[set[Tensor]], None]) -> RemovableHandle:
        """Call a function after every update with the parameters that were updated, while they have their gradients.

        That is once per step, or once per layer after :meth:`release_gradients`. ``remove()`` of the result ends it.
        """
        handle = RemovableHandle(self._binding.observers)
        self._binding.observers[handle.id] = hook
        return handle

    @contextmanager
    def _measuring(self, found: StepMemory) -> Iterator[None]:
        """Count the temporaries of all updates inside, also for who counts around this."""
        before, self._binding.measured = self._binding.measured, found
        try:
            yield
        finally:
            self._binding.measured = before
            if before is not None:
                before.scratch = max(before.scratch, found.scratch)

    def release_gradients(self, model: nn.Module) -> GradientRelease:
        """Update layers in the backward pass, each as soon as its gradients are complete, and free these.

        So only the gradients of about two layers exist at a time. :meth:`step` is still called after every backward
        pass, as are schedulers. It updates parameters without a complete layer.

        What needs all gradients at once does not work: clipping by their global norm, adding up several backward
        passes (an error), gradient scalers. ``nonfinite`` acts on layers: after a gradient that is not finite, the
        backward pass updates nothing more, and :meth:`step` raises the error; :attr:`skipped` counts layers.

        Args:
            model: The module that the optimizer trains. Its layers are those of ``fully_shard``, or else the elements
                of its outermost lists of equal modules.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            TypeError: If it is not a module.
            ValueError: If no parameter of the model trains with this optimizer, or if another one releases its
                gradients. Also on several processes, if none is sharded.
        """
        self._binding.require_names(self)
        if self._binding.release is not None:
            self._binding.release.remove()
        self._binding.release = GradientRelease(units_of(model, set(params_of(self))), self._release)
        return self._binding.release

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, as in torch. After a backward pass that failed, this expects the next one."""
        super().zero_grad(set_to_none)
        if self._binding.release is not None:
            self._binding.release.start_over()

    @property
    def gradient_release(self) -> GradientRelease | None:
        """The handle of :meth:`release_gradients`, while layers are updated in the backward pass."""
        release = self._binding.release
        return release if release is not None and release.active else None

    @property
    def releases_gradients(self) -> bool:
        """Whether layers are updated in the backward pass."""
        return self.gradient_release is not None

    def reformat(self, changes: Mapping[str, Recipe | Mapping[str, Any]], *, dropped: str = "release") -> None:
        """Change kinds or ranks of blocks between two steps. Converts state one block at a time.

        A larger rank keeps the momentum exactly; a smaller one keeps its best approximation. If parameters are
        sharded, all ranks call this together. It first checks that they request the same changes.

        Args:
            changes: Block name, role or pattern → a :class:`Recipe`, or ``{"momentum": "low_rank", "rank": 7}``.
            dropped: What happens to momentum that the new state cannot hold. ``release`` moves the weights now, as
                the coming steps would have: by lr · β₁/(1−β₁) · ΔM / D. ``discard`` drops it.

        Raises:
            ValueError: If a block, kind or option is unknown, or a state cannot be converted; nothing has changed.
            NotImplementedError: If a kind does not support the sharding of a block; nothing has changed.
            RuntimeError: If ranks request different changes; nothing has changed.
        """
        reformat.reformat(self, self._binding, changes, dropped)

    def blocks(self) -> Iterator[tuple[dict[str, Any], Tensor, Block]]:
        """Yield all current blocks, each with its parameter group and its parameter."""
        return self._binding.entries(self)

    @property
    def skipped(self) -> int:
        """Number of steps skipped because of a non-finite gradient."""
        return self._counts["skipped"]

    def snapshot(self) -> Snapshot:
        """Return immutable facts about all blocks.

        Raises:
            ValueError: If names are not known yet.
        """
        return snapshot_of(self, self._binding, self.skipped)

    def plan_table(self) -> str:
        """Return a table of all blocks: name, role, shape, kinds, rates, bound, bytes, bytes under AdamW."""
        return self.snapshot().table()

    def __repr__(self) -> str:
        self._binding.complete_groups(self)
        groups = [f"{type(self).__name__}({parsing.shown(group)})" for group in self.param_groups]
        table = self.plan_table() if self._binding.blocks else "Names are not known yet: call bind(model)."
        return "\n".join([*groups, table])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _PICKLED if key in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups like torch's optimizers, and the parameters' names under ``param_names``.

        Names are beside the groups: torch's distributed checkpoints fail on group keys that an older checkpoint lacks.
        """
        self._binding.find_names(self)
        mine = set(params_of(self))
        # State of a parameter that was removed from its group has no position.
        apart = {param: self.state.pop(param) for param in list(self.state) if param not in mine}
        try:
            saved = super().state_dict()
        finally:
            self.state.update(apart)
        saved["param_groups"] = [parsing.plain_group(group) for group in saved["param_groups"]]
        names = self.parameter_names()
        return saved if names is None else {**saved, parsing.NAMES: names}

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Return all weights in float32 by name, with the bits that ``master_weight_bits`` keeps as state.

        Sharded weights are DTensors of the same placement. Weights that are float32 are not copied.

        Raises:
            ValueError: If names are not known yet.
        """
        self._binding.require_names(self)
        names = self._binding.names
        return {names[param]: full_weight(param, self.state.get(param, {})) for param in params_of(self)}

    def parameter_names(self) -> list[list[str]] | None:
        """Return the names of every group's parameters, or None if not all have one."""
        return self._binding.parameter_names(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict from :meth:`state_dict`. Every dtype is kept.

        State goes to the parameter of the same name; without names, to the same position, with a warning. Keys and
        shapes decide kinds and ranks, so a checkpoint from after a :meth:`reformat` loads into an optimizer without it.
        Every recipe loads state of ``torch.optim.AdamW`` or the recipe ``adamw``. Tensors may be whole, or DTensors of
        any placement. A :class:`ResumeWarning` lists what has changed.

        Raises:
            ValueError: If it is from another model or recipe, or holds invalid state, such as NaN.
            TypeError: If it is not a state dict. Nothing has changed then.
        """
        self.prepare_load(state_dict)()

    @torch.no_grad()
    def prepare_load(
        self, state_dict: Mapping[str, Any], *, share: Share = (0, 1), ordered: bool = False
    ) -> Callable[[], None]:
        """Check all of a state dict and return a function that loads it, so that a caller can check others first.

        Args:
            state_dict: As for :meth:`load_state_dict`, with the same errors.
            share: This process's position, and how many processes with the same tensors divide the checks of values.
            ordered: Whether groups and parameters are known to be in this optimizer's order.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict  # type: ignore[arg-type]
        hooks = self._optimizer_load_state_dict_post_hooks.values()
        return load.prepare_load(self, self._binding, state_dict, share=share, ordered=ordered, hooks=hooks)

    def allocate_state_dict(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return zeros with the shapes and dtypes of ``saved``, in this optimizer's order, for a reader to fill."""
        return load.allocate_state_dict(self, self._binding, saved)
