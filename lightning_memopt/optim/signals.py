"""Measures what an optimizer's gradients show about the momentum of each block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_memopt.kinds.linalg import gram
from lightning_memopt.optim.block import Block
from lightning_memopt.optim.memopt import MemOpt
from lightning_memopt.sharding.collectives import Sum, Task, gather, packed, request, run_tasks
from lightning_memopt.sharding.layout import Layout

# Number of elements per block whose full momentum is tracked. It gives a cosine over 100 steps to about 0.01.
SAMPLE = 512
# Weight of earlier observations each time that signals are read.
MEMORY = 0.7


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
            position are summed. After a reduction of the rank, the values of the larger rank remain. Empty if no
            value is known (no momentum, or a dense one).
    """

    oscillation: float
    gradient_energy: float
    momentum_energy: float
    spectrum: tuple[float, ...] = ()

    @property
    def residual_energy(self) -> float:
        """Energy of the full average in unknown directions."""
        return max(0.0, self.momentum_energy - sum(self.spectrum))

    def residual(self, rank: int) -> float:
        """Return the share of the full average's energy that momentum of this rank lacks, as far as is known."""
        kept = sum(self.spectrum[:rank])
        return max(0.0, 1 - kept / self.momentum_energy) if self.momentum_energy > 0 else 0.0


