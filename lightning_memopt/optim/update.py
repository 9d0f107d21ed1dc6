"""The update of blocks in one step: gradients to kinds, and what they return to weights."""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kernels.check import usable
from lightning_memopt.kinds.batch import Batch, Index, Large, Scratch, chunks, take
from lightning_memopt.kinds.momentum import Direction
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.second_moment import Denominator
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.bounds import Rates, Watch, limit_
from lightning_memopt.optim.fused import apply_fused_, for_kernel
from lightning_memopt.optim.weights import LOW_BITS, Weights
from lightning_memopt.sharding.collectives import Gather, Sum, Task, interleave, request
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import ELEMENTWISE, shape_of
from lightning_memopt.sharding.tensors import local_tensor


@dataclass(frozen=True)
class Update:
    """One block and the inputs of its update.

    Attributes:
        block: The block.
        param: Its parameter, which has a gradient.
        state: The parameter's state.
        group: The parameter's group.
        step: The current step, counted from 1.
        kernels: Whether to use kernels; None for where they are available.
    """

    block: Block
    param: Tensor
    state: dict[str, Tensor]
    group: Mapping[str, Any]
    step: int
    kernels: bool | None = False

    @cached_property
    def grad(self) -> Tensor:
        """The parameter's gradient."""
        assert self.param.grad is not None
        return self.param.grad

    @cached_property
    def rates(self) -> Rates:
        """The factors in the update, and its limits."""
        return Rates.of(
            self.group,
            self.block.rates,
            weights=self.block.kept_dtype,
            arithmetic=self.block.layout.dtype,
            bounded=self.block.recipe.bounded,
        )

    @cached_property
    def is_adamw(self) -> bool:
        """Whether torch's fused AdamW makes this very update. Ranks may differ: neither way needs a collective."""
        block, layout = self.block, self.block.layout
        if not block.is_adam or block.clip_update is not None:
            return False
        if layout.slot is not None or layout.state_dtype != layout.dtype:
            return False
        if layout.device.type not in ("cpu", "cuda", "meta") or self.group["betas"][1] == 1 or self.rates.checked:
            return False
        tensors = [local_tensor(tensor) for tensor in (self.param, self.grad)]
        return all(tensor.dtype == layout.dtype and tensor.is_contiguous() for tensor in tensors)

    @cached_property
    def fused(self) -> bool:
        """Whether kernels make the update. Ranks may differ: a kernel needs no collective."""
        layout = self.block.layout
        able = self.block.batched and layout.dtype == torch.float32
        return able and usable(layout.device, self.kernels)

    def alike(self) -> Hashable:
        """Return what updates must share to be made together."""
        block, group, rates = self.block, self.group, self.rates
        # Checks count weights by block. What has no view as a matrix is copied for the step.
        if not block.batched or rates.checked or (not block.small and self._is_copied):
            return block.name
        shared = (rates, self.step, tuple(group["betas"]), group["eps"], group["maximize"])
        if self.is_adamw:
            return block.layout.dtype, block.layout.device, shared
        phases: tuple[Hashable, ...] = ()
        if block.recurring:
            tick = Tick(self.step, block.key, block.index)
            phases = tuple(kind.phase(tick) for kind in block.recurring)
        return block.family, self.param.dtype, self.grad.dtype, phases, shared, self.fused

    @property
    def _is_copied(self) -> bool:
        layout = self.block.layout
        if layout.slot is not None and layout.slot.period is not None:
            return True
        if len(layout.shape) < 3 or len(layout.shape) == len(layout.matrix) or layout.sharded:
            return False  # ranks must combine the same blocks, and parts of a tensor may differ in their strides
        return not all(local_tensor(tensor).is_contiguous() for tensor in (self.param, self.grad))

    def gather_requests(self) -> list[Gather]:
        """Return the gathers that the update needs. They are the same on all ranks."""
        block = self.block
        if not block.cuts and not block.work.gathered:
            return []
        wanted = block.requests_for(self.state, tuple(block.cuts))
        if block.work.gathered:
            size = torch.Size(block.layout.matrix).numel() * self.grad.element_size()
            wanted.append(Gather(block.layout.take(self.grad), block.layout.cut_of_block(), size))
        return wanted


