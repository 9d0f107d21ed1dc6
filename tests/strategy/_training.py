"""What tests run on the ranks to train with Lightning: Trainers inside a process group that exists, and small modules.

A function that `run_ranks` calls on every rank can make as many Trainers as it likes, one after the other::

    def cases(rank, world_size):
        module = LanguageModule()
        fit(module, "memopt_fsdp", max_steps=3)
        return whole_weights(module)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader

VOCAB, LENGTH, WIDTH = 12, 6, 8


class Spawned(ClusterEnvironment):
    """The ranks of the process group that `run_ranks` made: Lightning starts no processes and joins this group."""

    creates_processes_externally = True
    main_address = "localhost"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    local_rank = global_rank

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        assert size == dist.get_world_size()

    def set_global_rank(self, rank: int) -> None:
        assert rank == dist.get_rank()


def trainer(strategy: Any = "memopt_fsdp", **options: Any) -> Trainer:
    """Return a quiet Trainer over all ranks of the process group."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "barebones": False}
    quiet |= {"limit_val_batches": 2, "limit_test_batches": 2, "limit_predict_batches": 2}
    plugins = [Spawned(), *options.pop("plugins", [])]
    devices = {"accelerator": "cpu", "devices": dist.get_world_size()}
    return Trainer(**{**quiet, **devices, "strategy": strategy, "plugins": plugins, **options})


def fit(module: LightningModule, strategy: Any = "memopt_fsdp", max_steps: int = 3, **options: Any) -> Trainer:
    """Train a module that brings its own data, and return the Trainer."""
    made = trainer(strategy, max_steps=max_steps, **options)
    made.fit(module)
    return made


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on every rank; all ranks must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def whole_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return all of each tensor on every rank; all ranks must call this. One exchange serves all of a plain mesh."""
    tensors = list(tensors)
    sharded: dict[DeviceMesh, dict[int, DTensor]] = {}
    for number, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 1 and type(tensor.placements[0]) is Shard:
            sharded.setdefault(tensor.device_mesh, {})[number] = tensor
    found = {}
    for mesh, entries in sharded.items():
        parts = [tensor.to_local().detach().cpu() for tensor in entries.values()]
        content = torch.cat([part.flatten().view(torch.uint8) for part in parts]).numpy()
        everyone: list[Any] = [None] * mesh.size()
        dist.all_gather_object(everyone, (content, [part.shape for part in parts]), group=mesh.get_group())
        pieces = []
        for values, shapes in everyone:
            sizes = [shape.numel() * part.element_size() for shape, part in zip(shapes, parts, strict=True)]
            split = torch.from_numpy(values).split(sizes)
            same = zip(split, parts, shapes, strict=True)
            pieces.append([piece.clone().view(part.dtype).view(shape) for piece, part, shape in same])
        for (number, tensor), *mine in zip(entries.items(), *pieces, strict=True):
            found[number] = torch.cat(mine, tensor.placements[0].dim)
            assert found[number].shape == tensor.shape
    return [found[number] if number in found else whole(tensor) for number, tensor in enumerate(tensors)]


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights by name; all ranks must call this."""
    named = dict(module.named_parameters())
    return dict(zip(named, whole_tensors(named.values()), strict=True))


@contextmanager
def raises(kind: type[BaseException], *texts: str) -> Iterator[None]:
    """Check for an exception and that its message has all the texts."""
    with pytest.raises(kind) as caught:
        yield
    missing = [text for text in texts if text not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"


def tokens(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def global_batches(size: int) -> list[Tensor]:
    """Return what all data-parallel ranks see together, in the first epoch: Lightning's sampler shuffles."""
    order = torch.randperm(len(tokens()), generator=torch.Generator().manual_seed(0))
    return list(tokens()[order].split(size))


class Block(nn.Module):
    """A layer with the names of a LLaMA's."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(width, 2 * width)
        self.mlp.down_proj = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn.q_proj(self.input_layernorm(hidden)).cumsum(1)
        return hidden + self.dropout(self.mlp.down_proj(self.mlp.up_proj(hidden).relu()))


class Network(nn.Module):
    """Embedding, blocks, norm, head; logits ``[batch, length, vocabulary]``."""

    def __init__(self, layers: int = 2, *, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.embed_tokens(batch)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


class LanguageModule(LightningModule):
    """Learns the next token of random sequences, with data of its own.

    Args:
        network: What to train; the same weights every time by default.
        optimizer: Makes the optimizer of the module, or whatever `configure_optimizers` may return.
        batch_size: Per rank.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        optimizer: Callable[[LightningModule], Any] | None = None,
        batch_size: int = 4,
    ) -> None:
        super().__init__()
        if network is None:
            torch.manual_seed(0)
            network = Network()
        self.model = network
        self.make_optimizer = optimizer or adamw
        self.batch_size = batch_size
        self.losses: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).argmax(-1)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)

    def train_dataloader(self) -> Any:
        return DataLoader(tokens(), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def adamw(module: LightningModule) -> torch.optim.Optimizer:
    """Return torch's AdamW, with one operation for all parameters if one mesh holds them.

    DTensor works out anew how to shard every operation on other parameters; otherwise AdamW consists of a dozen.
    """
    params = list(module.parameters())
    meshes = {param.device_mesh if isinstance(param, DTensor) else None for param in params}
    return torch.optim.AdamW(params, lr=0.01, fused=len(meshes) == 1)
