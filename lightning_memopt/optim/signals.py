"""What an optimizer's gradients show about the momentum of each block."""

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

# Elements per block whose full momentum is followed: a cosine over 100 steps is known to about 0.01.
SAMPLE = 512
# What earlier observations weigh each time that signals are read.
MEMORY = 0.7


@dataclass(frozen=True)
class BlockSignals:
    """What one block's gradients have shown. All energies are squared Frobenius norms of the whole block.

    Attributes:
        oscillation: Cosine between a gradient G and the average M of the gradients before it, over the steps seen:
            negative where gradients swing back and forth, positive where they drift.
        gradient_energy: Mean of ‖G‖² over the steps seen.
        momentum_energy: ‖M‖² of the full average, whatever the block keeps of it. It and the spectrum are averages over
            what was read until now, of which the latest weigh most.
        spectrum: Squared singular values of the momentum that is kept, descending; those of equal position added up in
            a stack. It goes on with those that a larger rank had before, and is empty where none is known (none was
            kept, or dense momentum).
    """

    oscillation: float
    gradient_energy: float
    momentum_energy: float
    spectrum: tuple[float, ...] = ()

    @property
    def residual_energy(self) -> float:
        """Energy of the full average in directions that are not known."""
        return max(0.0, self.momentum_energy - sum(self.spectrum))

    def residual(self, rank: int) -> float:
        """Return the share of the full average's energy that momentum of this rank, as far as known, lacks."""
        kept = sum(self.spectrum[:rank])
        return max(0.0, 1 - kept / self.momentum_energy) if self.momentum_energy > 0 else 0.0


class Probe:
    """Follows the gradients that an optimizer steps on, at a fixed random sample of every matrix's elements.

    On the sample it keeps the full average M that no compressed kind has, also for blocks without momentum. What that
    costs does not depend on the size of a block: a gather of 512 elements per block and step. The sample is the same on
    every sharding; ranks put their parts together only when somebody reads, in one collective.

    Attributes:
        steps: Steps seen.
    """

    def __init__(self, optimizer: MemOpt) -> None:
        """Watch an optimizer, from its next step on."""
        self.steps = 0
        self._optimizer, self._follows = optimizer, True
        self._skipped = optimizer.skipped
        self._rows: dict[str, _Row] = {}
        # One row per block. The average M where the sample is this rank's, zero elsewhere.
        self._average = torch.zeros(0, SAMPLE)
        # Sums of G·M, G², M² and of steps: what this rank has seen since ranks put theirs together, and all until then.
        self._mine = self._ours = torch.zeros(0, 4, dtype=torch.float64)
        # Of every block ‖M‖² and the spectrum's shares in it: weighted sums over all readings, and the weights.
        self._readings: dict[str, list[list[float]]] = {}
        self._latest: tuple[Any, tuple[Tensor, ...]] | None = None
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def rest(self) -> None:
        """Only count steps from now on."""
        self._follows = False

    def stop(self) -> None:
        """Watch no longer."""
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
        self._mine[rows] += torch.stack(sums, dim=1).double()
        self._average[rows] = old * decay + new * (1 - decay)

    def _tables(self, seen: list[tuple[float, _Row]]) -> tuple[Tensor, ...]:
        """Return places, rows, shares and decays of these blocks, the same tensors as long as nothing changes.

        Made from numbers on the CPU, they would cost a copy to the device each in every step.
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
        """Return the block's row; add one for a block that is seen for the first time."""
        row = self._rows.get(block.name)
        if row is None:
            row = _Row.of(block, len(self._rows))
            if not self._rows:
                self._average, self._mine, self._ours = (
                    tensor.to(block.layout.device) for tensor in (self._average, self._mine, self._ours)
                )
            self._average, self._mine, self._ours = (
                torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
                for tensor in (self._average, self._mine, self._ours)
            )
        elif row.layout is not block.layout:  # moved since
            row = _Row.of(block, row.position)
        self._rows[block.name] = row
        return row

    # ------------------------------------------------------------------ reading

    @torch.no_grad()
    def read(self) -> dict[str, BlockSignals]:
        """Return the signals of every block with a gradient so far, the same on every rank, which ask together."""
        energies = self._put_together()
        spectra = _spectra(self._matrices(), self._optimizer.state)
        signals = {}
        for name, row in self._rows.items():
            product, grads, averages, steps = self._ours[row.position].tolist()
            scale = row.numel / row.sampled
            now = scale * energies[name]
            shares = [value / now for value in spectra.get(name, ())] if now > 0 else []
            energy, *spectrum = self._averaged(name, [now, *shares])
            signals[name] = BlockSignals(
                oscillation=product / (grads * averages) ** 0.5 if grads * averages > 0 else 0.0,
                gradient_energy=scale * grads / steps if steps else 0.0,
                momentum_energy=energy,
                spectrum=tuple(sorted((energy * share for share in spectrum), reverse=True)),
            )
        self._ours = self._ours * MEMORY
        return signals

    def _averaged(self, name: str, values: list[float]) -> list[float]:
        """Return averages over this reading and those before; one batch says little about a momentum's spectrum."""
        readings = self._readings.setdefault(name, [])
        readings += [[0.0, 0.0] for _ in range(len(values) - len(readings))]
        for pair, value in zip(readings, values, strict=False):
            pair[:] = MEMORY * pair[0] + value, MEMORY * pair[1] + 1.0
        return [total / weight for total, weight in readings]

    def _put_together(self) -> dict[str, float]:
        """Add what ranks have seen, and return the energy of every block's average on the sample."""
        energy = self._average.double().square().sum(1, keepdim=True)
        sums = self._over_ranks(torch.cat([self._mine, energy], dim=1))
        self._ours = self._ours + sums[:, :-1]
        self._mine = torch.zeros_like(self._mine)
        return dict(zip(self._rows, sums[:, -1].tolist(), strict=True))

    def _over_ranks(self, mine: Tensor) -> Tensor:
        """Return rows of this rank's numbers with those of the other ranks of each block's shards added."""
        rows = list(mine.unbind())
        run_tasks(_summed(rows, position, row.layout) for position, row in enumerate(self._rows.values()))
        return torch.stack(rows) if rows else mine

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Return names, numbers and tensors, the same on every rank, which ask together; nothing changes."""
        return {
            "steps": self.steps,
            "blocks": list(self._rows),
            "average": self._over_ranks(self._average).cpu(),
            "sums": self._ours.cpu(),
            # Apart from the sums, which would else be rounded differently from those of a run that is not saved.
            "latest": self._over_ranks(self._mine).cpu(),
            "readings": {name: [list(pair) for pair in pairs] for name, pairs in self._readings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, on any number of ranks; blocks that are unknown now are left out."""
        self.steps = int(state["steps"])
        self._readings = {name: [list(pair) for pair in pairs] for name, pairs in state["readings"].items()}
        blocks = {block.name: block for *_, block in self._matrices()}
        for position, name in enumerate(state["blocks"]):
            if name in blocks:
                row = self._row(blocks[name])
                mine = row.places
                self._average[row.position, mine] = state["average"][position].to(self._average)[mine]
                self._ours[row.position] = state["sums"][position].to(self._ours)
                self._mine[row.position] = row.share * state["latest"][position].to(self._mine)


