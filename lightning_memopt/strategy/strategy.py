"""The strategy behind ``Trainer(strategy="memopt_fsdp")``."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_memopt.strategy.averaging import let_averaging_wait, make_averages, tensor_dtypes
from lightning_memopt.strategy.checkpoint.base import CheckpointingStrategy
from lightning_memopt.strategy.errors import FirstFailure, explain
from lightning_memopt.strategy.finetuning import let_finetuning_compare_sharded_parameters
from lightning_memopt.strategy.gradients import average_gradients, loose_parameters
from lightning_memopt.strategy.model.precision import ShardedMixedPrecision, sharded_plugin
from lightning_memopt.strategy.model.refusals import refuse_accelerator, refuse_callbacks, refuse_embeddings
from lightning_memopt.strategy.model.shard import attributes_kept, reduction_paused, sharded_modules
from lightning_memopt.strategy.rebinding import KnownParameters, move_state, rebind
from lightning_memopt.strategy.releasing import end_release, refuse_settings, release_gradients
from lightning_memopt.strategy.sharder import Modules, Sharder


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
        gradient_release: Whether to update a unit in the backward pass, as soon as its gradients are reduced, and free
            them (``MemOpt.release_gradients``). Clipping and accumulation do not work with it, and are refused.
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
        gradient_release: bool = False,
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
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self._sync_every_batch = sync_every_batch
        self._verify = verify
        if not isinstance(gradient_release, bool):
            raise TypeError(f"`gradient_release` must be True or False, got {gradient_release!r}.")
        self._gradient_release = gradient_release
        self._known = KnownParameters()
        self._syncing = True
        self._first_failure: FirstFailure | None = None

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
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = sharded_plugin(precision_plugin)

    # ------------------------------------------------------------------ processes

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return self._sharder.sampler_kwargs()

    @override
    def setup_environment(self) -> None:
        self._setup_distributed()
        self._first_failure = FirstFailure()
        self._device_mesh = self._sharder.make_meshes(self.root_device.type, self.world_size)
        self._data_parallel_size = self._sharder.data_mesh.size()
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
        let_averaging_wait(self.lightning_module.trainer)

    @override
    def _get_process_group_backend(self) -> str:
        return (
            self._process_group_backend
            or self._sharder.backend(self.root_device)
            or super()._get_process_group_backend()
        )

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        explain(exception, self.model)
        if self._first_failure is not None:
            self._first_failure.share(exception)

    @override
    def teardown(self) -> None:
        end_release(self._trained_by)  # the model's next backward pass may be another optimizer's
        super().teardown()

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
            if self._gradient_release:
                refuse_settings(trainer, cpu_offload=self._sharder.cpu_offload, replicas=self._sharder.replicate_size)
        self._known.learn(self.model)
        self._reshard()
        plugin, dtypes = self.precision_plugin, tensor_dtypes(self.model)
        with attributes_kept(self.model):
            users = self._sharder.shard(
                self.model, str(plugin.precision), self.root_device, called=False, layer_sync=self._layer_sync
            )
            if isinstance(plugin, ShardedMixedPrecision):
                plugin.autocast = users
            self.model = plugin.convert_module(self.model)
            self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            make_averages(trainer, self.model, dtypes)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in self._trained_by:
                move_state(optimizer)
            if self._gradient_release:
                assert self.lightning_module is not None
                release_gradients(self.lightning_module, self._trained_by)

    @override
    def model_to_device(self) -> None:
        """Move what is not sharded to the device; the rest is there already."""
        assert self.model is not None
        _update_properties(self.model, device=self.root_device)
        if not self._sharder.cpu_offload:
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
        if self._syncing:
            average_gradients(loose_parameters(self.model), self._sharder.data_mesh.get_group())
        super().post_backward(closure_loss)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Do not reduce gradients in the backward passes inside, unless ``sync_every_batch`` is set."""
        if self._sync_every_batch:
            yield
            return
        assert self.model is not None
        try:
            self._syncing = False
            with reduction_paused(self.model):
                yield
        finally:
            self._syncing = True
