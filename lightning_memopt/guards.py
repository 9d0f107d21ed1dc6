"""What stands between a gradient and a step: finite gradients, and arithmetic in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lightning_memopt.collectives import Gather, Sum, Task, drive, request
from lightning_memopt.layout import Layout, local_tensor


class Unusable:
    """Which gradients cannot be used, the same on every rank.

    A gradient is of use if all its elements are finite and sums of their squares cannot overflow: up to about 1e16
    in float32. One synchronisation with the device for all of them.
    """

    def __init__(self, grads: Sequence[Tensor], layouts: Sequence[Layout]) -> None:
        """Look at this rank's parts of the gradients."""
        self._layouts = layouts
        self._flags = torch.zeros(0)
        if grads:
            flags = [_flag(grad, layout.dtype) for grad, layout in zip(grads, layouts, strict=True)]
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
        """Return the positions of the gradients that no rank may use."""
        if gathered:
            self._flags = gathered[0].view(-1, len(self._flags)).sum(0)
        else:
            flags = list(self._flags)
            drive([_agree(flags, position, layout) for position, layout in enumerate(self._layouts)])
            self._flags = torch.stack(flags) if flags else self._flags
        return [position for position, count in enumerate(self._flags.tolist()) if count]


def _flag(grad: Tensor, dtype: torch.dtype) -> Tensor:
    local = local_tensor(grad)
    if local.numel() == 0:
        return torch.zeros((), device=local.device)
    low, high = torch.aminmax(local)
    limit = torch.finfo(dtype).max ** 0.5 / 1e3
    return 1.0 - ((low > -limit) & (high < limit)).float()


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
