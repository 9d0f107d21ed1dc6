"""The same fine-tuning with low-rank adapters: only they train."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model

from examples.sft.model import Dtype, SFTModule


class LoRAModule(SFTModule):
    """Train low-rank adapters beside the frozen weights of a model.

    `SaveTransformers` saves an adapter for peft and transformers, which load the model from ``path`` and add it.

    Args:
        path: Folder with a model and its tokenizer.
        dtype: Dtype of the frozen weights. Adapters are float32.
        r: Rank of the adapters.
        lora_alpha: The adapters' output is multiplied by ``lora_alpha / r``.
        target_modules: Modules that get an adapter, as in ``peft.LoraConfig``.
    """

    def __init__(
        self,
        path: str = "runs/pretrain/model",
        dtype: Dtype = "float32",
        r: int = 16,
        lora_alpha: int = 32,
        target_modules: str | list[str] = "all-linear",
    ) -> None:
        super().__init__(path, dtype)
        self.save_hyperparameters()
        self.model = get_peft_model(
            self.model,
            LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM"),
        )
