"""Measures what an optimizer's gradients show about the momentum of each block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.optim.block import Block
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.optim.spectra import Kept, kept_momentum
from lightning_memopt.sharding.collectives import Sum, Task, request, run_tasks
from lightning_memopt.sharding.layout import Layout

# Number of elements per block whose full momentum is tracked. It gives a cosine over 100 steps to about 0.01.
SAMPLE = 512
# Weight of earlier observations each time that signals are read.
MEMORY = 0.7
# What is held of every block, in one row of each of these tables. M and V are there where this rank has the sample, and
# zero elsewhere. Their weights are 1−β₁ᵗ and 1−β₂ᵗ. The sums are those of G·M₋, ‖G‖², ‖M₋‖² and steps, then those of
# G·M, ‖G‖² and ‖M‖² over Adam's denominators: of all ranks until they last combined theirs, and of this rank since.
_TABLES = {
    "average": (SAMPLE, torch.float32),
    "square": (SAMPLE, torch.float32),
    "weights": (2, torch.float32),
    "sums": (7, torch.float64),
    "latest": (7, torch.float64),
}


@dataclass(frozen=True)
class BlockSignals:
    """Statistics of one block's gradients. All energies are squared Frobenius norms of the whole block.

    Attributes:
        oscillation: Cosine between a gradient G and the average M of the gradients before it, over the steps seen.
            Negative if gradients swing back and forth, positive if they drift.
        gradient_energy: Mean of ‖G‖² over the steps seen.
        momentum_energy: ‖M‖² of the full average, however much of it the block keeps. Like the spectrum, this is an
            average over all readings, and recent ones weigh most.
        spectrum: Squared singular values of the kept momentum, in descending order. In a stack, values of the same
            position are summed. After a reduction of the rank, the values of the larger rank remain. Of dense momentum,
            the 64 largest. Empty if no value is known: the block has no momentum.
        agreement: Cosine between G and M, both divided by the denominators of Adam. M includes G here. So close an
            update without momentum comes to full Adam's.
        damping: ‖M‖² / ‖G‖² of the same two: small where most of a gradient is noise, which averaging removes. 0 if
            unknown.
        noise_damping: The damping of pure noise, (1−β₁) / (1+β₁).
        lost: Energy of the difference between the full average and the kept momentum, without what a larger rank knew.
            An average like the spectrum. None if unknown.
    """

    oscillation: float
    gradient_energy: float
    momentum_energy: float
    spectrum: tuple[float, ...] = ()
    agreement: float = 0.0
    damping: float = 0.0
    noise_damping: float = 0.0
    lost: float | None = None

    @property
    def residual_energy(self) -> float:
        """Energy of the full average in unknown directions."""
        return max(0.0, self.momentum_energy - sum(self.spectrum)) if self.lost is None else self.lost

    def residual(self, rank: int) -> float:
        """Return the share that momentum of this rank lacks, of the known spectrum and of what is lost."""
        whole = sum(self.spectrum) + self.residual_energy
        return max(0.0, 1 - sum(self.spectrum[:rank]) / whole) if whole > 0 else 0.0


class Probe:
    """Tracks the gradients of an optimizer's steps, at a fixed random sample of each matrix's elements.

    On the sample, it keeps what no compressed kind has, even for blocks without momentum: the full averages of Adam, M
    of the gradients and V of their squares. The cost does not depend on the size of a block: each step reads 512
    elements per block. The sample is the same on every sharding. Ranks combine their parts only when signals are read,
    in one collective.

    Attributes:
        steps: Number of steps seen.
    """

    def __init__(self, optimizer: MemOpt) -> None:
        """Track an optimizer from its next step on."""
        self.steps = 0
        self._optimizer, self._follows = optimizer, True
        self._fresh = 0  # the number of steps from which M is that of the optimizer
        self._skipped = optimizer.skipped
        self._rows: dict[str, _Row] = {}
        self._held = {name: torch.zeros(0, size, dtype=dtype) for name, (size, dtype) in _TABLES.items()}
        # For every block, ‖M‖² and the spectrum's shares of it, as pairs of a weighted sum over readings and a weight;
        # and the share that is lost, in the same way.
        self._readings: dict[str, list[list[float]]] = {}
        self._lost: dict[str, list[float]] = {}
        self._latest: tuple[Any, tuple[Tensor, ...]] | None = None
        self._watching = optimizer.register_update_hook(self._after_update)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def rest(self) -> None:
        """Only count steps from now on."""
        self._follows = False

    def stop(self) -> None:
        """Stop tracking."""
        self._handle.remove()
        self._watching.remove()

    # ------------------------------------------------------------------ watching

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._optimizer.skipped > self._skipped:
            self._skipped = self._optimizer.skipped
            return
        self.steps += 1

    @torch.no_grad()
    def _after_update(self, params: set[Tensor]) -> None:
        if not self._follows:
            return
        seen = [
            (group["betas"], param.grad, self._row(block))
            for group, param, block in self._matrices()
            if param in params and param.grad is not None
        ]
        if not seen:
            return
        held = self._held
        places, rows, share, beta1, beta2, weight = self._constants([(betas, row) for betas, _, row in seen])
        new = held["average"].new_zeros(len(seen), SAMPLE)
        new.view(-1)[places] = torch.cat([row.take(grad).to(new) for _, grad, row in seen])
        old = held["average"][rows]
        square = held["square"][rows] * beta2 + new.square() * weight
        average = held["average"][rows] = old * beta1 + new * (1 - beta1)
        weights = held["weights"][rows] * torch.cat([beta1, beta2], dim=1) + torch.cat([1 - beta1, weight], dim=1)
        held["square"][rows], held["weights"][rows] = square, weights
        of_average, of_square = weights.split(1, dim=1)
        inverse = torch.where(square > 0, (of_square / square).sqrt(), 0.0)
        # The gradient gets M's bias, instead of M its correction: the first steps, whose M averages little, count less.
        short, full = new * inverse * of_average, average * inverse
        sums = [(new * old).sum(1), new.square().sum(1), old.square().sum(1), share]
        sums += [(short * full).sum(1), short.square().sum(1), full.square().sum(1)]
        if self.steps >= self._fresh:
            held["latest"][rows] += torch.stack(sums, dim=1).double()

    def _constants(self, seen: list[tuple[tuple[float, float], _Row]]) -> tuple[Tensor, ...]:
        """Return places, rows, shares and rates of these blocks: the same tensors as long as nothing changes.

        Creating them from numbers on the CPU would take a copy to the device for each of them in every step.
        """
        key = [(betas, id(row)) for betas, row in seen]
        if self._latest is None or self._latest[0] != key:
            new = self._held["average"].new_tensor
            tables = (
                torch.cat([row.places + index * SAMPLE for index, (_, row) in enumerate(seen)]),
                torch.tensor([row.position for _, row in seen], device=self._held["average"].device),
                new([row.share for _, row in seen]),
                new([beta1 for (beta1, _), _ in seen]).unsqueeze(1),
                new([beta2 for (_, beta2), _ in seen]).unsqueeze(1),
                new([1 - beta2 if beta2 < 1 else 1.0 for (_, beta2), _ in seen]).unsqueeze(1),
            )
            self._latest = (key, tables)
        return self._latest[1]

    def _matrices(self) -> Iterator[tuple[dict[str, Any], Tensor, Block]]:
        return (entry for entry in self._optimizer.blocks() if not entry[2].layout.vector)

    def _row(self, block: Block) -> _Row:
        """Return the block's row. Add a row for a new block."""
        row = self._rows.get(block.name)
        if row is None:
            row = _Row.of(block, len(self._rows))
            device = block.layout.device
            for key, table in self._held.items():
                self._held[key] = torch.cat([table.to(device), table.new_zeros(1, table.shape[1], device=device)])
        elif row.layout is not block.layout:  # the block has moved
            row = _Row.of(block, row.position)
        self._rows[block.name] = row
        return row

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def read(self) -> dict[str, BlockSignals]:
        """Return the signals of every block with a gradient so far. All ranks call it together, with equal results.

        While the probe rests, and until it has caught up afterwards, these are the signals of its last reading.
        """
        if not (self._follows and self._rows) or self.steps < self._fresh:
            return self._known()
        kept = kept_momentum(
            self._matrices(), self._optimizer.state, {name: row.index for name, row in self._rows.items()}
        )
        for name, (energy, lost) in self._put_together(kept).items():
            now, share = self._rows[name].scale * energy, lost / energy if energy > 0 else None
            shares = [value / now for value in kept[name].spectrum] if name in kept and now > 0 else []
            if share is not None and name in kept and not kept[name].complete:
                share = max(share, 1 - sum(shares))
            self._keep(name, now, shares, share)
        signals = self._known()
        self._held["sums"] = self._held["sums"] * MEMORY
        return signals

    def _keep(self, name: str, energy: float, shares: list[float], lost: float | None) -> None:
        """Add values to the averages over all readings. A single batch says little about a momentum's spectrum."""
        readings = self._readings.setdefault(name, [])
        if len(shares) >= len(readings):  # less is lost of a larger rank
            self._lost.pop(name, None)
        readings += [[0.0, 0.0] for _ in range(1 + len(shares) - len(readings))]
        known = sum(total / weight for total, weight in readings[1 + len(shares) :])
        for pair, value in zip(readings, [energy, *shares], strict=False):
            _average_(pair, value)
        if lost is not None:
            _average_(self._lost.setdefault(name, [0.0, 0.0]), min(1.0, max(0.0, lost - known)))

    def _known(self) -> dict[str, BlockSignals]:
        """Return the signals of every block that has been read."""
        signals, betas = {}, {block.name: group["betas"][0] for group, _, block in self._matrices()}
        for name, row in self._rows.items():
            if name not in self._readings:
                continue
            beta1 = betas.get(name, 0.0)
            product, grads, averages, steps, inner, short, full = self._held["sums"][row.position].tolist()
            energy, *spectrum = (total / weight for total, weight in self._readings[name])
            signals[name] = BlockSignals(
                oscillation=product / (grads * averages) ** 0.5 if grads * averages > 0 else 0.0,
                gradient_energy=row.scale * grads / steps if steps else 0.0,
                momentum_energy=energy,
                spectrum=tuple(sorted((energy * share for share in spectrum), reverse=True)),
                agreement=inner / (short * full) ** 0.5 if short * full > 0 else 0.0,
                damping=full / short if short > 0 else 0.0,
                noise_damping=(1 - beta1) / (1 + beta1),
                lost=energy * self._lost[name][0] / self._lost[name][1] if name in self._lost else None,
            )
        return signals

    def _put_together(self, kept: Mapping[str, Kept]) -> dict[str, tuple[float, float]]:
        """Combine the sums of all ranks. Return the energy of every block's average on the sample, and what is lost."""
        held = self._held
        lost = held["average"].clone()
        for group, _, block in self._matrices():
            if block.name in kept:
                row, sign = self._rows[block.name], -1 if group["maximize"] else 1  # the momentum is that of −G
                lost[row.position, row.places] -= sign * kept[block.name].elements
        energies = torch.stack([each.double().square().sum(1) for each in (held["average"], lost)], dim=1)
        sums = self._over_ranks(torch.cat([held["latest"], energies], dim=1))
        held["sums"] = held["sums"] + sums[:, :-2]
        held["latest"] = torch.zeros_like(held["latest"])
        return {name: (energy, lost) for name, (energy, lost) in zip(self._rows, sums[:, -2:].tolist(), strict=True)}

    def _over_ranks(self, mine: Tensor) -> Tensor:
        """Return this rank's rows, each summed over the ranks that shard its block."""
        rows = list(mine.unbind())
        run_tasks(_summed(rows, position, row.layout) for position, row in enumerate(self._rows.values()))
        return torch.stack(rows) if rows else mine

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return names, numbers and tensors, without side effects. All ranks call this together, with equal results."""
        held = self._held
        mine = torch.cat([held["average"], held["square"]], dim=1)
        average, square = self._over_ranks(mine).cpu().split(SAMPLE, dim=1)
        return {
            "steps": self.steps,
            "fresh": self._fresh if self._follows else None,
            "blocks": list(self._rows),
            "average": average,
            "square": square,
            "weights": held["weights"].cpu().clone(),
            "sums": held["sums"].cpu(),
            # Kept separate from the sums: adding them here would change the rounding compared with an unsaved run.
            "latest": self._over_ranks(held["latest"]).cpu(),
            "readings": {name: [list(pair) for pair in pairs] for name, pairs in self._readings.items()},
            "lost": {name: list(pair) for name, pair in self._lost.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks. Blocks that no longer exist are left out.

        Earlier versions did not save V, nor what is lost. V starts again from the mean of all squares. A probe that
        rested has an old M, which counts again when its weight has fallen to 1%.
        """
        self.steps = int(state["steps"])
        self._fresh = state.get("fresh", 0)
        if self._fresh is None:
            beta1 = max((float(group["betas"][0]) for group, *_ in self._matrices()), default=0.0)
            self._fresh = self.steps + (math.ceil(math.log(0.01) / math.log(beta1)) if beta1 > 0 else 0)
        self._readings = {name: [list(pair) for pair in pairs] for name, pairs in state["readings"].items()}
        self._lost = {name: list(pair) for name, pair in state.get("lost", {}).items()}
        blocks = {block.name: block for *_, block in self._matrices()}
        for position, name in enumerate(state["blocks"]):
            if name not in blocks:
                continue
            row = self._row(blocks[name])
            _, squares, _, steps, *_ = (state["sums"][position] + state["latest"][position]).tolist()
            self._held["square"][row.position, row.places] = squares / max(steps, 1.0) / row.sampled
            self._held["weights"][row.position] = 1.0
            for key, table in self._held.items():
                if key not in state:
                    continue
                saved = state[key][position].to(table)
                if key == "latest":
                    saved = row.share * saved
                mine = row.places if key in ("average", "square") else slice(len(saved))
                table[row.position, mine] = saved[mine]


