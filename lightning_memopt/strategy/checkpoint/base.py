"""The strategy's methods that Lightning calls to save and load checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_memopt.strategy.averaging import averaged_module, completed, shown_to_callbacks
from lightning_memopt.strategy.checkpoint.io import atomic_io, finish, forget, remove_in_order
from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, optimizer_state, save_checkpoint
from lightning_memopt.strategy.finetuning import groups_restored


class CheckpointingStrategy(ModelParallelStrategy):
    """ModelParallelStrategy with atomic, complete checkpoints that load on any number of ranks."""

    _verify: bool

    @override
    def teardown(self) -> None:
        super().teardown()
        finish(self.checkpoint_io)  # ModelParallelStrategy does not wait

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        forget(self.checkpoint_io, exception)  # the teardown of the Trainer would not get to its end

    @property
    def _trained_by(self) -> list[Optimizer]:
        """The optimizers, without the mock that Lightning creates if ``configure_optimizers`` returns None."""
        return [optimizer for optimizer in self.optimizers if not isinstance(optimizer, _MockOptimizer)]

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

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return model_state(self.model, whole=not self._save_distributed_checkpoint)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if isinstance(optimizer, _MockOptimizer):
            return {}
        return optimizer_state(optimizer, self.model, whole=not self._save_distributed_checkpoint)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        save_checkpoint(
            completed(checkpoint, whole=not self._save_distributed_checkpoint),
            self.broadcast(filepath),  # all ranks save to the same place
            self.checkpoint_io,
            distributed=self._save_distributed_checkpoint,
            storage_options=storage_options,
        )

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove_in_order(self.checkpoint_io, filepath)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None
        assert self.lightning_module is not None
        module, trainer = self.lightning_module, self.lightning_module.trainer
        fitting, averaged = trainer.state.fn == TrainerFn.FITTING, averaged_module(trainer)
        rest = load_checkpoint(
            self.broadcast(checkpoint_path),
            self.model,
            self._trained_by if fitting else None,
            self.checkpoint_io,
            strict=self.lightning_module.strict_loading,
            weights_only=weights_only,
            verify=self._verify,
            adapting=(lambda rest: groups_restored(trainer, module, rest)) if fitting else nullcontext,
            averaged=averaged,
        )
        return rest if averaged is None else shown_to_callbacks(rest, self.model, averaged)
