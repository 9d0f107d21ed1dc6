"""Shard models as the options of a strategy say: what the Trainer's strategy and Fabric's have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_memopt.sharding.wrapping import blocks, divided_by_dtype, find_units, resolve_policy
from lightning_memopt.strategy.mesh import check_sizes, make_meshes, resolved_data_size
from lightning_memopt.strategy.model.refusals import refuse_fsdp1, refuse_parameters
from lightning_memopt.strategy.model.same_weights import check_same_structure
from lightning_memopt.strategy.model.shard import (
    Sharding,
    complete_sharding,
    earlier_sharding,
    is_sharded,
    shard,
)

Modules = list[type[nn.Module] | str] | type[nn.Module] | str | Callable[[nn.Module], bool]


class Sharder:
    """The options about sharding, and the meshes of ranks that follow from them.

    Attributes:
        cpu_offload: Whether parameters, gradients and state live in CPU memory.
        mesh: The mesh of all ranks; None until :meth:`make_meshes` is called.
        data_mesh: Its data-parallel part.
    """

    mesh: DeviceMesh | None = None
    data_mesh: DeviceMesh

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int,
        tensor_parallel_size: int,
        replicate_size: int,
        *,
        wrap: Modules | None,
        activation_checkpointing: bool | Modules | None,
        reshard_after_forward: bool | int | None,
        cpu_offload: bool,
    ) -> None:
        """Check the options; they are those of ``MemOptFSDPStrategy``."""
        check_sizes(data_parallel_size, tensor_parallel_size, replicate_size)
        self._data_size, self._tensor_size = data_parallel_size, tensor_parallel_size
        self.replicate_size = replicate_size
        self._wrap = resolve_policy("wrap", wrap)
        self._checkpoint_blocks = activation_checkpointing is True
        given = None if isinstance(activation_checkpointing, bool) else activation_checkpointing
        self._checkpoint_policy = resolve_policy("activation_checkpointing", given)
        self._reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    # ------------------------------------------------------------------ processes

    def make_meshes(self, device_type: str, world_size: int) -> DeviceMesh:
        """Return the mesh of all ranks, the same at every call.

        Raises:
            RuntimeError: If the sizes do not multiply to the number of ranks.
        """
        if self.mesh is None:
            size = resolved_data_size(self._data_size, self._tensor_size, self.replicate_size, world_size)
            meshes = make_meshes(device_type, size, self._tensor_size, self.replicate_size)
            self.mesh, self.data_mesh, self._fsdp_mesh = meshes
        return self.mesh

    def sampler_kwargs(self) -> dict[str, Any]:
        """Return the arguments of a sampler that divides batches over the data-parallel ranks."""
        return {"num_replicas": self.data_mesh.size(), "rank": self.data_mesh.get_local_rank()}

    def backend(self, device: torch.device) -> str | None:
        """Return the backend that offloaded parameters need; None for the default of the device."""
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and device.type == "cuda" else None

    # ------------------------------------------------------------------ models

    def shard(
        self, model: nn.Module, precision: str, device: torch.device, *, called: bool, layer_sync: Any = None
    ) -> bool:
        """Shard a model, unless it is sharded already, and return whether its user did that.

        Args:
            model: The model.
            precision: The name of the precision.
            device: The device of this rank.
            called: Whether the model's ``forward`` is called; see :func:`find_units`.
            layer_sync: Lightning's plugin that makes batch norms synchronize.

        Raises:
            ValueError: If the model or an option does not support sharding; nothing has changed then.
            TypeError: If FSDP1 wraps a module.
        """
        refuse_fsdp1(model)
        wanted = Sharding(self._fsdp_mesh, precision, self.cpu_offload, device, self._reshard_after_forward)
        earlier = earlier_sharding(model)
        if earlier is not None:
            earlier.check_same(wanted)
            return False
        if is_sharded(model):
            self._refuse_ignored_options()
            complete_sharding(model, device)
            return True
        self._refuse_missing_parallelism(model)
        check_same_structure(model)
        if layer_sync is not None:
            model = layer_sync.apply(model)
        units = find_units(model, self._wrap, called=called)
        refuse_parameters(model, units)
        if precision != "bf16-true":  # which converts all parameters to one dtype
            units = divided_by_dtype(model, units)
        shard(model, units, wanted, self._checkpointed(model))
        return False

    def _checkpointed(self, model: nn.Module) -> Sequence[nn.Module]:
        if self._checkpoint_policy is not None:
            return blocks(model, self._checkpoint_policy)
        found = blocks(model, self._wrap) if self._checkpoint_blocks else []
        if self._checkpoint_blocks and not found:
            raise ValueError(
                f"`activation_checkpointing=True` found no blocks in {type(model).__name__}: pass the classes of the "
                "modules whose activations to recompute."
            )
        return found

    def _refuse_missing_parallelism(self, model: nn.Module) -> None:
        if self._tensor_size > 1:
            raise ValueError(
                f"`tensor_parallel_size` is {self._tensor_size}, but no parameter of {type(model).__name__} is "
                "sharded: parallelize the model in its `configure_model` (with Fabric, before `fabric.setup`), with "
                "`device_mesh['tensor_parallel']`, or leave `tensor_parallel_size` at 1."
            )

    def _refuse_ignored_options(self) -> None:
        options = {
            "wrap": self._wrap is not None,
            "activation_checkpointing": self._checkpoint_blocks or self._checkpoint_policy is not None,
            "cpu_offload": self.cpu_offload,
        }
        ignored = [f"`{name}`" for name, given in options.items() if given]
        if ignored:
            raise ValueError(
                f"{' and '.join(ignored)} would have no effect, because `configure_model` has sharded the model "
                "already: apply the same there, or do not shard in `configure_model`."
            )