def update(updates: Sequence[Update], gathered: Sequence[Sequence[Tensor]], watch: Watch) -> Task:
    """Add gradients to the state and update the weights. The result is a task for ``run_tasks``.

    Args:
        updates: What to update: one block, or several that are alike.
        gathered: For each of them, the results of ``gather_requests``.
        watch: Records what happens to the weights.
    """
    first, count = updates[0], len(updates)
    if first.is_adamw:
        adamw_(updates)
        return
    block, group = first.block, first.group
    momentum, second_moment = block.kinds
    together = count > 1 or first.fused  # kernels read batches only
    layout = block.work.batched(count) if together else block.work
    tick = Tick(first.step, tuple(one.block.key for one in updates) if together else block.key, block.index)
    if block.work.gathered:
        grads = [tensors[-1] for tensors in gathered]
    else:
        grads = [one.block.layout.take(one.grad) for one in updates]
    gradient = _together(grads, block, fused=first.fused, negated=group["maximize"])
    if isinstance(gradient, Batch):
        gradient.asked = second_moment.sums(block.work)
    state = {key: _state(updates, gathered, kind, key) for kind in block.kinds for key in kind.keys}
    beta1, beta2 = group["betas"]
    now: dict[str, Any] = {"layout": layout, "tick": tick}
    squares = {"beta2": beta2, "eps": group["eps"]}
    averages = {"beta1": beta1, **(squares if momentum.averages_squares else {})}
    turning = momentum.update(gradient, {key: state[key] for key in momentum.keys}, **averages, **now)
    if second_moment.of_direction:
        direction = yield from turning
        denominator = yield from second_moment.of(direction, layout, eps=group["eps"])
    else:
        mine = {key: state[key] for key in second_moment.keys}
        dividing = second_moment.update(gradient, mine, **squares, **now)
        direction, denominator = yield from interleave(turning, dividing)
    _keep(updates, state)
    factor = None
    if block.clip_update is not None:
        factor = yield from clip_factor(direction, denominator, first.rates, layout, block.clip_update)
    noise = block.weight_noise(layout, tick)
    targets = [Target(one.block, one.param, one.state) for one in updates]
    apply(targets, direction, denominator, first.rates, watch, noise=noise, factor=factor, fused=first.fused)


def adamw_(updates: Sequence[Update]) -> None:
    """Update blocks with dense momentum and second moment: torch's fused AdamW makes the same update in one pass."""
    first = updates[0]
    rates, (beta1, beta2) = first.rates, first.group["betas"]
    step = torch.full((), float(first.step), device=first.block.layout.device)
    torch._fused_adamw_(
        [local_tensor(one.param) for one in updates],
        [local_tensor(one.grad) for one in updates],
        [local_tensor(one.state["exp_avg"]) for one in updates],
        [local_tensor(one.state["exp_avg_sq"]) for one in updates],
        [],
        [step] * len(updates),
        lr=rates.lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=rates.weight_decay,
        eps=first.group["eps"],
        amsgrad=False,
        maximize=first.group["maximize"],
    )


def _together(tensors: list[Tensor], block: Block, *, fused: bool, negated: bool = False) -> Large:
    """Return the tensors of a batch of such blocks as the kinds see them: copied to a stack, or in place."""
    if len(tensors) > 1 and block.small and not fused:
        return torch.stack(tensors).neg_() if negated else torch.stack(tensors)
    if len(tensors) > 1 or fused:
        return Batch(tensors, negated=negated, fused=fused)
    return tensors[0].neg() if negated else tensors[0]


def _state(updates: Sequence[Update], gathered: Sequence[Sequence[Tensor]], kind: Any, key: str) -> Large:
    """Return a state tensor as the kinds see it: that of one block, or those of all blocks."""
    block = updates[0].block
    if key in block.cuts:
        position = list(block.cuts).index(key)
        parts = [tensors[position] for tensors in gathered]
    else:
        parts = [local_tensor(one.state[one.block.prefix + key]) for one in updates]
    fused = updates[0].fused
    if kind.sizes(block.work)[key] != ELEMENTWISE:
        return torch.stack(parts) if len(parts) > 1 or fused else parts[0]
    if len(parts) > 1 or fused:
        parts = [part.view(block.work.local) for part in parts]
    return _together(parts, block, fused=fused)


