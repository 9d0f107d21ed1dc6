"""Train a LLaMA with the Trainer of transformers and compressed optimizer state.

``python -m examples.hf_trainer.train`` saves a checkpoint every ``--save-every`` steps, and continues from the last one
in ``--folder``. ``torchrun --nproc-per-node 2 -m examples.hf_trainer.train`` trains on several processes, with DDP.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lightning_memopt as lm
from examples.pretrain.data import TextDataModule


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Train a LLaMA with transformers' Trainer and compressed state.")
    parser.add_argument("--root", help="a folder of text files; without one, Python's standard library")
    parser.add_argument("--recipe", default="adapm_lean", help=f"one of {', '.join(lm.recipe_names())}")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step and process")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--folder", default="runs/hf_trainer", help="where the checkpoints are")
    return parser.parse_args(given)


def settings(args: argparse.Namespace) -> TrainingArguments:
    """Return what the Trainer does, apart from the optimizer and its schedule."""
    return TrainingArguments(
        output_dir=args.folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
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


def datasets(args: argparse.Namespace, training: TrainingArguments) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return sequences for training and validation; the model shifts the labels by itself."""
    data = TextDataModule(args.root, vocab_size=args.vocab_size, seq_len=args.seq_len, batch_size=args.batch_size)
    with training.main_process_first():
        data.prepare_data()
    data.setup()
    return {split: [{"input_ids": row, "labels": row} for row in tokens] for split, tokens in data.tokens.items()}


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
    data = datasets(args, training)

    torch.manual_seed(training.seed)
    size = {"hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size, "num_hidden_layers": 3}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab_size, num_attention_heads=8, **size))
    # State is created with the optimizer, on the device of the parameters.
    model.to(training.device)
    optimizer, schedule = optimizer_and_schedule(model, args)
    trainer = Trainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["val"][:160],
        optimizers=(optimizer, schedule),
    )
    Path(args.folder).mkdir(parents=True, exist_ok=True)  # the Trainer makes it on its main process alone
    last = get_last_checkpoint(args.folder)
    if trainer.is_world_process_zero():
        print(f"continuing from {last}" if last else optimizer.plan_table(), flush=True)
    trainer.train(resume_from_checkpoint=last)
    trainer.evaluate()
    trainer.save_model()


if __name__ == "__main__":
    main()
