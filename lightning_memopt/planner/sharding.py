"""How the strategy would shard a module, and what a rank then holds beside its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_memopt.planner.activations import Activations
from lightning_memopt.planner.planned import PlannedMesh, sharded_parameter, whole_parameter
from lightning_memopt.planner.settings import RunSettings
from lightning_memopt.plans.placement import shard_dims
from lightning_memopt.sharding.wrapping import (
    Policy,
    Unit,
    divided_by_dtype,
    find_units,
    own_modules,
    parameters_by_unit,
)


@dataclass(frozen=True)
class Sharding:
    """How the strategy would shard a module.

    Attributes:
        params: All parameters.
        mesh: The ranks that share them.
        precision: Lightning's name of the precision.
        units: The modules that are gathered as units; none if nothing is sharded.
        own: The parameters of every unit, without those of inner units.
        dims: The dimension along which every parameter of a unit is sharded.
        reshard: Whether gathered parameters are freed between forward and backward pass; n to keep an n-th of them.
        offload: Whether shards are in CPU memory.
        layers: The parameters that gradient release would update together, if nothing is sharded.
        released: Whether gradients are released.
        unreduced: Whether gradients of full size add up over several batches.
        reused: The parameters of units that contain others which a pass may use twice, as a tied head does.
        late: Those whose gradients come after those of all layers: embeddings of models with a head of their own.
    """

    params: tuple[nn.Parameter, ...]
    mesh: PlannedMesh
    precision: str
    units: tuple[Unit, ...]
    own: dict[nn.Module, list[nn.Parameter]]
    dims: dict[Tensor, int]
    reshard: bool | int
    offload: bool
    layers: tuple[Sequence[nn.Parameter], ...]
    released: bool
    unreduced: bool
    reused: tuple[nn.Parameter, ...]
    late: frozenset[Tensor]

    @staticmethod
    def of(module: nn.Module, name: str, mesh: PlannedMesh, settings: RunSettings) -> Sharding:
        """Return how the strategy would shard a module, which is called ``name`` in a wrapper."""
        alone, precision = settings.alone, settings.precision
        units = [] if alone else _units(module, name, settings.wrap, precision)
        own = _own(units)
        divided = {param for params in own.values() for param in params}
        dims = shard_dims(module, mesh.ranks)
        if not isinstance(settings.reshard_after_forward, bool):
            dims = dict.fromkeys(dims, 0)  # as the strategy does
        reused, late = _uses(module, [param for unit in units if _holds(unit, own) for param in own[unit.module]])
        return Sharding(
            params=tuple(module.parameters()),
            mesh=mesh,
            precision=precision,
            units=tuple(units),
            own=own,
            dims={} if alone else {key: dim for key, dim in dims.items() if key in divided},
            reshard=settings.reshard_after_forward,
            offload=settings.cpu_offload,
            layers=tuple(parameters_by_unit(module)) if alone else (),
            released=settings.gradient_release,
            unreduced=settings.unreduced,
            reused=reused,
            late=late,
        )

    def planned(self, param: nn.Parameter) -> nn.Parameter:
        """Return the rank's planned parameter. Parameters outside all units are not sharded."""
        dtype = self.dtype(param)
        if param not in self.dims:
            return whole_parameter(param, dtype)
        return sharded_parameter(param, dtype, dim=self.dims[param], mesh=self.mesh)

    def dtype(self, tensor: Tensor) -> torch.dtype:
        """Return the dtype that a parameter or buffer is kept in."""
        return torch.bfloat16 if self.precision == "bf16-true" and tensor.is_floating_point() else tensor.dtype

    def numbers(self, param: Tensor) -> int:
        """Return the number of elements of a parameter on every rank, padded to the number on the first."""
        if param not in self.dims:
            return param.numel()
        length = param.shape[self.dims[param]]
        return -(-length // self.mesh.ranks) * (param.numel() // max(1, length))

    def stored(self, params: Iterable[Tensor]) -> int:
        """Return the bytes of parameters, or of their gradients, on a rank."""
        return sum(self.numbers(param) * self.dtype(param).itemsize for param in params)

    def gathered(self, params: Iterable[Tensor]) -> int:
        """Return the bytes of gathered parameters, or of their gradients before they are reduced."""
        half = self.precision == "bf16-mixed"
        sizes = (
            (self.numbers(param), torch.bfloat16 if half and param.is_floating_point() else self.dtype(param))
            for param in params
        )
        return self.mesh.ranks * sum(numbers * dtype.itemsize for numbers, dtype in sizes)

    def reduced(self, params: Iterable[Tensor]) -> int:
        """Return the bytes of the buffer from which gradients are reduced: in float32 with ``bf16-mixed``."""
        mixed = self.precision == "bf16-mixed"
        sizes = (self.numbers(param) * (4 if mixed else self.dtype(param).itemsize) for param in params)
        return self.mesh.ranks * sum(sizes)

    @property
    def outer(self) -> list[nn.Parameter]:
        """The parameters of units that contain others. They stay gathered while the others run."""
        return [param for unit in self.units if self._contains(unit) for param in self.own[unit.module]]

    @property
    def inner(self) -> list[list[nn.Parameter]]:
        """The parameters of every other unit, largest first."""
        found = [self.own[unit.module] for unit in self.units if not self._contains(unit)]
        return sorted(found, key=self.gathered, reverse=True)

    def unsharded(self) -> int:
        """Return the most bytes of gathered parameters and unreduced gradients, with the buffers of collectives.

        FSDP2 gathers a unit into a buffer and copies it out, gathers the next one ahead, and reduces gradients from a
        buffer that it keeps until the next reduction below the same outermost unit. The units that contain others stay
        gathered, and their gradients are reduced last. This is the largest of several moments, each at the largest
        units.
        """
        if not self.units:
            return self._copies()
        early = self.gathered(param for param in _trained(self.outer) if param not in self.late)
        # A weight that is used twice has two gradients, and then their sum.
        added = 2 * max((self.gathered([param]) for param in self.reused), default=0)
        around = self.gathered(self.outer)
        computed = around + self.gathered(_trained(self.outer)) + added + self._reducing()
        return self._kept() + max(self._start(), self._among_layers() + early, computed, self._reduced_last())

    def passing(self, activations: Activations) -> int:
        """Return the most bytes that a pass takes at a time beside shards and reduced gradients, with activations.

        Gradients of the units that contain others come one after the other, and are counted with the activations.
        """
        if not self.units:
            return self._copies() + activations.peak
        begun, during = self._start() + activations.before_layers, self._among_layers() + activations.with_outer
        return self._kept() + max(begun, during, self._reduced_last())

    def _start(self) -> int:
        """Return the bytes when a pass begins: the buffer of a gather is kept until the next one is copied out."""
        first, moved = (max(map(size, self.inner), default=0) for size in (self.gathered, self._moved))
        around, twice = self.gathered(self.outer), 1 + self._buffers
        return max(twice * around + self._moved(self.outer), twice * (around + first) + moved)

    def _among_layers(self) -> int:
        """Return the most bytes while a layer runs, without gradients of units that contain others."""
        inner, buffers = self.inner, self._buffers
        first, second, *_ = [*map(self.gathered, inner), 0, 0]
        moved = max(map(self._moved, inner), default=0)
        grads = max((self.gathered(_trained(params)) for params in inner), default=0)
        # A unit that is frozen, in part or whole, is freed after the next one is gathered.
        frozen = max((self.gathered(params) - self.gathered(_trained(params)) for params in inner), default=0)
        ahead = 0 if self.reshard is False else buffers * second
        backward = max(ahead + grads, buffers * first + moved + frozen) + self._reducing()
        forward = max(buffers * (first + second), buffers * first + moved)
        return self.gathered(self.outer) + first + max(backward, forward)

    def _reduced_last(self) -> int:
        """Return the most bytes when gradients of units that contain others are reduced, and activations are gone."""
        outer = [self.own[unit.module] for unit in self.units if self._contains(unit)]
        around, grads = self.gathered(self.outer), self.gathered(_trained(self.outer))
        freed = max((self.reduced(_trained(params)) - self.gathered(params) for params in outer), default=0)
        return around + grads + freed + self._reducing()

    def _kept(self) -> int:
        """Return the bytes of what a pass keeps in all of its moments."""
        sizes = [self.gathered(params) for params in self.inner]
        kept = 0  # between the forward and the backward pass
        if self.reshard is False:
            kept = sum(sizes) - max(sizes, default=0)
        elif self.reshard is not True:
            kept = sum(sizes) // self.reshard
        held = self.gathered(_trained(self.params)) if self.unreduced else 0
        # Offloaded shards of a unit come from the CPU while gradients go there.
        transit = 2 * max(map(self.stored, self.own.values()), default=0) if self.offload else 0
        return kept + held + transit

    @property
    def _buffers(self) -> bool:
        """Whether a gather goes through a buffer: one rank copies its shards without."""
        return self.mesh.ranks > 1

    def _copies(self) -> int:
        """Return the bytes of autocast's copies of matrices, which exist before gradients do."""
        if self.precision != "bf16-mixed" or not self.released:
            return 0
        return sum(2 * param.numel() for param in self.params if param.ndim > 1 and param.is_floating_point())

    def _moved(self, params: Iterable[Tensor]) -> int:
        """Return the bytes of what is copied once more after a gather, because of the dimension that is sharded."""
        buffers = self.mesh.ranks > 1
        moved = self.gathered(param for param in params if self.dims.get(param)) if buffers else 0
        cast = self.gathered(params) // self.mesh.ranks if self.precision == "bf16-mixed" else 0
        return moved + cast

    def _reducing(self) -> int:
        """Return the bytes of gradients that are being reduced: the largest unit below every outermost one.

        A unit that contains others has then freed more than this: its gathered parameters, and their gradients.
        """
        found, layers = 0, [unit.module for unit in self.units if not self._contains(unit)]
        for root in (unit for unit in self.units if unit.outermost):
            inside = set(root.module.modules())
            found += max((self.reduced(_trained(self.own[layer])) for layer in layers if layer in inside), default=0)
        return found

    def held_gradients(self, *, release: bool) -> int:
        """Return the most bytes of reduced gradients that exist at a time.

        With release, these are the gradients of the two largest units, since one may begin while another is applied, or
        those of units that contain others, which end last. What is not sharded on several ranks is not released.
        """
        everything = self.stored(_trained(self.params))
        if not release:
            return everything
        if not self.units:
            return sum(sorted(self.stored(_trained(unit)) for unit in self.layers)[-2:]) if self.layers else everything
        sizes = sorted(self.stored(_trained(params)) for params in self.inner)
        return self.stored(_trained(self.loose)) + max(
            sum(sizes[-2:]), self.stored(_trained(self.outer)) + sum(sizes[-1:])
        )

    @property
    def loose(self) -> list[nn.Parameter]:
        """The parameters that are not sharded though others are."""
        return [param for param in self.params if self.units and param not in self.dims]

    @property
    def updated_together(self) -> list[Sequence[nn.Parameter]]:
        """The parameters that are updated together with release."""
        return [*self.own.values(), self.loose] if self.units else [*self.layers]

    def _contains(self, unit: Unit) -> bool:
        return _holds(unit, self.own)


def _trained(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [param for param in params if param.requires_grad]


def _own(units: Sequence[Unit]) -> dict[nn.Module, list[nn.Parameter]]:
    """Return the parameters of every unit, without those of inner units."""
    modules = {unit.module for unit in units}
    return {
        unit.module: list(
            dict.fromkeys(
                param
                for _, inner in own_modules(unit.module, modules)
                for param in inner.parameters(recurse=False)
                if param.ndim > 0
            )
        )
        for unit in units
    }


def _uses(module: nn.Module, outer: Sequence[nn.Parameter]) -> tuple[tuple[nn.Parameter, ...], frozenset[Tensor]]:
    """Return the fields ``reused`` and ``late`` of :class:`Sharding`.

    What a function does with a weight is not visible: it may use an embedding as the head, unless the model has another
    weight of that shape.
    """
    owners = Counter(param for _, param in module.named_parameters(remove_duplicate=False))
    tables: set[Tensor] = {child.weight for child in module.modules() if isinstance(child, nn.Embedding)}
    shapes = Counter(param.shape for param in outer)
    late = {param for param in outer if param in tables and owners[param] == 1 and shapes[param.shape] > 1}
    reused = (param for param in outer if owners[param] > 1 or param in tables - late)
    return tuple(param for param in reused if param.requires_grad), frozenset(late)


def _holds(unit: Unit, own: dict[nn.Module, list[nn.Parameter]]) -> bool:
    """Return whether a unit contains others."""
    return any(other in own for other in unit.module.modules() if other is not unit.module)


def _units(module: nn.Module, name: str, wrap: Policy | None, precision: str) -> list[Unit]:
    """Return the units of a LightningModule, or of a wrapper around another module, whose unit is called ``name``."""
    alone = not hasattr(module, "training_step")
    root = nn.Module() if alone else module
    if alone:
        root.add_module("model", module)
    units = find_units(root, wrap)
    if precision != "bf16-true":  # bf16-true has one dtype
        units = divided_by_dtype(root, units)
    if not alone:
        return units
    return [
        Unit(unit.name.removeprefix("model").removeprefix(".") or name, unit.module, unit.outermost) for unit in units
    ]