def _keep(updates: Sequence[Update], state: Mapping[str, Large]) -> None:
    """Write what kinds did to copies of the state back to where it is stored."""
    block = updates[0].block
    sizes = {key: each for kind in block.kinds for key, each in kind.sizes(block.work).items()} if block.cuts else {}
    targets, values = [], []
    for key, value in state.items():
        cut = block.cuts.get(key)
        together = len(updates) > 1 or updates[0].fused
        if cut is None and (isinstance(value, Batch) or not together):
            continue  # not a copy
        for one, part in zip(updates, _by_block(value, together=together), strict=True):
            target = local_tensor(one.state[one.block.prefix + key])
            targets.append(target)
            part = part if cut is None else cut.mine(part.view(shape_of(block.work, sizes[key])))
            values.append(part if part.shape == target.shape else part.view(target.shape))
    if targets:
        torch._foreach_copy_(targets, values)


def _by_block(value: Large, *, together: bool) -> Sequence[Tensor]:
    if isinstance(value, Batch):
        return value.parts
    return value.unbind() if together else (value,)


@dataclass(frozen=True)
class Target:
    """A block whose weights are updated.

    Attributes:
        block: The block.
        param: Its parameter.
        state: The parameter's state.
    """

    block: Block
    param: Tensor
    state: Mapping[str, Tensor]


def apply(
    targets: Sequence[Target],
    direction: Direction,
    denominator: Denominator,
    rates: Rates,
    watch: Watch,
    *,
    noise: Noise | None = None,
    factor: Tensor | None = None,
    fused: bool = False,
) -> None:
    """Update the local weights.

    Args:
        targets: One block, or several that are alike.
        direction: U.
        denominator: D.
        rates: The factors in the update, and its limits.
        watch: Records what happens to the weights.
        noise: Random numbers to round them with; None to round to nearest.
        factor: A factor on U / D, one for each block of a batch, ``[b, ..., 1, 1]``; None for 1.
        fused: Whether to use kernels. U and D are then those of a batch, even of a single block.
    """
    block, blocks = targets[0].block, [each.block for each in targets]
    values, low = Held(blocks, [each.param for each in targets], fused=fused), None
    if block.bits is not None and block.bits.extra is not None:
        low = Held(blocks, [each.state[LOW_BITS] for each in targets], fused=fused)
    weights = Weights(values.large, None if low is None else low.large, noise)
    lost = apply_(weights, direction, denominator, rates, dtype=block.layout.dtype, watch=watch, factor=factor)
    if lost is not None:
        watch.lost[block.name] = (block.layout, lost)
    for held in (values, low):
        if held is not None:
            held.put()


class Held:
    """The parts of blocks in tensors like their parameters, in place if possible, and the way back if not."""

    def __init__(self, blocks: Sequence[Block], tensors: Sequence[Tensor], *, fused: bool) -> None:
        """Take the parts. A block that ranks gather is copied whole, though only the local part of the copy matters."""
        self._blocks, self._tensors, block = blocks, tensors, blocks[0]
        self._mine = [each.layout.take(tensor) for each, tensor in zip(blocks, tensors, strict=True)]
        self._parts = self._wholes = self._mine
        if block.work.gathered:
            cut = block.layout.cut_of_block()
            self._wholes = [part.new_zeros(block.work.local) for part in self._mine]
            self._parts = [cut.mine(whole) for whole in self._wholes]
            torch._foreach_copy_(self._parts, self._mine)
        self.large = _together(self._wholes, block, fused=fused)

    def put(self) -> None:
        """Write the parts back, as they are now."""
        if len(self._wholes) > 1 and isinstance(self.large, Tensor):
            torch._foreach_copy_(self._wholes, self.large.unbind())
        if self._parts is not self._mine:
            torch._foreach_copy_(self._mine, self._parts)
        for block, part, tensor in zip(self._blocks, self._mine, self._tensors, strict=True):
            block.layout.put(tensor, part)


