"""A LightningModule that continues the training of a causal language model from a folder, on answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.sft.chat import CHAT_TEMPLATE
from examples.sft.packing import IGNORED

Batch = dict[str, Tensor]
Dtype = Literal["float32", "bfloat16"]


class SFTModule(LightningModule):
    """Train all weights of a model that ``save_pretrained`` wrote.

    A tokenizer without a chat template gets :data:`~examples.sft.chat.CHAT_TEMPLATE`.

    Args:
        path: Folder with a model and its tokenizer, as the pretraining example leaves it.
        dtype: Dtype in which weights are loaded. Training in another one is the trainer's ``precision``.

    Raises:
        FileNotFoundError: If ``path`` is not such a folder.
    """

    def __init__(self, path: str = "runs/pretrain/model", dtype: Dtype = "float32") -> None:
        super().__init__()
        self.save_hyperparameters()
        folder = check_folder(path)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.chat_template = self.tokenizer.chat_template or CHAT_TEMPLATE
        # Not flash attention, which finds the borders of packed examples only in batches of one row.
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        )
        # What ends an answer in the template ends a generation, too.
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        # Models from transformers start in evaluation mode, and Lightning keeps that mode.
        self.model.train()
        self.val_loss = MeanMetric()

    def answer_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of all tokens of answers, in nats, and their number.

        Args:
            batch: ``input_ids``, ``position_ids`` and ``labels``, each ``[rows, seq_len]``; -100 marks other tokens.
        """
        logits = self.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.float()
        labels = batch["labels"][:, 1:]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, (labels != IGNORED).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log its mean over the ranks."""
        loss, tokens = self.answer_loss(batch)
        # Ranks have different numbers of answer tokens. Divided by their mean, the average over ranks is the loss per
        # token of the whole batch.
        loss = loss / self.trainer.strategy.reduce(tokens.float(), reduce_op="mean")
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean over all tokens of answers of all ranks."""
        loss, tokens = self.answer_loss(batch)
        self.val_loss.update(loss / tokens.clamp(min=1), weight=tokens)
        self.log("val_loss", self.val_loss, prog_bar=True)


def check_folder(path: str) -> Path:
    """Return the folder of a pretrained model.

    Raises:
        FileNotFoundError: If it lacks the model or its tokenizer; the message says how to make one.
    """
    folder = Path(path).expanduser()
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        state = f"has no {' and no '.join(missing)}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"`path` must be a folder with a model and its tokenizer, but {str(folder)!r} {state}: run the pretraining "
            "with which the example's README begins, or give a folder that transformers' save_pretrained wrote."
        )
    return folder
