"""Callbacks for the end of a training run: text from the model, and a folder for transformers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerFast

import lightning_memopt as lm
from examples.pretrain.tokens import END_OF_TEXT


class SampleText(Callback):
    """Print text that the model continues.

    All processes compute the same tokens, because a sharded model runs on all of them or not at all.

    Args:
        prompt: Text to begin with.
        max_new_tokens: Number of tokens to add.
        temperature: Divides the logits before sampling; small values prefer likely tokens.
        seed: Of the sampling.
    """

    def __init__(self, prompt: str = "def ", max_new_tokens: int = 60, temperature: float = 0.7, seed: int = 0) -> None:
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.prompt, self.max_new_tokens, self.temperature, self.seed = prompt, max_new_tokens, temperature, seed

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, one token at a time."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        model.eval()
        generator = torch.Generator().manual_seed(self.seed)
        ids = data.tokenizer.encode(self.prompt).ids
        longest = model.config.max_position_embeddings
        for _ in range(self.max_new_tokens):
            window = torch.tensor([ids[-longest:]], device=pl_module.device)
            logits = model(input_ids=window, use_cache=False).logits[0, -1].float().cpu()
            chances = (logits / self.temperature).softmax(-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
        model.train()
        pl_module.print(f"A sample of the model:\n{data.tokenizer.decode(ids, skip_special_tokens=False)}")


class SaveTransformers(Callback):
    """Save model and tokenizer as a folder for transformers' ``from_pretrained``, at the end of the training.

    Args:
        dirpath: The folder. Files of an earlier run in it are replaced.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = dirpath

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights from all processes; the first one writes them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source: Any = pl_module.model
        weights = lm.full_state_dict(source)
        if trainer.is_global_zero:
            source.save_pretrained(self.dirpath, state_dict=weights)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=data.tokenizer, eos_token=END_OF_TEXT)
            tokenizer.save_pretrained(self.dirpath)
            print(f"Saved model and tokenizer to {self.dirpath}")
        trainer.strategy.barrier()
