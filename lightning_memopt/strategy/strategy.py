"""The strategy behind ``Trainer(strategy="memopt_fsdp")``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_memopt.sharding.wrapping import blocks, divided_by_dtype, find_units, resolve_policy
from lightning_memopt.strategy.checkpoint.base import CheckpointingStrategy
from lightning_memopt.strategy.errors import FirstFailure, explain
from lightning_memopt.strategy.finetuning import let_finetuning_compare_sharded_parameters
from lightning_memopt.strategy.gradients import average_gradients, loose_parameters
from lightning_memopt.strategy.mesh import check_sizes, make_meshes, resolved_data_size
from lightning_memopt.strategy.model.precision import ShardedHalfPrecision, ShardedMixedPrecision, sharded_plugin
from lightning_memopt.strategy.model.refusals import (
    refuse_callbacks,
    refuse_embeddings,
    refuse_fsdp1,
    refuse_parameters,
)
from lightning_memopt.strategy.model.same_weights import check_same_structure
from lightning_memopt.strategy.model.shard import (
    Sharding,
    attributes_kept,
    complete_sharding,
    earlier_sharding,
    is_sharded,
    shard,
    sharded_modules,
)
from lightning_memopt.strategy.rebinding import KnownParameters, move_state, rebind

Modules = list[type[nn.Module] | str] | type[nn.Module] | str | Callable[[nn.Module], bool]


class MemOptFSDPStrategy(CheckpointingStrategy):
    """FSDP2 for LightningModules that do not shard themselves, with optimizer state sharded like the parameters.

    Args:
        data_parallel_size: Number of data-parallel ranks; ``auto`` for all ranks that tensor parallelism leaves.
        tensor_parallel_size: Number of ranks that share a layer. A value above 1 requires a ``configure_model`` that
            parallelizes the model.
        replicate_size: Number of replicas of the sharded model (hybrid sharding). Each is sharded over
            ``data_parallel_size / replicate_size`` ranks.
        wrap: Modules to gather as units: a module class, its import path, a list of these, or a function of a module.
            None selects the elements of the outermost lists of equal modules. The children of the LightningModule are
            units in addition.
        activation_checkpointing: Modules whose activations are recomputed in the backward pass, given as in ``wrap``;
            True for the modules that ``wrap`` selects.
        reshard_after_forward: As in ``fully_shard``: whether to free gathered weights between forward and backward.
        sync_every_batch: Whether to reduce gradients after every batch. If False and ``accumulate_grad_batches`` is
            more than 1, they are reduced once per step; in between, every rank holds gradients of full size.
        cpu_offload: Whether to keep parameters, gradients and optimizer state in CPU memory.
        save_distributed_checkpoint: Whether to save a checkpoint as a directory with a file per rank, or as one file.
        verify: Whether to read a checkpoint once before loading, to compare its checksums.
        process_group_backend: Backend of the process group; None for the default of the device.
        timeout: Timeout of collectives.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is not positive, if ``replicate_size`` does not divide ``data_parallel_size``, or if a
            class cannot be imported.
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
        sync_every_batch: bool = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        verify: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        check_sizes(data_parallel_size, tensor_parallel_size, replicate_size)
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self._tensor_size, self._replicate_size = tensor_parallel_size, replicate_size
        self._wrap = resolve_policy("wrap", wrap)
        self._checkpoint_blocks = activation_checkpointing is True
        given = None if isinstance(activation_checkpointing, bool) else activation_checkpointing
        self._checkpoint_policy = resolve_policy("activation_checkpointing", given)
        self._reshard_after_forward = reshard_after_forward
        self._sync_every_batch = sync_every_batch
        self._verify = verify
        self._cpu_offload = cpu_offload
        self._known = KnownParameters()
        self._syncing = True
        self._first_failure: FirstFailure | None = None
        self._data_mesh: DeviceMesh | None = None
        self._fsdp_mesh: DeviceMesh | None = None

    # ------------------------------------------------------------------ guards

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        if not isinstance(accelerator, CPUAccelerator | CUDAAccelerator):
            raise ValueError(
                f"MemOptFSDPStrategy runs on CPUs and CUDA GPUs, got {type(accelerator).__name__}: set "
                "`accelerator='cpu'` or `accelerator='cuda'`."
            )
        self._accelerator = accelerator

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = sharded_plugin(precision_plugin)

    # ------------------------------------------------------------------ processes

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        assert self._data_mesh is not None
        return {"num_replicas": self._data_mesh.size(), "rank": self._data_mesh.get_local_rank()}

    @override
    def setup_environment(self) -> None:
        self._setup_distributed()
        self._first_failure = FirstFailure()
        if self._device_mesh is None:
            size = resolved_data_size(
                self._data_parallel_size, self._tensor_size, self._replicate_size, self.world_size
            )
            self._data_parallel_size = size
            self._device_mesh, self._data_mesh, self._fsdp_mesh = make_meshes(
                self.root_device.type, size, self._tensor_size, self._replicate_size
            )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @override
    def _get_process_group_backend(self) -> str:
        if self._cpu_offload and self.root_device.type == "cuda" and self._process_group_backend is None:
            return "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        explain(exception, self.model)
        if self._first_failure is not None:
            self._first_failure.share(exception)

    # ------------------------------------------------------------------ the model

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._known.learn(model)  # before `configure_model`, which may shard the model

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
            let_finetuning_compare_sharded_parameters(trainer)
            refuse_embeddings(self.model)
        refuse_fsdp1(self.model)
        self._known.learn(self.model)
        self._reshard()
        with attributes_kept(self.model):
            self._shard(self.model)
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in self._trained_by:
                move_state(optimizer)

    def _shard(self, model: nn.Module) -> None:
        """Shard the model, unless it is sharded already."""
        assert self._fsdp_mesh is not None
        plugin = self.precision_plugin
        wanted = Sharding(
            self._fsdp_mesh, str(plugin.precision), self._cpu_offload, self.root_device, self._reshard_after_forward
        )
        earlier, users = earlier_sharding(model), is_sharded(model)
        if earlier is not None:
            earlier.check_same(wanted)
        elif users:
            self._refuse_ignored_options()
            complete_sharding(model, self.root_device)
        else:
            self._refuse_missing_parallelism(model)
            check_same_structure(model)
            if self._layer_sync is not None:
                model = self._layer_sync.apply(model)
            units = find_units(model, self._wrap)
            refuse_parameters(model, units)
            if not isinstance(plugin, ShardedHalfPrecision):  # which converts all parameters to one dtype
                units = divided_by_dtype(model, units)
            shard(model, units, wanted, plugin, self._checkpointed(model))
        if isinstance(plugin, ShardedMixedPrecision):
            plugin.autocast = earlier is None and users

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
                "sharded: parallelize the model in its `configure_model`, with `self.device_mesh['tensor_parallel']`, "
                "or leave `tensor_parallel_size` at 1."
            )

    def _refuse_ignored_options(self) -> None:
        options = {
            "wrap": self._wrap is not None,
            "activation_checkpointing": self._checkpoint_blocks or self._checkpoint_policy is not None,
            "cpu_offload": self._cpu_offload,
        }
        ignored = [f"`{name}`" for name, given in options.items() if given]
        if ignored:
            raise ValueError(
                f"{' and '.join(ignored)} would have no effect, because `configure_model` has sharded the model "
                "already: apply the same there, or do not shard in `configure_model`."
            )

    @override
    def model_to_device(self) -> None:
        """Move what is not sharded to the device; the rest is there already."""
        assert self.model is not None
        _update_properties(self.model, device=self.root_device)
        if not self._cpu_offload:
            self.model.to(self.root_device)

    def _reshard(self) -> None:
        """Free the weights that a forward pass without a backward pass has gathered."""
        assert self.model is not None
        for module in sharded_modules(self.model):
            module.reshard()

    @override
    def on_validation_end(self) -> None:
        self._reshard()

    @override
    def on_test_end(self) -> None:
        self._reshard()

    @override
    def on_predict_end(self) -> None:
        self._reshard()

    # ------------------------------------------------------------------ optimizers and gradients

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.model is not None
        replaced = self._known.replaced(self.model)
        for optimizer in self._trained_by:
            rebind(optimizer, replaced, self.model, self._known)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of parameters that are not sharded."""
        assert self.model is not None
        assert self._data_mesh is not None
        if self._syncing:
            average_gradients(loose_parameters(self.model), self._data_mesh.get_group())
        super().post_backward(closure_loss)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Do not reduce gradients in the backward passes inside, unless ``sync_every_batch`` is set."""
        if self._sync_every_batch:
            yield
            return
        assert self.model is not None
        modules = sharded_modules(self.model)
        try:
            self._syncing = False
            for module in modules:
                module.set_requires_gradient_sync(False, recurse=False)
            yield
        finally:
            self._syncing = True
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)
