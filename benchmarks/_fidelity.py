"""How close compressed momentum and its updates are to full Adam's, measured beside a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Where in the training to measure, and the ranks for which to measure what a best approximation would keep.
MOMENTS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
RANKS = (1, 2, 4, 8, 16, 32)


class Shadow:
    """Keeps full Adam's averages of the gradients that an optimizer sees, and compares at a few moments.

    Attributes:
        found: One record for each moment and role, with means over the role's matrices: ``kept``, the share of the full
            momentum's energy that the kept one holds, 1 − ‖M − M̂‖² / ‖M‖²; ``cosine`` between the change of the weights
            and full Adam's; ``gradient``, the cosine between full Adam's change and that without momentum; ``best``,
            the share that a best approximation of each of ``RANKS`` would keep.
        swings: For each role, the mean over all steps of the cosine between a gradient and the momentum before it,
            ``inside`` the directions that the kept momentum holds, and ``outside`` of them. Negative: the gradients
            swing back and forth there. Empty for kinds without factors.
    """

    def __init__(self, optimizer: Any) -> None:
        self.found: list[dict[str, Any]] = []
        self._optimizer, self._steps = optimizer, 0
        self._averages: dict[str, tuple[Tensor, Tensor]] = {}
        self._cosines: dict[str, list[tuple[float, float]]] = {}

    @property
    def swings(self) -> dict[str, dict[str, float]]:
        columns = {role: list(zip(*found, strict=True)) for role, found in self._cosines.items()}
        return {
            role: {"inside": _mean(inside), "outside": _mean(outside)} for role, (inside, outside) in columns.items()
        }

    @contextmanager
    def watching(self, step: int, steps: int) -> Iterator[None]:
        """Observe the optimizer's step in the body: number `step` of `steps`, counted from 0."""
        blocks = [entry for entry in self._optimizer.blocks() if not entry[2].layout.vector]
        self._steps += 1
        for group, param, block in blocks:
            grad, (beta1, beta2) = block.layout.take(param.grad).float(), group["betas"]
            zeros = torch.zeros_like(grad)
            momentum, square = self._averages.get(block.name, (zeros, zeros))
            self._compare(block, param, grad, momentum)
            self._averages[block.name] = momentum.lerp(grad, 1 - beta1), square.lerp(grad.square(), 1 - beta2)
        measured = step + 1 in {max(1, round(moment * steps)) for moment in MOMENTS}
        before = [block.layout.take(param.detach()).clone() for _, param, block in blocks] if measured else []
        yield
        if measured:
            self._measure(step + 1, blocks, before)

    def _compare(self, block: Any, param: Tensor, grad: Tensor, momentum: Tensor) -> None:
        """Compare a gradient with the momentum before it, inside and outside of the directions that are kept."""
        kind = block.recipe.momentum
        state = self._optimizer.state[param]
        if not (state and kind.keys and momentum.any()):  # in the first step there is none before it
            return
        if (factors := kind.factors(block.part(state, kind.keys), block.layout)) is None:
            return
        left, right = (torch.linalg.qr(factor)[0] for factor in (factors[0], factors[1].mT))
        inside = [left @ (left.mT @ each @ right) @ right.mT for each in (grad, momentum)]
        outside = [grad - inside[0], momentum - inside[1]]
        self._cosines.setdefault(block.role, []).append((_cosine(*inside), _cosine(*outside)))

    def _measure(self, step: int, blocks: list[Any], before: list[Tensor]) -> None:
        by_role: dict[str, list[dict[str, Any]]] = {}
        for (group, param, block), old in zip(blocks, before, strict=True):
            momentum, square = self._averages[block.name]
            beta2 = group["betas"][1]
            root = (square / (1 - beta2**self._steps)).sqrt() + group["eps"]
            kind = block.recipe.momentum
            state = block.part(self._optimizer.state[param], kind.keys)
            energy = momentum.square().sum()
            kept = kind.to_dense(state, block.layout).float() if kind.keys else torch.zeros_like(momentum)
            spectrum = torch.linalg.svdvals(momentum).square().cumsum(-1) / energy
            moved = old - block.layout.take(param.detach())
            gradient = block.layout.take(param.grad).float()
            by_role.setdefault(block.role, []).append(
                {
                    "kept": float(1 - (momentum - kept).square().sum() / energy),
                    "cosine": _cosine(moved, momentum / root),
                    "gradient": _cosine(gradient / root, momentum / root),
                    "best": [float(spectrum[min(rank, len(spectrum)) - 1]) for rank in RANKS],
                }
            )
        for role, each in by_role.items():
            means: dict[str, Any] = {key: _mean([one[key] for one in each]) for key in ("kept", "cosine", "gradient")}
            means["best"] = [_mean([one["best"][place] for one in each]) for place in range(len(RANKS))]
            self.found.append({"step": step, "role": role, **means})


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def _mean(numbers: Sequence[float]) -> float:
    return round(sum(numbers) / len(numbers), 4)
