"""The strategy behind ``Fabric(strategy="memopt_fsdp")``."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.strategy.checkpoint.fabric import load_state, save_state
from lightning_memopt.strategy.checkpoint.io import atomic_io, finish, in_background
from lightning_memopt.strategy.gradients import (
    average_gradients,
    clip_grad_norm_,
    clip_grad_value_,
    loose_parameters,
)
from lightning_memopt.strategy.model.precision import (
    ShardedFabricMixedPrecision,
    refuse_released,
    sharded_fabric_plugin,
)
from lightning_memopt.strategy.model.refusals import refuse_accelerator, refuse_embeddings
from lightning_memopt.strategy.model.shard import attributes_kept, reduction_paused
from lightning_memopt.strategy.rebinding import KnownParameters, move_state, rebind
from lightning_memopt.strategy.sharder import Modules, Sharder


class MemOptFabricStrategy(ModelParallelStrategy):
    """:class:`MemOptFSDPStrategy` for Fabric: the same sharding, checkpoints and options.

    A module is a unit, because Fabric calls its ``forward``. The children of a LightningModule are units, as under a
    Trainer. There is no option for accumulation: ``fabric.no_backward_sync`` says when gradients are reduced;
    and none for gradient release: call ``release_gradients`` of the optimizer after ``fabric.setup``.

    Args:
        data_parallel_size: Number of data-parallel ranks; ``auto`` for all ranks that tensor parallelism leaves.
        tensor_parallel_size: A value above 1 requires a module that is parallelized before ``fabric.setup``, with
            ``fabric.strategy.device_mesh``.
        replicate_size: Number of replicas of the sharded model.
        wrap: Modules to gather as units.
        activation_checkpointing: Modules whose activations are recomputed in the backward pass.
        reshard_after_forward: Whether weights are freed between the forward and the backward pass.
        cpu_offload: Whether to keep parameters, gradients and optimizer state in CPU memory.
        save_distributed_checkpoint: Whether to save a checkpoint as a directory with a file per rank, or as one file.
        verify: Whether to read a checkpoint once before loading, to compare its checksums.
        process_group_backend: Backend of the process group; None for the default of the device.
        timeout: Timeout of collectives.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is invalid, or a class cannot be imported.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        replicate_size: int = 1,
        *,
        wrap: Modules | None = None,
        activation_checkpointing: bool | Modules | None = None,
        reshard_after_forward: bool | int | None = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        verify: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        self._sharder = Sharder(
            data_parallel_size,
            tensor_parallel_size,
            replicate_size,
            wrap=wrap,
            activation_checkpointing=activation_checkpointing,
            reshard_after_forward=reshard_after_forward,
            cpu_offload=cpu_offload,
        )
        super().__init__(
            lambda module, _: module,
            data_parallel_size,
            tensor_parallel_size,
            save_distributed_checkpoint,
            process_group_backend,
            timeout,
        )
        self._verify = verify
        self._autocast = False
        self._known: WeakKeyDictionary[nn.Module, KnownParameters] = WeakKeyDictionary()
        # Ranks must agree about these, and may not collect a weak reference at the same time.
        self._with_loose: list[nn.Module] = []
        self._paused: set[nn.Module] = set()
        self._backward_sync_control = _SyncControl(self._pause)

    # ------------------------------------------------------------------ guards

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        refuse_accelerator(accelerator, type(self).__name__)
        self._accelerator = accelerator

    @property
    @override
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        self._precision = sharded_fabric_plugin(precision)

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """The user's CheckpointIO, or one that replaces files atomically."""
        self._checkpoint_io = atomic_io(self._checkpoint_io, verify=self._verify)
        return self._checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io
        if in_background(io) is not None:
            atexit.register(finish, io)  # Fabric has no end, and Python does not show the errors of its threads

    # ------------------------------------------------------------------ processes

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return self._sharder.sampler_kwargs()

    @override
    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        self._device_mesh = self._sharder.make_meshes(self.root_device.type, self.world_size)
        self._data_parallel_size = self._sharder.data_mesh.size()

    @override
    def _get_process_group_backend(self) -> str:
        return (
            self._process_group_backend
            or self._sharder.backend(self.root_device)
            or super()._get_process_group_backend()
        )

    # ------------------------------------------------------------------ modules and optimizers

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        refuse_embeddings(module)
        known = self._known.setdefault(module, KnownParameters())
        known.learn(module)
        plugin = self.precision
        with attributes_kept(module):
            called = not isinstance(module, LightningModule)
            users = self._sharder.shard(module, str(plugin.precision), self.root_device, called=called)
            self._autocast |= users  # all modules share the plugin
            if isinstance(plugin, ShardedFabricMixedPrecision):
                plugin.autocast = self._autocast
            if not self._sharder.cpu_offload:
                module.to(self.root_device)
        if loose_parameters(module) and module not in self._with_loose:
            self._with_loose.append(module)
        self.barrier()
        return module

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        module = self._trained_by(optimizer)
        known = self._known[module]
        rebind(optimizer, known.replaced(module), module, known)
        move_state(optimizer)
        return optimizer

    def _trained_by(self, optimizer: Optimizer) -> nn.Module:
        """Return the module that was set up and has a parameter of the optimizer, under an old object or a new one."""
        params = {param for group in optimizer.param_groups for param in group["params"]}
        for module, known in self._known.items():
            if params & {*known.names(), *module.parameters()}:
                return module
        raise ValueError(
            f"The optimizer {type(optimizer).__name__} has no parameter of a module that was set up: call "
            "`fabric.setup(module, optimizer)`, or `fabric.setup_module(module)` before `fabric.setup_optimizers`."
        )

    # ------------------------------------------------------------------ gradients

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, and average the gradients of parameters that are not sharded."""
        super().backward(tensor, module, *args, **kwargs)
        for holder in self._with_loose:
            if holder not in self._paused:
                average_gradients(loose_parameters(holder), self._sharder.data_mesh.get_group())

    @contextmanager
    def _pause(self, module: nn.Module) -> Generator[None, None, None]:
        self._paused.add(module)
        try:
            with reduction_paused(module):
                yield
        finally:
            self._paused.discard(module)

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        refuse_released(optimizer)
        params = self.precision.main_params(optimizer)
        return clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        refuse_released(optimizer)
        clip_grad_value_(self.precision.main_params(optimizer), clip_val)

    # ------------------------------------------------------------------ checkpoints

    @override
    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        save_state(
            state,
            self.broadcast(path),
            self._known,
            self.checkpoint_io,
            filters=filter or {},
            distributed=self._save_distributed_checkpoint,
            storage_options=storage_options,
        )

    @override
    def load_checkpoint(
        self, path: str | Path, state: Any | None = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_state(
            state,
            self.broadcast(path),
            self._known,
            self.checkpoint_io,
            strict=strict,
            weights_only=weights_only,
            verify=self._verify,
        )


class _SyncControl(_BackwardSyncControl):
    """Reduces no gradients inside ``fabric.no_backward_sync``, and lets them add up on every rank."""

    def __init__(self, pause: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
        self._pause = pause

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return self._pause(module) if enabled else nullcontext()
