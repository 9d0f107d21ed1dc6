"""The same fine-tuning with low-rank adapters: only they train."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model

import lightning_memopt as lm
from examples.sft.model import Dtype, SFTModule


class LoRAModule(SFTModule):
    """Train low-rank adapters beside the frozen weights of a model, and save the adapters alone.

    What is saved is an adapter for peft and transformers, which load the model from ``path`` and add it.

    Args:
        path: Folder with a model and its tokenizer.
        save_dir: Folder for the adapter and the tokenizer. What an earlier run saved there is replaced.
        dtype: Dtype of the frozen weights. Adapters are float32.
        r: Rank of the adapters.
        lora_alpha: The adapters' output is multiplied by ``lora_alpha / r``.
        target_modules: Modules that get an adapter, as in ``peft.LoraConfig``.
    """

    def __init__(
        self,
        path: str = "runs/pretrain/model",
        save_dir: str = "runs/lora/model",
        dtype: Dtype = "float32",
        r: int = 16,
        lora_alpha: int = 32,
        target_modules: str | list[str] = "all-linear",
    ) -> None:
        super().__init__(path, save_dir, dtype)
        self.save_hyperparameters()
        self.model = get_peft_model(
            self.model,
            LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM"),
        )

    def full_weights(self) -> dict[str, Any]:
        """Return the adapters alone: the frozen weights may not fit into the memory of one process."""
        return lm.full_state_dict(self.model, ignore_frozen_params=True)
