"""Train a LLaMA in a loop of plain PyTorch: torchrun, FSDP2, and compressed optimizer state.

``torchrun --nproc-per-node 2 -m examples.plain_pytorch.train`` uses NCCL on GPUs, gloo on CPUs. It saves a checkpoint
every ``--save-every`` steps, and continues from the last one in ``--folder``, on any number of processes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

import lightning_memopt as lm
from examples.options import options, share
from examples.pretrain.data import TextDataModule
from examples.pretrain.order import ResumableLoader
from examples.pretrain.sizes import config_of


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    return options("Train a LLaMA with FSDP2 and compressed optimizer state.", "runs/plain_pytorch").parse_args(given)


def batches(args: argparse.Namespace, mesh: DeviceMesh) -> ResumableLoader:
    """Return this process's share of the batches, which are the same ones at every number of processes."""
    batch_size = share(args.batch_size, mesh.size())
    data = TextDataModule(args.root, vocab_size=args.vocab_size, seq_len=args.seq_len, batch_size=batch_size)
    # Tokens of a large text take longer than processes wait for each other elsewhere.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if dist.get_node_local_rank() == 0:  # one process of each machine makes the tokens
        data.prepare_data()
    dist.barrier(patient)
    data.setup()
    return ResumableLoader(data.tokens["train"], batch_size, mesh.size(), mesh.get_rank())


def main(given: list[str] | None = None) -> None:
    """Train from the last checkpoint on, or from the beginning."""
    args = arguments(given)
    if "WORLD_SIZE" not in os.environ:
        sys.exit("Start this with torchrun --nproc-per-node N -m examples.plain_pytorch.train")
    # This joins the processes that torchrun started, and gives each a GPU of its own.
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (int(os.environ["WORLD_SIZE"]),))
    data = batches(args, mesh)

    torch.manual_seed(0)  # all processes create the same weights
    model: Any = LlamaForCausalLM(config_of(args.model, args.vocab_size, args.seq_len)).train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After sharding, so that the optimizer's state is sharded with the weights.
    optimizer = lm.MemOpt(model.named_parameters(), recipe=args.recipe, lr=args.lr).bind(model)
    # Without a warm-up, the first steps of low-rank momentum are too long.
    schedule = lm.WarmupSchedule(optimizer, 20, total_steps=args.steps)

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
    main()
    dist.destroy_process_group()
