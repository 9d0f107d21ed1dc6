"""Train a LLaMA with the Trainer of transformers and compressed optimizer state.

``python -m examples.hf_trainer.train`` saves a checkpoint every ``--save-every`` steps, and continues from the last one
in ``--folder``. ``torchrun --nproc-per-node 2 -m examples.hf_trainer.train`` trains on several processes, with DDP.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lightning_memopt as lm
from examples.options import options, share
from examples.pretrain.data import TextDataModule
from examples.pretrain.sizes import config_of


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    return options("Train a LLaMA with the Trainer and compressed state.", "runs/hf_trainer").parse_args(given)


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences as the Trainer takes them, read where they are needed; the model shifts the labels by itself."""

    def __init__(self, tokens: Dataset[Tensor]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence ``[seq_len]``, as input and as labels."""
        row = self.tokens[index]
        return {"input_ids": row, "labels": row}


def settings(args: argparse.Namespace) -> TrainingArguments:
    """Return what the Trainer does, apart from the optimizer and its schedule."""
    training = TrainingArguments(
        output_dir=str(args.folder),
        max_steps=args.steps,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=args.save_every,
        # Without `use_cpu`, processes on CPUs would train by themselves, without averaging gradients.
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    # The Trainer counts sequences per GPU. One process uses all GPUs unless torchrun starts more.
    training.per_device_train_batch_size = share(args.batch_size, training.world_size * max(1, training.n_gpu))
    return training


def optimizer_and_schedule(model: Any, args: argparse.Namespace) -> tuple[lm.MemOpt, lm.WarmupSchedule]:
    """Return what the Trainer takes as ``optimizers``.

    The Trainer's own way to create an optimizer passes bare parameters in two groups, without names, and so without
    roles. Here, names come with the parameters, sizes of heads and layouts of fused weights from the model. Rates by
    role take the place of the two groups.
    """
    optimizer = lm.MemOpt(
        model.named_parameters(),
        recipe=args.recipe,
        lr=args.lr,
        weight_decay=0.1,
        overrides={"vector": {"weight_decay": 0}},
    ).bind(model)
    return optimizer, lm.WarmupSchedule(optimizer, 20, total_steps=args.steps)


def main(given: list[str] | None = None) -> None:
    """Train from the last checkpoint on, or from the beginning; validate, and save the model."""
    args = arguments(given)
    training = settings(args)
    data = TextDataModule(args.root, vocab_size=args.vocab_size, seq_len=args.seq_len, batch_size=args.batch_size)
    with training.main_process_first():
        data.prepare_data()
    data.setup()
    train, val = (Sequences(data.tokens[split]) for split in ("train", "val"))

    torch.manual_seed(training.seed)
    model: Any = LlamaForCausalLM(config_of(args.model, args.vocab_size, args.seq_len))
    # State is created with the optimizer, on the device of the parameters.
    model.to(training.device)
    optimizer, schedule = optimizer_and_schedule(model, args)
    few = Subset(val, range(min(160, len(val))))
    trainer = Trainer(model, training, train_dataset=train, eval_dataset=few, optimizers=(optimizer, schedule))
    args.folder.mkdir(parents=True, exist_ok=True)  # the Trainer makes it on its main process alone
    last = get_last_checkpoint(args.folder)
    if trainer.is_world_process_zero():
        print(f"continuing from {last}" if last else optimizer.plan_table(), flush=True)
    trainer.train(resume_from_checkpoint=last)
    trainer.evaluate()
    trainer.save_model()


if __name__ == "__main__":
    main()