def apply_(
    weights: Weights,
    direction: Direction,
    denominator: Denominator,
    rates: Rates,
    *,
    dtype: torch.dtype,
    watch: Watch,
    factor: Tensor | None = None,
) -> Tensor | None:
    """W ← (1 − ηλ) W − η · U / D, in ``dtype``, one chunk at a time. All shapes broadcast to ``[..., m, n]``.

    The rates decide whether |U / D| is bounded, and whether to check weights. A checked weight that would become
    non-finite keeps its value. Returns the number of these weights, or None if no weights were checked.
    """
    direction = denominator.turned(direction)
    arguments = for_kernel(weights, direction, denominator, rates, dtype)
    if arguments is not None:
        return apply_fused_(arguments, rates, watch, factor)
    values = weights.values
    lost = torch.zeros((), device=values.device) if rates.checked else None
    scratch = Scratch(values, dtype)
    for index in chunks(values):
        part = weights.read(index, scratch, copy=rates.checked)
        if rates.weight_decay:
            part.mul_(1 - rates.lr * rates.weight_decay)
        update, divisor, scale = _bounded(direction, denominator, rates, index, scratch, watch)
        if factor is not None:
            update = torch.mul(update, take(factor, index), out=scratch.take("clipped", update.shape))
        if divisor is None:
            part.add_(update, alpha=-rates.lr * scale)
        else:
            part.addcdiv_(update, divisor, value=-rates.lr * scale)
        if lost is not None:
            fits = part.abs() <= torch.finfo(values.dtype).max
            lost += fits.logical_not().sum()
            part = part.where(fits, weights.read(index, Scratch(values, dtype)))
        weights.write_(index, part)
    return lost


def _bounded(
    direction: Direction, denominator: Denominator, rates: Rates, index: Index, scratch: Scratch, watch: Watch
) -> tuple[Tensor, Tensor | None, float]:
    """Return a chunk of U, what it is still divided by, if anything, and the factor that it still needs."""
    update, scale = direction.at(index, scratch)
    divisor = denominator.at(index, scratch, direction.base.shape[-1])
    if rates.max_update is None:
        return update, divisor, scale
    quotient = scratch.take("update", update.shape)
    quotient.copy_(update) if divisor is None else torch.div(update, divisor, out=quotient)
    return limit_(quotient, scale, rates.max_update, watch), None, scale


def clip_factor(
    direction: Direction, denominator: Denominator, rates: Rates, layout: Layout, clip: float
) -> Generator[Any, Any, Tensor]:
    """Return what scales U / D of each block down so that its root mean square is at most ``clip``.

    Args:
        direction: U.
        denominator: D.
        rates: The limits of single elements, which come first.
        layout: The layout of the block or batch.
        clip: The bound.

    Returns:
        ``[..., 1, 1]``, the first of the dimensions that of a batch.
    """
    direction = denominator.turned(direction)
    base, scratch = direction.base, Scratch(direction.base, layout.dtype)
    outer = base.shape[:1] if layout.batch is not None else torch.Size()
    energy = base.new_zeros(outer, dtype=torch.float64)
    for index in chunks(base):
        update, divisor, scale = _bounded(direction, denominator, rates, index, scratch, Watch())
        if divisor is not None:
            update = torch.div(update, divisor, out=scratch.take("clipped", update.shape))
        squares = torch.linalg.vector_norm(update, dim=None if not outer else _inner(update, index)).double().square()
        where = index[0] if outer else ...
        energy[where] += squares * scale**2
    for dim in range(-1, -1 - len(layout.matrix) + len(outer), -1):
        (energy,) = yield from request(Sum(energy, layout, dim))
    mean = energy / math.prod(layout.matrix[len(outer) :])
    factor = (clip / mean.sqrt()).clamp(max=1.0).to(layout.dtype)  # infinite for an update of zero
    return factor.view(*outer, *[1] * (len(layout.matrix) - len(outer)))


def _inner(chunk: Tensor, index: Index) -> tuple[int, ...]:
    """Return the dimensions of a chunk of a batch that belong to a single block."""
    first = 0 if isinstance(index[0], int) else 1
    return tuple(range(first, chunk.ndim))
