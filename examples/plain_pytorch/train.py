"""Train a LLaMA in a loop of plain PyTorch: torchrun, FSDP2, and compressed optimizer state.

``torchrun --nproc-per-node 2 -m examples.plain_pytorch.train`` uses NCCL on GPUs, gloo on CPUs. It saves a checkpoint
every ``--save-every`` steps, and continues from the last one in ``--folder``, on any number of processes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

import lightning_memopt as lm
from examples.pretrain.data import TextDataModule
from examples.pretrain.order import ResumableLoader
from examples.pretrain.sizes import LLAMA, config_of


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Train a LLaMA with FSDP2 and compressed optimizer state.")
    parser.add_argument("--root", help="a folder of text files; without one, Python's standard library")
    parser.add_argument("--model", choices=LLAMA, default="llama-3m")
    parser.add_argument("--recipe", choices=lm.recipe_names(), default="adapm_lean")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step, over all processes")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("runs/plain_pytorch"), help="where the checkpoints are")
    return parser.parse_args(given)


def batches(args: argparse.Namespace, mesh: DeviceMesh) -> ResumableLoader:
    """Return this process's share of the batches, which are the same ones at every number of processes.

    Raises:
        ValueError: If processes cannot have equal shares.
    """
    if args.batch_size % mesh.size():
        raise ValueError(f"`--batch-size` {args.batch_size} must be a multiple of the {mesh.size()} processes.")
    data = TextDataModule(args.root, seq_len=args.seq_len, batch_size=args.batch_size)
    if dist.get_node_local_rank() == 0:  # one process of each machine makes the tokens
        data.prepare_data()
    dist.barrier()
    data.setup()
    return ResumableLoader(data.tokens["train"], args.batch_size // mesh.size(), mesh.size(), mesh.get_local_rank())


def train(args: argparse.Namespace, mesh: DeviceMesh) -> None:
    """Train from the last checkpoint on, or from the beginning."""
    data = batches(args, mesh)
    torch.manual_seed(0)  # all processes create the same weights
    model: Any = LlamaForCausalLM(config_of(args.model, 2048, args.seq_len, {})).train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After sharding, so that the optimizer's state is sharded with the weights.
    optimizer = lm.MemOpt(model.named_parameters(), recipe=args.recipe, lr=args.lr).bind(model)
    # Without a warm-up, the first steps of low-rank momentum are too long.
    schedule = lm.WarmupSchedule(optimizer, 20, "constant")

    weights, states = get_state_dict(model, optimizer)
    run: dict[str, Any] = {"model": weights, "optimizer": states, "schedule": schedule, "data": data, "step": 0}
    # A save writes `.metadata` last, so a folder without it was interrupted.
    saved = sorted(args.folder.glob("step-*/.metadata"))
    if saved:
        dcp.load(run, checkpoint_id=saved[-1].parent)  # `schedule` and `data` load their parts themselves
        set_state_dict(model, optimizer, model_state_dict=run["model"], optim_state_dict=run["optimizer"])
    if mesh.get_rank() == 0:
        print(f"continuing after step {run['step']}" if saved else optimizer.plan_table(), flush=True)

    epochs = itertools.chain.from_iterable(itertools.repeat(data))
    for step, batch in zip(range(run["step"] + 1, args.steps + 1), epochs, strict=False):
        tokens = batch.to(mesh.device_type)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            mean = loss.detach() / mesh.size()
            dist.all_reduce(mean)
            if mesh.get_rank() == 0:
                print(f"step {step:>5}  loss {mean.item():.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            run["model"], run["optimizer"] = get_state_dict(model, optimizer)
            dcp.save({**run, "step": step}, checkpoint_id=args.folder / f"step-{step:08}")


if __name__ == "__main__":
    args = arguments()
    if "WORLD_SIZE" not in os.environ:
        sys.exit("Start this with torchrun --nproc-per-node N -m examples.plain_pytorch.train")
    # This joins the processes that torchrun started, and gives each a GPU of its own.
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (int(os.environ["WORLD_SIZE"]),))
    train(args, mesh)
    dist.destroy_process_group()
