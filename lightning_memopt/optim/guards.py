"""Guards of a step: ranks agree, gradients are finite, arithmetic has full precision."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import SMALL
from lightning_memopt.sharding.collectives import Sum, Task, packed, request, run_tasks
from lightning_memopt.sharding.consensus import largest, rank
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.tensors import local_tensor

SHOWN = 5  # number of parameters that an error about ranks names


@dataclass(frozen=True)
class Judged:
    """A parameter that a step changes if it has a gradient. Fresh if its weights are not checked yet."""

    name: str
    param: Tensor
    layout: Layout
    fresh: bool = False


def verdict(params: Sequence[Judged], refusal: Exception | None = None) -> tuple[list[str], list[str]]:
    """Let ranks agree on which parameters have a gradient. Return the names of unusable gradients and weights.

    A gradient is usable if all its elements are finite and neither a sum of their squares nor the state can overflow:
    up to about 1e16 in float32. Weights are usable if they are finite; only fresh ones are checked. The size of the
    messages does not depend on which gradients exist: four numbers per parameter, in one collective for each mesh that
    shards parameters. Without sharding there is no collective.

    Args:
        params: All parameters of the optimizer. All ranks of a mesh pass the same parameters of it, in the same order.
        refusal: Why this rank cannot take the step, if it cannot.

    Raises:
        Exception: The refusal, if there is one.
        RuntimeError: On all ranks, if a parameter has a gradient on some ranks of its mesh and none on others, or if
            another rank has a refusal.
    """
    judged = [] if refusal is not None else [entry for entry in params if entry.param.grad is not None]
    grads = _flags({entry.name: (entry.param.grad, _limit(entry.layout)) for entry in judged})  # type: ignore[misc]
    weights = _flags({entry.name: (entry.param, math.inf) for entry in judged if entry.fresh})
    answers = _ask(params, (grads, weights), refused=refusal is not None)
    if refusal is not None:
        raise refusal
    clashes = [line for answer in answers for line in answer.clashes()]
    if clashes:
        more = f"; and {len(clashes) - SHOWN} more" if len(clashes) > SHOWN else ""
        raise RuntimeError(
            f"Ranks disagree about which parameters have a gradient: {'; '.join(clashes[:SHOWN])}{more}. Weights and "
            "state are unchanged. If a rank does not use a parameter, set its gradient to zeros there, or to None on "
            "all ranks."
        )
    if answers and answers[-1].refused:
        raise RuntimeError(
            f"Rank {answers[-1].refused - 1} cannot take this step; its own error says why. Weights and state are "
            "unchanged."
        )
    return _unusable(params, grads, answers, 0), _unusable(params, weights, answers, 1)


@dataclass(frozen=True)
class _Answer:
    """The combined answer of all ranks of a mesh. Ranks are stored as rank plus one, and 0 means no rank.

    Attributes:
        rows: For each parameter of the mesh: its name, a rank without a gradient, a rank with a gradient, and the
            ranks that cannot use the gradient and the weights.
        unusable: A rank that cannot use some gradient, and one that cannot use some weights, of any parameter.
        refused: A rank that cannot take the step for another reason.
    """

    rows: list[tuple[str, int, int, tuple[int, int]]]
    unusable: tuple[int, int]
    refused: int

    def clashes(self) -> Iterator[str]:
        """Yield a line for each parameter on which ranks disagree."""
        for name, absent, present, _ in self.rows:
            if absent and present:
                yield f"{name!r} has one on rank {present - 1} and none on rank {absent - 1}"

    def unusable_names(self, kind: int) -> set[str]:
        """Return the parameters whose gradient (0) or weights (1) are unusable on some rank."""
        return {name for name, *_, unusable in self.rows if unusable[kind]}


def _unusable(params: Sequence[Judged], flags: Mapping[str, Tensor], answers: list[_Answer], kind: int) -> list[str]:
    if answers and not answers[-1].unusable[kind]:
        return []
    bad = _read(flags).union(*(answer.unusable_names(kind) for answer in answers))
    names = [entry.name for entry in params if entry.name in bad]
    # Only its own rank knows about a parameter that is not sharded.
    return names or [f"parameters of rank {answer.unusable[kind] - 1} only" for answer in answers[-1:]]


def _ask(params: Sequence[Judged], flags: Sequence[Mapping[str, Tensor]], *, refused: bool) -> list[_Answer]:
    """Return the answers of all ranks, one per mesh. The last answer covers the problems in all meshes."""
    meshes = {entry.layout.mesh: entry.layout for entry in params if entry.layout.sharded}
    # A rank in several meshes passes on to the larger mesh what it received in the smaller one.
    layouts = sorted(meshes.values(), key=lambda layout: layout.mesh.size())
    asked, heard = [], None
    for layout in layouts:
        mine = [entry for entry in params if entry.layout.mesh == layout.mesh]
        device = local_tensor(mine[0].param).device
        # Not the default dtype: a rank without gradients, or with empty shards, would be the only one to send it.
        none = torch.zeros((), dtype=torch.float32, device=device)
        seen = [{name: flag.to(none) for name, flag in each.items()} for each in flags]
        if heard is None:
            worst = [torch.stack([none, *each.values()]).amax() for each in seen]
            heard = torch.stack([*worst, none + refused]) * (rank() + 1)
        present = torch.tensor([entry.param.grad is not None for entry in mine], dtype=torch.float32, device="cpu")
        present = present.to(device, non_blocking=True)  # the host waits only for the answers
        unusable = [torch.stack([each.get(entry.name, none) for entry in mine]) for each in seen]
        rows = torch.stack([1 - present, present, *unusable]) * (rank() + 1)
        said = largest(torch.cat([rows.flatten(), heard.to(device)]), layout)
        asked.append((mine, said))
        absent, present = said[:-3].view(4, -1)[:2]
        heard = torch.stack([said[-3], said[-2], torch.maximum(said[-1], torch.minimum(absent, present).amax())])
    return [_answer(mine, said) for mine, said in asked]


def _answer(params: Sequence[Judged], said: Tensor) -> _Answer:
    *numbers, grads, weights, refused = (int(number) for number in said.tolist())
    count = len(params)
    absent, present, *unusable = (numbers[start : start + count] for start in range(0, 4 * count, count))
    pairs = [*zip(*unusable, strict=True)]
    rows = [*zip((entry.name for entry in params), absent, present, pairs, strict=True)]
    return _Answer(rows, (grads, weights), refused)


def _read(flags: Mapping[str, Tensor]) -> set[str]:
    """Return the names whose flags are set, with one synchronization with the device."""
    if not flags:
        return set()
    device = next(iter(flags.values())).device
    numbers = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return {name for name, number in zip(flags, numbers, strict=True) if number}


def _limit(layout: Layout) -> float:
    """Return the exclusive limit on the elements of a gradient.

    Sums of squares, over up to all elements of the parameter, are in the dtype of the arithmetic. State holds means of
    squares, or with β₂ = 1 sums over steps. The limit leaves room for a million steps if the dtype of the state does.
    """
    sums, state = torch.finfo(layout.dtype).max, torch.finfo(layout.state_dtype).max
    count = max(1e6, float(math.prod(layout.param_shape)))
    return float(min(sums / count, state / min(1e6, state**0.25)) ** 0.5)


def _flags(tensors: Mapping[str, tuple[Tensor, float]]) -> dict[str, Tensor]:
    """Return 1.0 for each tensor that has an element of at least the limit, or NaN, and 0.0 for all others."""
    local = {name: local_tensor(tensor) for name, (tensor, _) in tensors.items()}
    flags: dict[str, Tensor] = {}
    for device in {tensor.device for tensor in local.values()}:
        names = [name for name, tensor in local.items() if tensor.device == device and tensor.numel() > 0]
        if names:
            limits = torch.tensor([tensors[name][1] for name in names], dtype=torch.float64, device="cpu")
            inside = _magnitudes([local[name] for name in names]) < limits.to(device, non_blocking=True)
            flags.update(zip(names, inside.logical_not().float().unbind(), strict=True))
    return {name: flags[name] if name in flags else torch.zeros((), device=local[name].device) for name in tensors}


def _magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute element of every tensor, or NaN if it has one, in float64."""
    if tensors[0].device.type != "cpu":
        return torch.stack(
            torch._foreach_norm(list(tensors), math.inf, dtype=torch.float64)
        )  # one launch for all of them
    alike: dict[Hashable, list[int]] = {}
    for position, tensor in enumerate(tensors):
        alike.setdefault((tensor.shape, tensor.dtype) if tensor.numel() <= SMALL else position, []).append(position)
    order, found = [], []
    for positions in alike.values():
        order += positions
        for run in packed(positions, lambda position: tensors[position].nbytes):
            if len(run) == 1:  # on a CPU, this is ten times as fast as a norm
                low, high = torch.aminmax(tensors[run[0]])
                found.append(torch.maximum(low.neg(), high).double().view(1))
            else:
                together = torch.stack([tensors[position] for position in run])
                found.append(together.abs_().flatten(1).amax(1).double())
    return torch.cat(found)[torch.tensor(order, device="cpu").argsort()]


def agreed(flags: list[Tensor], layouts: Sequence[Layout]) -> list[int]:
    """Return the positions of the numbers whose sum over the ranks of their layout is not 0. Replaces the numbers."""
    run_tasks([_agree(flags, position, layout) for position, layout in enumerate(layouts)])
    counts = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [position for position, count in enumerate(counts) if count]


def _agree(flags: list[Tensor], position: int, layout: Layout) -> Task:
    for dim in range(-len(layout.matrix), 0):
        (flags[position],) = yield from request(Sum(flags[position], layout, dim))


@contextmanager
def exact_arithmetic(devices: set[str]) -> Iterator[None]:
    """Turn off autocast and reduced-precision matrix products, regardless of the training loop's settings.

    The coefficients of low-rank momentum nearly cancel, so TF32 or bfloat16 products would leave noise.
    """
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = (cuda.fp32_precision, mkldnn.fp32_precision)
    cuda.fp32_precision = mkldnn.fp32_precision = "ieee"
    try:
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        cuda.fp32_precision, mkldnn.fp32_precision = before