@dataclass(frozen=True)
class _Row:
    """The sample of one block, and its place.

    Attributes:
        layout: The block's layout.
        position: Its row in the tables.
        sampled: Number of elements in the sample, over all ranks.
        places: The positions in the sample that this rank holds.
        index: Their coordinates in the local part of the block, one index tensor per dimension.
    """

    layout: Layout
    position: int
    sampled: int
    places: Tensor
    index: tuple[Tensor, ...]

    @staticmethod
    def of(block: Block, position: int) -> _Row:
        """Draw the block's sample. It depends only on the optimizer's seed and the block's name."""
        layout = block.layout
        numel = math.prod(layout.matrix)
        if numel <= SAMPLE:
            drawn = torch.arange(numel)
        else:
            drawn = torch.randint(numel, (SAMPLE,), generator=torch.Generator().manual_seed(block.key))
        index = torch.stack(torch.unravel_index(drawn, layout.matrix))
        index = index - torch.tensor(layout.offset).unsqueeze(1)
        mine = ((index >= 0) & (index < torch.tensor(layout.local).unsqueeze(1))).all(0)
        places = mine.nonzero().squeeze(1).to(layout.device)
        return _Row(layout, position, len(drawn), places, tuple(index[:, mine].to(layout.device)))

    @property
    def numel(self) -> int:
        """Number of elements of the block, over all ranks."""
        return math.prod(self.layout.matrix)

    @property
    def scale(self) -> float:
        """Elements of the block per element of the sample."""
        return self.numel / self.sampled

    @property
    def share(self) -> float:
        """Share of the sample that this rank holds. The shares of all ranks sum to 1, so a step counts once."""
        return len(self.places) / self.sampled

    def take(self, grad: Tensor) -> Tensor:
        """Return the local part of the sample."""
        return self.layout.take(grad)[self.index]


def _average_(pair: list[float], value: float) -> None:
    """Add a value to a weighted sum over readings, and to its weight."""
    pair[:] = MEMORY * pair[0] + value, MEMORY * pair[1] + 1.0


def _summed(rows: list[Tensor], position: int, layout: Layout) -> Task:
    for dim in range(-len(layout.matrix), 0):
        (rows[position],) = yield from request(Sum(rows[position], layout, dim))
