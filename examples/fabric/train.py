"""Train a LLaMA with a loop of one's own: Fabric, FSDP2 and compressed optimizer state.

``python -m examples.fabric.train`` uses all GPUs, or two CPU processes; Fabric runs this command again for each further
process. It saves a checkpoint every ``--save-every`` steps, and continues from the last one in ``--folder``, on any
number of processes.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers import LlamaForCausalLM

import lightning_memopt as lm
from examples.options import options, share
from examples.pretrain.data import TextDataModule
from examples.pretrain.order import ResumableLoader, data_ranks
from examples.pretrain.sizes import config_of


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = options("Train a LLaMA with Fabric and compressed optimizer state.", "runs/fabric")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() or 2, help="processes")
    parser.add_argument("--accumulate", type=int, default=2, help="batches per step and process")
    return parser.parse_args(given)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Return the mean loss per token."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def validated(fabric: Fabric, model: Any, loader: Any, most: int = 20) -> float:
    """Return the mean loss over some validation batches of all processes."""
    model.eval()
    losses = [loss_of(model, batch) for batch in itertools.islice(loader, most)]
    model.train()
    return float(fabric.all_reduce(torch.stack(losses).mean()))


def main(given: list[str] | None = None) -> None:
    """Train from the last checkpoint on, or from the beginning; validate."""
    args = arguments(given)
    fabric = Fabric(strategy="memopt_fsdp", devices=args.devices)
    fabric.launch()

    ranks = data_ranks(fabric.strategy)
    batch_size = share(args.batch_size, ranks["num_replicas"] * args.accumulate)
    data = TextDataModule(args.root, vocab_size=args.vocab_size, seq_len=args.seq_len, batch_size=batch_size)
    with fabric.rank_zero_first(local=True):  # one process of each machine makes the tokens
        data.prepare_data()
    data.setup()
    # The checkpoint holds its place in the data. Every process has its share already.
    order = ResumableLoader(data.tokens["train"], batch_size, **ranks)
    train, val = fabric.setup_dataloaders(order, data.val_dataloader())

    fabric.seed_everything(0, verbose=False)  # all processes create the same weights
    model = LlamaForCausalLM(config_of(args.model, args.vocab_size, args.seq_len)).train()
    optimizer = lm.MemOpt(model.named_parameters(), recipe=args.recipe, lr=args.lr)
    model, optimizer = fabric.setup(model, optimizer)
    # Without a warm-up, the first steps of low-rank momentum are too long.
    schedule = lm.WarmupSchedule(optimizer, 20, total_steps=args.steps)

    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": order, "step": 0}
    saved = sorted(args.folder.glob("step-*.ckpt"))
    if saved:
        fabric.load(saved[-1], state)
    fabric.print(f"continuing after step {state['step']}" if saved else optimizer.plan_table())

    batches = itertools.chain.from_iterable(itertools.repeat(train))
    for step in range(state["step"] + 1, args.steps + 1):
        mean = torch.zeros((), device=fabric.device)
        for number in range(1, args.accumulate + 1):
            with fabric.no_backward_sync(model, enabled=number < args.accumulate):
                loss = loss_of(model, next(batches)) / args.accumulate
                fabric.backward(loss)
            mean += loss.detach()
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            fabric.print(f"step {step:>5}  loss {fabric.all_reduce(mean).item():.4f}")
        if step % args.save_every == 0 or step == args.steps:
            fabric.save(args.folder / f"step-{step:08}.ckpt", {**state, "step": step})
    fabric.print(f"validation loss {validated(fabric, model, val):.4f}")


if __name__ == "__main__":
    main()
