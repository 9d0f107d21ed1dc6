"""Callbacks for the end of a training run: text from the model, and a folder for transformers."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

import lightning_memopt as lm
from examples.pretrain.decoding import decode


class SampleText(Callback):
    """Print text that the model continues.

    All processes compute the same tokens, because a sharded model runs on all of them or not at all.

    Args:
        prompt: Text to begin with.
        max_new_tokens: Number of tokens to add, or less: the text ends where the model's longest sequence does.
        temperature: Divides the logits before sampling; small values prefer likely tokens.
        seed: Of the sampling.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, prompt: str = "def ", max_new_tokens: int = 60, temperature: float = 0.7, seed: int = 0) -> None:
        if not prompt:
            raise ValueError("`prompt` is empty, and a model predicts only what follows a token: give at least one.")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.prompt, self.max_new_tokens, self.temperature, self.seed = prompt, max_new_tokens, temperature, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the prompt fits the model before it trains.

        Raises:
            ValueError: If it leaves no room for a token.
        """
        prompt, longest = self._tokens(trainer), _longest(pl_module)
        if len(prompt) >= longest:
            raise ValueError(
                f"`prompt` has {len(prompt)} tokens, and the model's longest sequence {longest}: give SampleText a "
                f"shorter `prompt`, or the model a `seq_len` above {len(prompt)}."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, one token at a time."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor, step: int) -> Tensor:
            chances = (logits.float().cpu() / self.temperature).softmax(-1)
            return torch.multinomial(chances, 1, generator=generator).squeeze(-1).to(logits.device)

        prompt = torch.tensor([self._tokens(trainer)], device=pl_module.device)
        room = min(self.max_new_tokens, _longest(pl_module) - prompt.shape[-1])
        model.eval()
        sampled = decode(model, prompt, torch.ones_like(prompt), room, choose)
        model.train()
        text = data.tokenizer.decode(torch.cat([prompt, sampled], dim=-1)[0].tolist(), skip_special_tokens=False)
        pl_module.print(f"A sample of the model:\n{text}")

    def _tokens(self, trainer: Trainer) -> list[int]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return data.tokenizer(self.prompt, add_special_tokens=False)["input_ids"]


def _longest(module: LightningModule) -> int:
    model: Any = module.model
    return model.config.max_position_embeddings


class SaveTransformers(Callback):
    """Save model and tokenizer as a folder for transformers' ``from_pretrained``, at the end of the training.

    The model is the module's ``model``. Of one with peft's adapters, the adapters alone are saved. The tokenizer is the
    module's ``tokenizer``, or that of the data module if the module has none.

    Args:
        dirpath: The folder. Files of an earlier run in it are replaced, which is said when the training starts.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what will be replaced, while it is still there."""
        for name, what in (("config.json", "a model"), ("adapter_config.json", "an adapter")):
            earlier = self.dirpath / name
            if stage == "fit" and earlier.is_file():
                date = datetime.fromtimestamp(earlier.stat().st_mtime)
                rank_zero_info(
                    f"{type(self).__name__}: {self.dirpath} holds {what} of {date:%Y-%m-%d %H:%M}, which the end of "
                    "this training replaces. To keep it, move the folder before."
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights from all processes; the first one writes them."""
        model: Any = pl_module.model
        holder: Any = pl_module if hasattr(pl_module, "tokenizer") else trainer.datamodule  # type: ignore[attr-defined]
        # The frozen weights beside adapters may not fit into the memory of one process.
        has_adapters = hasattr(model, "peft_config")
        weights = lm.full_state_dict(model, ignore_frozen_params=has_adapters)
        if trainer.is_global_zero:
            model.save_pretrained(self.dirpath, state_dict=weights)
            holder.tokenizer.save_pretrained(self.dirpath)
            print(f"Saved {'adapter' if has_adapters else 'model'} and tokenizer to {self.dirpath}")
        trainer.strategy.barrier()  # afterwards, the folder is there for every process
