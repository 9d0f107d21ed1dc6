"""What stands between a gradient and a step: finite gradients, and arithmetic in full precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lightning_memopt.collectives import Gather, Sum, Task, drive, request
from lightning_memopt.layout import Layout, local_tensor


class Unusable:
    """Which gradients and weights cannot be used, the same on every rank.

    A gradient is of use if all its elements are finite and neither a sum of their squares nor the state can overflow:
    up to about 1e16 in float32. Weights are of use if they are finite. One synchronisation with the device for all.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        layouts: Sequence[Layout],
        weights: Sequence[Tensor] = (),
        their_layouts: Sequence[Layout] = (),
    ) -> None:
        """Look at this rank's parts of the gradients, and of those weights that have not been looked at yet."""
        self._layouts = [*layouts, *their_layouts]
        self._flags = torch.zeros(0)
        limits = [*map(_limit, layouts), *(math.inf for _ in weights)]
        if limits:
            flags = [_flag(tensor, limit) for tensor, limit in zip([*grads, *weights], limits, strict=True)]
            self._flags = torch.stack([flag.to(flags[0].device) for flag in flags])

    def wants(self) -> list[Gather]:
        """Return what has to be gathered for :meth:`positions`, to share a collective with other requests."""
        alike = {(layout.mesh, layout.placements): layout for layout in self._layouts}  # a few, however deep the model
        cuts = [cut for layout in alike.values() for cut in layout.ranks()]
        if len({id(cut.group) for cut in cuts}) != 1:
            return []
        cut = cuts[0]
        count = len(cut.sizes)
        cut = replace(cut, dim=0, sizes=(len(self._flags),) * count)
        return [Gather(self._flags, cut, count * self._flags.nbytes)]

    def positions(self, gathered: Sequence[Tensor]) -> list[int]:
        """Return the positions of the gradients, and after those of the weights, that no rank may use."""
        if not gathered:
            return agreed(list(self._flags), self._layouts)
        counts = gathered[0].view(-1, len(self._flags)).sum(0)
        return [position for position, count in enumerate(counts.tolist()) if count]


def _limit(layout: Layout) -> float:
    """Return what no element of a gradient may reach.

    Sums of squares, over up to all elements of the parameter, are in the dtype of the arithmetic. State holds means of
    squares, or with β₂ = 1 sums over steps: it gets room for a million of them, where its dtype has as much.
    """
    sums, state = torch.finfo(layout.dtype).max, torch.finfo(layout.state_dtype).max
    count = max(1e6, float(math.prod(layout.param_shape)))
    return float(min(sums / count, state / min(1e6, state**0.25)) ** 0.5)


def _flag(tensor: Tensor, limit: float) -> Tensor:
    local = local_tensor(tensor)
    if local.numel() == 0:
        return torch.zeros((), device=local.device)
    low, high = torch.aminmax(local)
    return 1.0 - ((low > -limit) & (high < limit)).float()


def agreed(flags: list[Tensor], layouts: Sequence[Layout]) -> list[int]:
    """Return the positions of the numbers that are not zero on all ranks that share a layout; they are replaced."""
    drive([_agree(flags, position, layout) for position, layout in enumerate(layouts)])
    counts = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [position for position, count in enumerate(counts) if count]


def _agree(flags: list[Tensor], position: int, layout: Layout) -> Task:
    for dim in range(-len(layout.matrix), 0):
        (flags[position],) = yield from request(Sum(flags[position], layout, dim))


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