@dataclass(frozen=True)
class _Row:
    """Where one block's sample lies.

    Attributes:
        layout: The block's layout.
        position: Its row.
        sampled: Number of elements in the sample, over all ranks.
        places: Which of them are this rank's.
        index: Where those are in this rank's part of the block, an index per dimension.
    """

    layout: Layout
    position: int
    sampled: int
    places: Tensor
    index: tuple[Tensor, ...]

    @staticmethod
    def of(block: Block, position: int) -> _Row:
        """Draw the block's sample: it depends on the optimizer's seed and the block's name only."""
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
        """Elements of the block, over all ranks."""
        return math.prod(self.layout.matrix)

    @property
    def share(self) -> float:
        """Share of the sample that is this rank's: those of all ranks add up to one step."""
        return len(self.places) / self.sampled

    def take(self, grad: Tensor) -> Tensor:
        """Return this rank's part of the sample."""
        return self.layout.take(grad)[self.index]


def _summed(rows: list[Tensor], position: int, layout: Layout) -> Task:
    for dim in range(-len(layout.matrix), 0):
        (rows[position],) = yield from request(Sum(rows[position], layout, dim))


def _spectra(
    blocks: Iterable[tuple[Any, Tensor, Block]], states: Mapping[Tensor, dict[str, Tensor]]
) -> dict[str, tuple[float, ...]]:
    """Return the squared singular values of every momentum that is kept in factors, from their Gram matrices."""
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
    """Find the eigenvalues of (LᵀL) (R Rᵀ), the squared singular values of L R."""
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
    """Return this rank's part of a factor along a dimension of the block; some kinds need all of it on every rank."""
    return layout.along(factor, at=dim, dim=dim) if factor.shape[dim] == layout.matrix[dim] else factor
