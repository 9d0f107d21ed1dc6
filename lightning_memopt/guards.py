"""What stands between a gradient and a step: ranks that agree, finite gradients, arithmetic in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memopt.consensus import largest, rank
from lightning_memopt.layout import Layout, local_tensor

SHOWN = 5  # parameters that an error about ranks names


@dataclass(frozen=True)
class Judged:
    """A parameter that a step changes if it has a gradient."""

    name: str
    param: Tensor
    layout: Layout


def verdict(params: Sequence[Judged], refusal: Exception | None = None) -> list[str]:
    """Return whose gradients cannot be used, once ranks have agreed on which parameters have one.

    A gradient is of use if all its elements are finite and sums of their squares cannot overflow: up to about 1e16
    in float32. What ranks send each other has the same size whatever gradients they have: three numbers per parameter,
    in one collective for each mesh that shards some. Where nothing is sharded there is none.

    Args:
        params: All parameters of the optimizer. Those on one mesh are the same, in the same order, on all its ranks.
        refusal: Why this rank cannot take the step, if it cannot.

    Raises:
        Exception: The refusal, if there is one.
        RuntimeError: On all ranks, if a parameter has a gradient on some ranks of its mesh and none on others, or if
            another rank has a refusal.
    """
    judged = [] if refusal is not None else [entry for entry in params if entry.param.grad is not None]
    flags = {entry.name: _flag(entry.param.grad, entry.layout.dtype) for entry in judged}  # type: ignore[arg-type]
    answers = _ask(params, flags, refused=refusal is not None)
    if refusal is not None:
        raise refusal
    clashes = [line for answer in answers for line in answer.clashes()]
    if clashes:
        more = f"; and {len(clashes) - SHOWN} more" if len(clashes) > SHOWN else ""
        raise RuntimeError(
            f"Ranks disagree about which parameters have a gradient: {'; '.join(clashes[:SHOWN])}{more}. Weights and "
            "state are unchanged. Where a rank has not used a parameter, give it a gradient of zeros there, or set its "
            "gradient to None on all ranks."
        )
    if answers and answers[-1].refused:
        raise RuntimeError(
            f"Rank {answers[-1].refused - 1} cannot take this step; its own error says why. Weights and state are "
            "unchanged."
        )
    if answers and not answers[-1].unusable:
        return []
    bad = _read(flags).union(*(answer.unusable_names() for answer in answers))
    names = [entry.name for entry in params if entry.name in bad]
    # What is not sharded only its own rank knows of.
    return names or [f"parameters of rank {answer.unusable - 1} alone" for answer in answers[-1:]]


@dataclass(frozen=True)
class _Answer:
    """What all ranks of a mesh have said. A rank is given by its number plus one, and 0 is no rank.

    Attributes:
        rows: Per parameter of the mesh: its name, a rank without a gradient, one with it, one that cannot use it.
        unusable: A rank that cannot use some gradient, of any parameter.
        refused: A rank that cannot take the step, for another reason.
    """

    rows: list[tuple[str, int, int, int]]
    unusable: int
    refused: int

    def clashes(self) -> Iterator[str]:
        """Yield a line for each parameter about which ranks disagree."""
        for name, absent, present, _ in self.rows:
            if absent and present:
                yield f"{name!r} has one on rank {present - 1} and none on rank {absent - 1}"

    def unusable_names(self) -> set[str]:
        """Return the parameters whose gradient some rank cannot use."""
        return {name for name, *_, unusable in self.rows if unusable}


def _ask(params: Sequence[Judged], flags: Mapping[str, Tensor], *, refused: bool) -> list[_Answer]:
    """Return what all ranks say, mesh by mesh; the last answer knows of the troubles in all of them."""
    meshes = {entry.layout.mesh: entry.layout for entry in params if entry.layout.sharded}
    # A rank that is in several tells the larger one what it has heard in the smaller.
    layouts = sorted(meshes.values(), key=lambda layout: layout.mesh.size())
    asked, heard = [], None
    for layout in layouts:
        mine = [entry for entry in params if entry.layout.mesh == layout.mesh]
        device = local_tensor(mine[0].param).device
        none = torch.zeros((), device=device)
        seen = {name: flag.to(device) for name, flag in flags.items()}
        if heard is None:
            heard = torch.stack([torch.stack([none, *seen.values()]).amax(), none + refused]) * (rank() + 1)
        present = torch.tensor([float(entry.param.grad is not None) for entry in mine], device=device)
        unusable = torch.stack([seen.get(entry.name, none) for entry in mine])
        rows = torch.stack([1 - present, present, unusable]) * (rank() + 1)
        said = largest(torch.cat([rows.flatten(), heard.to(device)]), layout)
        asked.append((mine, said))
        absent, present, _ = said[:-2].view(3, -1)
        heard = torch.stack([said[-2], torch.maximum(said[-1], torch.minimum(absent, present).amax())])
    return [_answer(mine, said) for mine, said in asked]


def _answer(params: Sequence[Judged], said: Tensor) -> _Answer:
    *numbers, unusable, refused = (int(number) for number in said.tolist())
    count = len(params)
    columns = (numbers[:count], numbers[count : 2 * count], numbers[2 * count :])
    return _Answer([*zip((entry.name for entry in params), *columns, strict=True)], unusable, refused)


def _read(flags: Mapping[str, Tensor]) -> set[str]:
    """Return the names whose flags are up; one synchronisation with the device."""
    if not flags:
        return set()
    device = next(iter(flags.values())).device
    numbers = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return {name for name, number in zip(flags, numbers, strict=True) if number}


def _flag(grad: Tensor, dtype: torch.dtype) -> Tensor:
    local = local_tensor(grad)
    if local.numel() == 0:
        return torch.zeros((), device=local.device)
    low, high = torch.aminmax(local)
    limit = torch.finfo(dtype).max ** 0.5 / 1e3
    return 1.0 - ((low > -limit) & (high < limit)).float()


@contextmanager
def exact_arithmetic(devices: set[str]) -> Iterator[None]:
    """Switch off autocast and reduced-precision matrix products, whatever the training loop has chosen.

    The coefficients of low-rank momentum nearly cancel; TF32 or bfloat16 products would leave noise.
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
