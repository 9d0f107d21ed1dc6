"""Train a LLaMA with a loop of one's own: Fabric, FSDP2 and compressed optimizer state.

Run ``python -m examples.fabric.train``. It uses all GPUs, or two CPU processes; Fabric runs this command again for
each further process. If the checkpoint exists, the run continues from it, on any number of processes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_memopt as lm
from examples.pretrain.data import TextDataModule
from examples.pretrain.order import ResumableLoader, data_ranks


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Train a LLaMA with Fabric and compressed optimizer state.")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--root", help="a folder of text files; without one, Python's standard library")
    parser.add_argument("--steps", type=int, default=200, help="steps of the whole run")
    parser.add_argument("--accumulate", type=int, default=2, help="batches per step")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per batch and process")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", default="runs/fabric.ckpt")
    return parser.parse_args(given)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Return the mean loss per token."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def endless(loader: Any) -> Iterator[Tensor]:
    """Yield batches, epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


@torch.no_grad()
def validated(fabric: Fabric, model: Any, loader: Any, most: int = 20) -> float:
    """Return the mean loss over some validation batches of all processes."""
    model.eval()
    losses = [loss_of(model, batch) for batch in itertools.islice(loader, most)]
    model.train()
    return float(fabric.all_reduce(torch.stack(losses).mean()))


def main(given: list[str] | None = None) -> None:
    """Train, validate and save."""
    args = arguments(given)
    fabric = Fabric(strategy="memopt_fsdp", devices=args.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    data = TextDataModule(args.root, vocab_size=args.vocab_size, seq_len=args.seq_len, batch_size=args.batch_size)
    with fabric.rank_zero_first():
        data.prepare_data()
    data.setup()
    # The checkpoint holds its place in the data. Every process has its share already.
    order = ResumableLoader(data.tokens["train"], args.batch_size, **data_ranks(fabric.strategy))
    train, val = fabric.setup_dataloaders(order, data.val_dataloader())

    size = {"hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab_size, num_attention_heads=8, **size))
    model.train()
    optimizer = lm.AdaPMLean(model.parameters(), lr=args.lr)
    model, optimizer = fabric.setup(model, optimizer)
    # Without a warm-up, the first steps of low-rank momentum are too long.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.03, total_iters=30)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": order, "step": 0}
    if Path(args.checkpoint).exists():
        fabric.load(args.checkpoint, state)
        fabric.print(f"continuing after step {state['step']}")
    if fabric.is_global_zero and state["step"] == 0:
        print(optimizer.plan_table())

    batches = endless(train)
    for step in range(state["step"], args.steps):
        for number in range(args.accumulate):
            last = number == args.accumulate - 1
            with fabric.no_backward_sync(model, enabled=not last):
                loss = loss_of(model, next(batches))
                fabric.backward(loss / args.accumulate)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 20 == 0:
            fabric.print(f"step {step + 1:>5}  loss {loss.item():.3f}")
    state["step"] = max(state["step"], args.steps)
    fabric.print(f"validation loss {validated(fabric, model, val):.3f}")
    fabric.save(args.checkpoint, state)
    fabric.print(f"saved to {args.checkpoint}")


if __name__ == "__main__":
    main()
