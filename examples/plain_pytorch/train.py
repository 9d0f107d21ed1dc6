"""Train a LLaMA in a loop of plain PyTorch: torchrun, FSDP2, and compressed optimizer state.

``torchrun --nproc-per-node 2 -m examples.plain_pytorch.train`` uses NCCL on GPUs, gloo on CPUs. It saves a checkpoint
every ``--save-every`` steps, and continues from the last one in ``--folder``, on any number of processes.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_memopt as lm
from examples.pretrain.data import TextDataModule
from examples.pretrain.order import ResumableLoader


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Train a LLaMA with FSDP2 and compressed optimizer state.")
    parser.add_argument("--root", help="a folder of text files; without one, Python's standard library")
    parser.add_argument("--recipe", default="adapm_lean", help=f"one of {', '.join(lm.recipe_names())}")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step, over all processes")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("runs/plain_pytorch"), help="where the checkpoints are")
    return parser.parse_args(given)


def start_processes() -> torch.device:
    """Join the processes that torchrun started and return this one's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def batches(args: argparse.Namespace) -> ResumableLoader:
    """Return this process's share of the batches; the first process of each machine makes the vocabulary.

    At every number of processes, the same sequences make up a batch. So a run may continue on another number, and its
    losses stay the same up to the order of sums.

    Raises:
        ValueError: If processes cannot have equal shares.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world_size:
        raise ValueError(
            f"A batch of {args.batch_size} sequences cannot be divided evenly among {world_size} processes: make "
            "`--batch-size` a multiple of their number."
        )
    data = TextDataModule(args.root, vocab_size=args.vocab_size, seq_len=args.seq_len, batch_size=args.batch_size)
    if dist.get_node_local_rank() == 0:
        data.prepare_data()
    dist.barrier()
    data.setup()
    return ResumableLoader(data.tokens["train"], args.batch_size // world_size, world_size, rank)


class Training:
    """What a checkpoint holds: torch's distributed checkpoints call ``state_dict`` and ``load_state_dict``."""

    def __init__(self, model: Any, optimizer: lm.MemOpt, schedule: lm.WarmupSchedule, data: ResumableLoader) -> None:
        self.model, self.optimizer, self.schedule, self.data, self.step = model, optimizer, schedule, data, 0

    def state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer state, sharded and under the parameters' names, and the place in the run."""
        weights, states = get_state_dict(self.model, self.optimizer)
        place = {"schedule": self.schedule.state_dict(), "data": self.data.state_dict(), "step": self.step}
        return {"model": weights, "optimizer": states, **place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state that was saved."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.data.load_state_dict(state["data"])
        self.step = state["step"]


def sharded_model(args: argparse.Namespace, device: torch.device) -> Any:
    """Return a LLaMA, sharded over all processes: its layers are gathered one at a time, then the rest."""
    torch.manual_seed(0)  # all processes create the same weights
    size = {"hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size, "num_hidden_layers": 3}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab_size, num_attention_heads=8, **size)).train()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train from the last checkpoint on, or from the beginning."""
    data = batches(args)
    model = sharded_model(args, device)
    # The model has been sharded, and the optimizer's state is sharded with it.
    optimizer = lm.MemOpt(model.named_parameters(), recipe=args.recipe, lr=args.lr).bind(model)
    # Without a warm-up, the first steps of low-rank momentum are too long.
    schedule = lm.WarmupSchedule(optimizer, 20, "constant")

    training = Training(model, optimizer, schedule, data)
    # A save writes `.metadata` last, so a folder without it was interrupted.
    saved = sorted(args.folder.glob("step-*/.metadata"))
    if saved:
        dcp.load({"training": training}, checkpoint_id=saved[-1].parent)
    if dist.get_rank() == 0:
        print(f"continuing after step {training.step}" if saved else optimizer.plan_table(), flush=True)

    epochs = itertools.chain.from_iterable(itertools.repeat(data))
    for batch in itertools.islice(epochs, args.steps - training.step):
        batch = batch.to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        training.step += 1
        if training.step % 10 == 0:
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {training.step:>5}  loss {mean.item():.4f}", flush=True)
        if training.step % args.save_every == 0 or training.step == args.steps:
            dcp.save({"training": training}, checkpoint_id=args.folder / f"step-{training.step:08}")


def main(given: list[str] | None = None) -> None:
    """Start, train, and end."""
    args = arguments(given)
    device = start_processes()
    train(args, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