class Probe:
    """Tracks the gradients of an optimizer's steps, at a fixed random sample of each matrix's elements.

    On the sample, it keeps the full average M that no compressed kind has, even for blocks without momentum. The cost
    does not depend on the size of a block: each step reads 512 elements per block. The sample is the same on every
    sharding. Ranks combine their parts only when signals are read, in one collective.

    Attributes:
        steps: Number of steps seen.
    """

    def __init__(self, optimizer: MemOpt) -> None:
        """Track an optimizer from its next step on."""
        self.steps = 0
        self._optimizer, self._follows = optimizer, True
        self._skipped = optimizer.skipped
        self._rows: dict[str, _Row] = {}
        # One row per block. Holds M where this rank has the sample, and zero elsewhere.
        self._average = torch.zeros(0, SAMPLE)
        # Sums of G·M, G², M² and of steps: of this rank since ranks last combined theirs, and of all ranks until then.
        self._local = self._combined = torch.zeros(0, 4, dtype=torch.float64)
        # For every block, ‖M‖² and the spectrum's shares of it, as pairs of a weighted sum over readings and a weight.
        self._readings: dict[str, list[list[float]]] = {}
        self._latest: tuple[Any, tuple[Tensor, ...]] | None = None
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def rest(self) -> None:
        """Only count steps from now on."""
        self._follows = False

    def stop(self) -> None:
        """Stop tracking."""
        self._handle.remove()

    # ------------------------------------------------------------------ watching

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._optimizer.skipped > self._skipped:
            self._skipped = self._optimizer.skipped
            return
        self.steps += 1
        if not self._follows:
            return
        seen = [
            (group["betas"][0], param.grad, self._row(block))
            for group, param, block in self._matrices()
            if param.grad is not None
        ]
        if not seen:
            return
        places, rows, share, decay = self._tables([(beta, row) for beta, _, row in seen])
        new = self._average.new_zeros(len(seen), SAMPLE)
        new.view(-1)[places] = torch.cat([row.take(grad).to(new) for _, grad, row in seen])
        old = self._average[rows]
        sums = [(new * old).sum(1), new.square().sum(1), old.square().sum(1), share]
        self._local[rows] += torch.stack(sums, dim=1).double()
        self._average[rows] = old * decay + new * (1 - decay)

    def _tables(self, seen: list[tuple[float, _Row]]) -> tuple[Tensor, ...]:
        """Return places, rows, shares and decay rates of these blocks: the same tensors as long as nothing changes.

        Creating them from numbers on the CPU would take a copy to the device for each of them in every step.
        """
        key = [(beta, id(row)) for beta, row in seen]
        if self._latest is None or self._latest[0] != key:
            new = self._average.new_tensor
            tables = (
                torch.cat([row.places + index * SAMPLE for index, (_, row) in enumerate(seen)]),
                torch.tensor([row.position for _, row in seen], device=self._average.device),
                new([row.share for _, row in seen]),
                new([beta for beta, _ in seen]).unsqueeze(1),
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
            if not self._rows:
                self._average, self._local, self._combined = (
                    tensor.to(block.layout.device) for tensor in (self._average, self._local, self._combined)
                )
            self._average, self._local, self._combined = (
                torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
                for tensor in (self._average, self._local, self._combined)
            )
        elif row.layout is not block.layout:  # the block has moved
            row = _Row.of(block, row.position)
        self._rows[block.name] = row
        return row

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def read(self) -> dict[str, BlockSignals]:
        """Return the signals of every block with a gradient so far. All ranks call it together, with equal results.

        While the probe rests, these are the signals of its last reading.
        """
        if not (self._follows and self._rows):
            return self._known()
        energies = self._put_together()
        spectra = _spectra(self._matrices(), self._optimizer.state)
        for name, row in self._rows.items():
            now = row.scale * energies[name]
            shares = [value / now for value in spectra.get(name, ())] if now > 0 else []
            self._keep(name, [now, *shares])
        signals = self._known()
        self._combined = self._combined * MEMORY
        return signals

    def _keep(self, name: str, values: list[float]) -> None:
        """Add values to the averages over all readings. A single batch says little about a momentum's spectrum."""
        readings = self._readings.setdefault(name, [])
        readings += [[0.0, 0.0] for _ in range(len(values) - len(readings))]
        for pair, value in zip(readings, values, strict=False):
            pair[:] = MEMORY * pair[0] + value, MEMORY * pair[1] + 1.0

    def _known(self) -> dict[str, BlockSignals]:
        """Return the signals of every block that has been read."""
        signals = {}
        for name, row in self._rows.items():
            if name not in self._readings:
                continue
            product, grads, averages, steps = self._combined[row.position].tolist()
            energy, *spectrum = (total / weight for total, weight in self._readings[name])
            signals[name] = BlockSignals(
                oscillation=product / (grads * averages) ** 0.5 if grads * averages > 0 else 0.0,
                gradient_energy=row.scale * grads / steps if steps else 0.0,
                momentum_energy=energy,
                spectrum=tuple(sorted((energy * share for share in spectrum), reverse=True)),
            )
        return signals

    def _put_together(self) -> dict[str, float]:
        """Combine the sums of all ranks. Return the energy of every block's average on the sample."""
        energy = self._average.double().square().sum(1, keepdim=True)
        sums = self._over_ranks(torch.cat([self._local, energy], dim=1))
        self._combined = self._combined + sums[:, :-1]
        self._local = torch.zeros_like(self._local)
        return dict(zip(self._rows, sums[:, -1].tolist(), strict=True))

    def _over_ranks(self, mine: Tensor) -> Tensor:
        """Return this rank's rows, each summed over the ranks that shard its block."""
        rows = list(mine.unbind())
        run_tasks(_summed(rows, position, row.layout) for position, row in enumerate(self._rows.values()))
        return torch.stack(rows) if rows else mine

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return names, numbers and tensors, without side effects. All ranks call this together, with equal results."""
        return {
            "steps": self.steps,
            "blocks": list(self._rows),
            "average": self._over_ranks(self._average).cpu(),
            "sums": self._combined.cpu(),
            # Kept separate from the sums: adding them here would change the rounding compared with an unsaved run.
            "latest": self._over_ranks(self._local).cpu(),
            "readings": {name: [list(pair) for pair in pairs] for name, pairs in self._readings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on any number of ranks. Blocks that no longer exist are left out."""
        self.steps = int(state["steps"])
        self._readings = {name: [list(pair) for pair in pairs] for name, pairs in state["readings"].items()}
        blocks = {block.name: block for *_, block in self._matrices()}
        for position, name in enumerate(state["blocks"]):
            if name in blocks:
                row = self._row(blocks[name])
                mine = row.places
                self._average[row.position, mine] = state["average"][position].to(self._average)[mine]
                self._combined[row.position] = state["sums"][position].to(self._combined)
                self._local[row.position] = row.share * state["latest"][position].to(self._local)


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


def _summed(rows: list[Tensor], position: int, layout: Layout) -> Task:
    for dim in range(-len(layout.matrix), 0):
        (rows[position],) = yield from request(Sum(rows[position], layout, dim))


def _spectra(
    blocks: Iterable[tuple[Any, Tensor, Block]], states: Mapping[Tensor, dict[str, Tensor]]
) -> dict[str, tuple[float, ...]]:
    """Return the squared singular values of every factored momentum, computed from Gram matrices."""
    spectra: dict[str, Tensor] = {}
    wanted = [
        (block, states[param], block.requests_for(states[param], block.recipe.momentum.keys))
        for _, param, block in blocks
        if states.get(param)
    ]
    for wave in packed(wanted, lambda entry: sum(piece.nbytes for piece in entry[2])):
        found = gather([piece for *_, pieces in wave for piece in pieces])
        tasks = []
        for block, state, pieces in wave:
            mine, found = found[: len(pieces)], found[len(pieces) :]
            tasks.append(_spectrum(spectra, block, block.with_gathered(state, block.recipe.momentum.keys, mine)))
        run_tasks(tasks)
    return {name: tuple(values.tolist()) for name, values in spectra.items()}


def _spectrum(spectra: dict[str, Tensor], block: Block, state: dict[str, Tensor]) -> Task:
    """Compute the eigenvalues of (LᵀL) (R Rᵀ), the squared singular values of L R."""
    factors = block.recipe.momentum.factors(state, block.work)
    if factors is None:
        return
    rows, columns = (_mine(factor, dim, block.work) for factor, dim in zip(factors, (-2, -1), strict=True))
    left, right = yield from request(Sum(gram(rows), block.work, -2), Sum(gram(columns.mT), block.work, -1))
    values, vectors = torch.linalg.eigh(left)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    squares = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).flip(-1)
    squares = squares.reshape(-1, squares.shape[-1]).sum(0)
    if len(block.work.matrix) > 2:
        (squares,) = yield from request(Sum(squares, block.work, -3))
    spectra[block.name] = squares


def _mine(factor: Tensor, dim: int, layout: Layout) -> Tensor:
    """Return the local part of a factor along a dimension of the block. Some kinds keep it whole on every rank."""
    return layout.along(factor, at=dim, dim=dim) if factor.shape[dim] == layout.matrix[dim] else factor
