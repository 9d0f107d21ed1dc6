"""Training with ``strategy="memopt_fsdp"`` on several ranks, against DDP and AdamW.

All cases of a number of ranks run in one process group; every case is a test of its own.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.strategy.gradients import average_gradients
from tests._ranks import run_ranks
from tests.strategy._training import (
    VOCAB,
    WIDTH,
    Block,
    LanguageModule,
    Network,
    Spawned,
    adamw,
    fit,
    global_batches,
    raises,
    trainer,
    whole,
    whole_weights,
)

Case = Callable[[], None]
FINDS_UNUSED = "ddp_find_unused_parameters_true"
CASES: dict[int, dict[str, Case]] = {2: {}, 4: {}}


def case(*sizes: int) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        for size in sizes:
            CASES[size][function.__name__] = function
        return function

    return register


def run_cases(rank: int, world_size: int) -> dict[str, str | None]:
    outcomes: dict[str, str | None] = {}
    for name, function in CASES[world_size].items():
        outcomes[name] = None
        try:
            function()
        except Exception as error:
            frames = [entry for entry in traceback.extract_tb(error.__traceback__) if "site-pack" not in entry.filename]
            outcomes[name] = f"{''.join(traceback.format_list(frames))}{type(error).__name__}: {error}"
            # The others may wait in a collective until the time is up; what happened would be lost.
            print(f"rank {rank}, {name}:\n{outcomes[name]}", file=sys.stderr, flush=True)
        dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> Callable[[int], list[dict[str, str | None]]]:
    done: dict[int, list[dict[str, str | None]]] = {}

    def of(size: int) -> list[dict[str, str | None]]:
        if size not in done:
            done[size] = run_ranks(run_cases, size, timeout=290)
        return done[size]

    return of


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """Make one folder for all ranks."""
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder, 0)
        yield Path(folder[0])
        dist.barrier()


def close(actual: LightningModule, expected: LightningModule, places: float = 1e-5) -> None:
    """Compare weights; they must have moved, or else there is nothing to compare."""
    ours, theirs = whole_weights(actual), whole_weights(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=places, msg=partial("{}: {}".format, name))


def same_everywhere(module: LightningModule) -> None:
    for name, value in whole_weights(module).items():
        copies = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, value)
        assert all(torch.equal(copy, copies[0]) for copy in copies), name
        assert not value.isnan().any(), name


def against_ddp(
    make: Callable[[], LightningModule] = LanguageModule, ours: Any = "memopt_fsdp", ddp: str = "ddp", **options: Any
) -> LightningModule:
    """Train the same module under both strategies and compare; return the sharded one."""
    sharded, reference = make(), make()
    before = whole_weights(sharded)
    fit(sharded, ours, **options)
    assert all(isinstance(param, DTensor) for param in sharded.model.parameters())
    fit(reference, ddp, **options)
    close(sharded, reference)
    same_everywhere(sharded)
    moved = [name for name, value in whole_weights(sharded).items() if not torch.equal(value, before[name])]
    assert moved
    return sharded


# ---------------------------------------------------------------------- the same as DDP


@case(2, 4)
def plain_module_trains_as_with_ddp() -> None:
    module = against_ddp(max_steps=6)
    placements = {name: param.placements for name, param in module.named_parameters()}
    assert placements["model.layers.0.mlp.up_proj.weight"] == (Shard(0),)
    assert placements["model.layers.0.mlp.down_proj.weight"] == (Shard(1),)
    units = [name for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]
    assert units == ["model", "model.layers.0", "model.layers.1"]


class Uneven(LanguageModule):
    """The head has five rows: on four ranks 2, 2, 1 and none; its outputs are the first tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model.lm_head = nn.Linear(WIDTH, 5)

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten() % 5)


@case(4)
def uneven_and_empty_shards() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return Uneven()

    module = against_ddp(make, gradient_clip_val=0.1)
    sizes = [2, 2, 1, 0]
    assert module.model.lm_head.bias.to_local().numel() == sizes[dist.get_rank()]
    module = make()
    module.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01)
    fit(module, gradient_clip_val=0.1)
    same_everywhere(module)


@case(4)
def hybrid_sharding() -> None:
    module = against_ddp(ours=MemOptFSDPStrategy(replicate_size=2), max_steps=6, gradient_clip_val=0.1)
    assert {param.placements[0] for param in module.parameters()} == {Replicate()}
    mesh = module.device_mesh
    assert mesh.mesh_dim_names == ("replicate", "shard", "tensor_parallel")
    assert module.trainer.strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": dist.get_rank()}
    assert mesh["data_parallel"].size() == 4  # as users of ModelParallelStrategy write it
    ours = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(ours, MemOptFSDPStrategy(replicate_size=2), max_steps=6)
    same_everywhere(ours)


@case(2)
def accumulation_reduces_once_per_step_if_asked() -> None:
    for every, expected in ((True, 12), (False, 3)):
        with Counted("reduce_scatter") as counted:
            fit(LanguageModule(), MemOptFSDPStrategy(sync_every_batch=every), max_steps=1, accumulate_grad_batches=4)
        assert counted.calls == expected
    for every in (True, False):
        against_ddp(Direct, MemOptFSDPStrategy(sync_every_batch=every), FINDS_UNUSED, accumulate_grad_batches=2)


class Watching(LanguageModule):
    """Keeps the gradients that `on_before_optimizer_step` sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert all(isinstance(param.grad, DTensor) for param in self.parameters())
        self.seen.append({name: whole(param.grad) for name, param in self.named_parameters()})


@case(2)
def hooks_before_the_step_see_reduced_unclipped_gradients() -> None:
    reference = LanguageModule()
    batches = global_batches(2 * reference.batch_size)
    sum(reference.loss(batch) / 2 for batch in batches[:2]).backward()  # type: ignore[union-attr]
    for every in (True, False):
        module = Watching()
        strategy = MemOptFSDPStrategy(sync_every_batch=every)
        fit(module, strategy, max_steps=2, accumulate_grad_batches=2, gradient_clip_val=1e-4)
        assert len(module.losses) == 4
        assert len(module.seen) == 2  # once per step, not per batch
        for name, param in reference.named_parameters():
            torch.testing.assert_close(module.seen[0][name], param.grad, rtol=1e-4, atol=1e-6)


class Accumulating(LanguageModule):
    """Manual optimization: a step after every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer, last = self.optimizers(), batch_idx % 2
        blocked = getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if last else blocked():
            self.manual_backward(self.loss(batch) / 2)
        if last:
            optimizer.step()
            optimizer.zero_grad()


@case(2)
def users_block_the_reduction_in_manual_optimization() -> None:
    reference = Accumulating()
    fit(reference, "ddp", max_steps=2)
    for every, expected in ((True, 12), (False, 6)):  # of three units, in four batches or two steps
        module = Accumulating()
        with Counted("reduce_scatter") as counted:
            fit(module, MemOptFSDPStrategy(sync_every_batch=every), max_steps=2)
        assert counted.calls == expected
        close(module, reference)
        same_everywhere(module)


class Direct(LanguageModule):
    """Parameters on the module itself: one for all ranks, one that only rank 0 uses, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(VOCAB))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.only_first = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.clipped: list[tuple[float, float]] = []

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch)[:, :-1] * self.scale / self.temperature
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss + self.only_first.square().sum() if self.global_rank == 0 else loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        grads = [whole(param.grad).flatten() for param in self.parameters() if param.grad is not None]
        if grads:
            self.clipped.append((torch.cat(grads).norm().item(), torch.cat(grads).abs().max().item()))


@case(2)
def clipping_by_norm_and_value() -> None:
    for which, (algorithm, limit) in enumerate((("norm", 0.05), ("value", 0.001))):
        module = against_ddp(Direct, ddp=FINDS_UNUSED, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
        assert module.clipped
        assert all(abs(seen[which] / limit - 1) < 1e-3 for seen in module.clipped), module.clipped


class Dropping(LanguageModule):
    """Loses gradients on the second rank, as code does that reacts to what only one rank sees."""

    def __init__(self, lost: str) -> None:
        super().__init__(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
        self.lost = lost

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, param in self.named_parameters():
            if dist.get_rank() == 1 and self.lost in name and self.global_step == 1:
                param.grad = None


@case(2)
def gradients_that_one_rank_loses_are_named_on_both() -> None:
    """With clipping, whose collectives come before those of the optimizer."""
    for lost in ("lm_head", ""):
        for options in ({}, {"gradient_clip_val": 0.5}):
            module = Dropping(lost)
            with raises(RuntimeError, "Ranks disagree about", f"{lost}.weight' has one on rank 0 and none on rank 1"):
                fit(module, **options)
            same_everywhere(module)
            assert module.optimizers().state[module.model.lm_head.weight]["step"] == 1


class Sometimes(Network):
    """Uses one parameter on the first rank only."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.extra = nn.Parameter(torch.ones(VOCAB))

    def forward(self, batch: Tensor) -> Tensor:
        logits = super().forward(batch)
        return logits * self.extra if dist.get_rank() == 0 else logits


class Filling(LanguageModule):
    def on_fit_start(self) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_reduce_scatter_unused_params(True)


@case(2)
def parameters_that_some_ranks_do_not_use() -> None:
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # since torch 2.13
        module = against_ddp(lambda: Filling(Sometimes()), ddp=FINDS_UNUSED)
        assert not torch.equal(whole(module.model.extra), torch.ones(VOCAB))


@case(2)
def activation_checkpointing() -> None:
    def dropout() -> LightningModule:
        torch.manual_seed(0)
        return LanguageModule(Network(dropout=0.5))

    calls: list[str] = []

    def counting() -> LightningModule:
        module = dropout()
        module.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("q"))
        return module

    for option in (True, [Block], ["tests.strategy._training.Block"], lambda module: isinstance(module, Block)):
        calls.clear()
        module = counting()
        torch.manual_seed(5)
        fit(module, MemOptFSDPStrategy(activation_checkpointing=option), max_steps=2)
        assert len(calls) == 4, calls  # twice per step
        other = dropout()
        torch.manual_seed(5)
        fit(other, max_steps=2)
        close(module, other, 0)


# ---------------------------------------------------------------------- parameters of all kinds


@case(2)
def parameters_on_the_module_itself() -> None:
    module = against_ddp(Direct, ddp=FINDS_UNUSED, max_steps=4)
    assert not any(isinstance(param, DTensor) for param in (module.scale, module.temperature, module.only_first))
    assert not torch.equal(module.only_first, torch.ones(3))
    assert torch.equal(module.unused, torch.ones(2))
    ours = Direct()
    ours.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01)
    fit(ours, max_steps=4)
    same_everywhere(ours)


class Hollow(Network):
    """Has parameters without elements: beside others, alone in a layer, and all that a block trains."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(2, 0, 4))
        self.features = nn.Linear(0, WIDTH, bias=False)
        self.layers[0].requires_grad_(False)
        self.layers[0].adapter = nn.Parameter(torch.zeros(0, WIDTH))

    def forward(self, batch: Tensor) -> Tensor:
        nothing = self.features(self.features.weight.new_zeros(*batch.shape, 0)).sum() + self.layers[0].adapter.sum()
        return super().forward(batch) + nothing + self.none.sum()


@case(2)
def parameters_without_elements() -> None:
    def make(recipe: str) -> LightningModule:
        torch.manual_seed(0)
        return LanguageModule(Hollow(), lambda it: lm.MemOpt(it.named_parameters(), recipe=recipe, lr=0.01))

    # With two replicas, every one is sharded over one rank.
    for recipe, size, distributed in (("adapm_mini", 1, True), ("adam_snsm", 2, False)):
        options: Any = {"replicate_size": size, "save_distributed_checkpoint": distributed}
        module, resumed, reference = make(recipe), make(recipe), make(recipe)
        with shared_folder() as folder:
            made = fit(module, MemOptFSDPStrategy(**options), max_steps=2, overfit_batches=1)
            made.save_checkpoint(folder / "last.ckpt")
            made = trainer(MemOptFSDPStrategy(**options), max_steps=4, overfit_batches=1)
            made.fit(resumed, ckpt_path=folder / "last.ckpt")
        assert resumed.model.none.shape == (2, 0, 4)
        fit(reference, "ddp", max_steps=4, overfit_batches=1)
        close(resumed, reference)
        same_everywhere(resumed)


@case(2)
def gradients_that_some_ranks_lack_are_averaged() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in zip((2, 3, 1), dtypes, strict=True)]
    params[0].grad = torch.full((2,), float(dist.get_rank()))
    if dist.get_rank() == 0:
        params[1].grad = torch.full((3,), 4.0, dtype=torch.bfloat16)
    with Counted("allreduce") as counted:
        average_gradients(params, None)
        average_gradients([], None)
    assert counted.calls == 1
    torch.testing.assert_close(params[0].grad, torch.full((2,), 0.5), rtol=0, atol=0)
    torch.testing.assert_close(params[1].grad, torch.full((3,), 2.0, dtype=torch.bfloat16), rtol=0, atol=0)
    assert params[2].grad is None


@case(2)
def tied_weights() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return LanguageModule(Network(tied=True))

    module = against_ddp(make)
    assert module.model.lm_head.weight is module.model.embed_tokens.weight
    assert len(list(module.parameters())) == 15


@case(2)
def units_that_share_a_weight_are_left_to_their_parent() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        network = Network(layers=3)
        network.layers[2].self_attn.q_proj.weight = network.layers[0].self_attn.q_proj.weight
        return LanguageModule(network)

    module = against_ddp(make)
    units = [name for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]
    assert units == ["model", "model.layers.1"]


@case(2)
def frozen_and_unused_parameters() -> None:
    def make() -> LightningModule:
        module = LanguageModule()
        module.model.extra = nn.Linear(3, 4)
        nn.init.ones_(module.model.extra.weight)
        nn.init.ones_(module.model.extra.bias)
        module.model.embed_tokens.requires_grad_(False)
        module.model.layers[0].requires_grad_(False)
        module.model.layers[1].input_layernorm.weight.no_weight_decay = True
        return module

    before = whole_weights(make())
    module = against_ddp(make, ddp=FINDS_UNUSED)
    after = whole_weights(module)
    frozen = [name for name in before if "embed" in name or "layers.0" in name or "extra" in name]
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["model.lm_head.weight"], before["model.lm_head.weight"])
    assert module.model.layers[1].input_layernorm.weight.no_weight_decay


@case(2)
def initial_weights_come_from_the_first_rank() -> None:
    torch.manual_seed(dist.get_rank())
    module = LanguageModule(Network())
    module.direct = nn.Parameter(torch.randn(3))
    module.model.register_buffer("table", torch.randn(3))
    torch.manual_seed(0)
    expected = LanguageModule(Network())
    fit(module, max_steps=1, limit_train_batches=0)
    close(module.model, expected.model, 0)  # type: ignore[arg-type]
    same_everywhere(module)
    copies = [torch.empty(3) for _ in range(2)]
    dist.all_gather(copies, module.model.table)
    assert torch.equal(*copies)


# ---------------------------------------------------------------------- optimizers


class Assigned(LanguageModule):
    """An optimizer that was made before anybody thought of sharding, as LightningCLI does."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], scheduler: bool = False) -> None:
        super().__init__()
        self.made = make(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(self.made, 1, gamma=0.5)
        both = {"optimizer": self.made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        self.make_optimizer = lambda _: both if scheduler else self.made


@case(2)
def optimizers_made_before_sharding_train() -> None:
    for make in (
        lambda params: torch.optim.AdamW(params, lr=0.01),
        lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.5),  # has state from the start
    ):
        module = against_ddp(lambda make=make: Assigned(make))
        assert module.trainer.optimizers[0] is module.made
        assert all(param is live for param, live in zip(params_of(module.made), module.parameters(), strict=True))
    made = partial(lm.AdaPMLean, lr=0.01)
    early, late = Assigned(made), LanguageModule(optimizer=lambda it: made(it.parameters()))
    fit(early)
    fit(late)
    close(early, late, 0)
    assert {block.name for block in early.made.snapshot().blocks} == {name for name, _ in early.named_parameters()}


@case(2)
def schedulers_keep_their_optimizer() -> None:
    module = against_ddp(lambda: Assigned(lambda params: torch.optim.AdamW(params, lr=0.01), scheduler=True))
    assert module.made.param_groups[0]["lr"] == 0.01 * 0.5**3


@case(2)
def optimizers_that_would_train_nothing_are_refused() -> None:
    stranger, start = nn.Linear(3, 4), "Of the 2 parameters that the optimizer"
    with raises(ValueError, f"{start} AdamW holds, 2 are not the LanguageModule's", "(4, 3)", "never change"):
        fit(LanguageModule(optimizer=lambda _: torch.optim.AdamW(stranger.parameters())))
    with raises(ValueError, f"{start} AdaPMLean holds, 1 are not", "(4, 3)"):
        named = [("weight", stranger.weight)]
        fit(LanguageModule(optimizer=lambda it: lm.AdaPMLean([*named, ("model.norm.weight", it.model.norm.weight)])))
    with raises(ValueError, "AdamW has no parameters", "configure_optimizers"):
        fit(LanguageModule(optimizer=lambda _: torch.optim.AdamW([{"params": []}])))

    class Replaced(LanguageModule):
        def configure_model(self) -> None:
            self.model.lm_head = nn.Linear(WIDTH, VOCAB + 1, bias=False)

    module = Replaced()
    made = lm.AdaPMLean(module.parameters())
    module.make_optimizer = lambda _: made
    with raises(ValueError, "'model.lm_head.weight'", "(12, 8)", "(13, 8)"):
        fit(module)


@case(2)
def no_optimizer_trains_nothing() -> None:
    """As with other strategies; checkpoints have no optimizer states, and load with and without an optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        for distributed in (True, False):
            without_an_optimizer(Path(folder) / "some.ckpt", distributed)
            dist.barrier()


def without_an_optimizer(path: Path, distributed: bool) -> None:
    before = whole_weights(LanguageModule())
    strategies = (MemOptFSDPStrategy(save_distributed_checkpoint=distributed) for _ in range(4))
    module = LanguageModule(optimizer=lambda _: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit(module, next(strategies), gradient_clip_val=1.0)
    warned = any("this fit will run with no optimizer" in str(entry.message) for entry in caught)
    assert warned == (dist.get_rank() == 0)
    assert fitted.global_step == 3
    torch.testing.assert_close(whole_weights(module), before, rtol=0, atol=0)
    fitted.save_checkpoint(path)
    torch.manual_seed(1)
    other = LanguageModule(Network(), optimizer=lambda _: None)
    again = trainer(next(strategies), max_steps=5)
    again.fit(other, ckpt_path=path)
    assert again.global_step == 5
    torch.testing.assert_close(whole_weights(other), before, rtol=0, atol=0)
    trainer(next(strategies)).validate(LanguageModule(), ckpt_path=path, verbose=False)
    with raises(KeyError, "checkpoint contains only the model"):
        trainer(next(strategies), max_steps=5).fit(LanguageModule(), ckpt_path=path)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


class Odd(torch.optim.SGD):
    """Has state that nobody knows how to cut."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for param in self.param_groups[0]["params"]:
            self.state[param]["sketch"] = torch.zeros(7)


@case(2)
def state_that_cannot_be_cut_is_refused() -> None:
    module = Assigned(Odd)
    old = params_of(module.made)
    with raises(ValueError, "Odd has state 'sketch' of shape (7,)", "ckpt_path"):
        fit(module)
    assert all(param is before for param, before in zip(params_of(module.made), old, strict=True))


class TwoPlayers(LightningModule):
    """Manual optimization of two networks, each with an optimizer of its own, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator, self.critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(second)
        loss = self.critic(self.generator(batch).detach()).square().mean() - self.critic(batch).tanh().mean()
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(second, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(-self.critic(self.generator(batch)).tanh().mean())
        first.step()
        self.untoggle_optimizer(first)

    def configure_optimizers(self) -> Any:
        nets = (self.generator, self.critic)
        return [torch.optim.AdamW(net.parameters(), lr=0.01) for net in nets]

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)


@case(2)
def manual_optimization_with_two_optimizers() -> None:
    sharded, reference = TwoPlayers(), TwoPlayers()
    fit(sharded, max_steps=6)
    fit(reference, FINDS_UNUSED, max_steps=6)
    close(sharded, reference)
    assert sharded.global_step == 6

    class Compressed(TwoPlayers):
        def configure_optimizers(self) -> Any:
            return [lm.AdaPMLean(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]

    module = Compressed()
    fit(module, max_steps=6)
    same_everywhere(module)


# ---------------------------------------------------------------------- precision


class LoRA(nn.Module):
    """A weight in bfloat16 with an adapter in float32, as modules or as parameters of its own."""

    def __init__(self, base: nn.Linear, *, modules: bool) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False) if modules else None
        self.up = nn.Linear(2, base.out_features, bias=False) if modules else None
        self.factors = None if modules else nn.ParameterList([torch.randn(base.in_features, 2)])
        self.factor = None if modules else nn.Parameter(torch.zeros(2, base.out_features))

    def forward(self, value: Tensor) -> Tensor:
        adapted = self.up(self.down(value)) if self.up else value @ self.factors[0] @ self.factor
        return self.base(value.to(self.base.weight.dtype)).to(value.dtype) + adapted.to(value.dtype)


def adapted(*, frozen: bool, modules: bool) -> LightningModule:
    """Return a model whose blocks hold weights in bfloat16 beside norms and adapters in float32."""
    torch.manual_seed(0)
    module = LanguageModule()
    for layer in module.model.layers:
        layer.requires_grad_(not frozen)
        layer.mlp.up_proj = LoRA(layer.mlp.up_proj.to(torch.bfloat16), modules=modules)
        layer.mlp.down_proj = LoRA(layer.mlp.down_proj.to(torch.bfloat16), modules=modules)
    return module


@case(2)
def adapters_of_another_dtype_than_the_weights() -> None:
    for frozen in (True, False):
        for modules in (True, False):
            make = partial(adapted, frozen=frozen, modules=modules)
            module = against_ddp(make)
            inside = [name for name, _ in units_of(module) if "proj" in name]
            assert len(inside) == (0 if frozen else 10), inside  # in each block: a projection and two of each dtype
            assert {param.dtype for param in module.parameters()} == {torch.bfloat16, torch.float32}
        mixed, reference = make(), make()
        fit(mixed, precision="bf16-mixed")
        same_everywhere(mixed)
        fit(reference, "ddp", precision="bf16-mixed")
        torch.testing.assert_close(mixed.losses, reference.losses, rtol=0, atol=0.02)
        mixed.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01)
        fit(mixed, precision="bf16-mixed", gradient_clip_val=0.5)
        same_everywhere(mixed)


class Dtypes(LanguageModule):
    """Notes the dtypes at work."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.model.layers[1].register_forward_hook(
            lambda module, inputs, output: self.seen.update(
                weight=module.mlp.up_proj.weight.dtype, block=output.dtype, autocast=torch.is_autocast_enabled("cpu")
            )
        )

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(batch)
        self.seen["logits"] = logits.dtype
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen["grad"] = self.model.lm_head.weight.grad.dtype


@case(2)
def mixed_precision_is_that_of_fsdp() -> None:
    module, reference = Dtypes(), Dtypes()
    half, full = torch.bfloat16, torch.float32
    fit(module, precision="bf16-mixed")
    assert module.seen == {"weight": half, "block": half, "autocast": False, "logits": full, "grad": full}
    assert {param.dtype for param in module.parameters()} == {full}
    fit(reference, "ddp", precision="bf16-mixed")
    assert reference.seen["autocast"]
    torch.testing.assert_close(module.losses, reference.losses, rtol=0, atol=0.02)
    same_everywhere(module)
    policies = {name: unit._get_fsdp_state()._mp_policy for name, unit in units_of(module)}
    assert {name: policy.output_dtype for name, policy in policies.items()} == {
        "model": full, "model.layers.0": None, "model.layers.1": None}  # fmt: skip
    assert {(policy.param_dtype, policy.reduce_dtype) for policy in policies.values()} == {(half, full)}


@case(2)
def mixed_precision_is_autocast_where_the_user_sharded() -> None:
    class Own(Dtypes):
        def configure_model(self) -> None:
            for layer in self.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    module = Own()
    fit(module, precision="bf16-mixed")
    assert module.seen["autocast"]
    assert module.seen["weight"] == torch.float32
    torch.testing.assert_close(module.losses, Reference.of("bf16-mixed").losses, rtol=0, atol=0.02)


class Reference:
    """What DDP gives, computed once."""

    made: dict[str, LightningModule] = {}

    @classmethod
    def of(cls, precision: str) -> LightningModule:
        if precision not in cls.made:
            cls.made[precision] = LanguageModule()
            fit(cls.made[precision], "ddp", precision=precision)
        return cls.made[precision]


@case(2)
def half_precision() -> None:
    module = Dtypes()
    fit(module, precision="bf16-true")
    assert {param.dtype for param in module.parameters()} == {torch.bfloat16}
    assert module.seen["grad"] == module.seen["block"] == torch.bfloat16
    torch.testing.assert_close(module.losses, Reference.of("bf16-true").losses, rtol=0, atol=0.02)
    ours = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(ours, precision="bf16-true")
    same_everywhere(ours)


class Counted(TorchDispatchMode):
    """Counts collectives by a part of their name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += self.name in str(func)
        return func(*args, **(kwargs or {}))


def units_of(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, unit) for name, unit in module.named_modules() if isinstance(unit, FSDPModule)]


# ---------------------------------------------------------------------- the life of a Trainer


@case(2)
def fits_again_with_the_same_trainer() -> None:
    def twice(strategy: str) -> LightningModule:
        module = LanguageModule()
        made = trainer(strategy, max_epochs=1)
        made.fit(module)
        made.validate(module, verbose=False)
        made.fit_loop.max_epochs = 2
        made.fit(module)
        return module

    module = twice("memopt_fsdp")
    assert len(module.losses) == 12
    close(module, twice("ddp"))


@case(2)
def fits_again_with_another_trainer() -> None:
    def twice(strategy: str) -> LightningModule:
        module = LanguageModule()
        fit(module, strategy)
        trainer(strategy).validate(module, verbose=False)
        fit(module, strategy)
        return module

    module = twice("memopt_fsdp")
    close(module, twice("ddp"))
    with raises(ValueError, "earlier fit with precision='32-true'", "precision='bf16-mixed'"):
        fit(module, precision="bf16-mixed")
    with raises(ValueError, "earlier fit with cpu_offload=False"):
        fit(module, "memopt_fsdp_offload")


@case(2)
def evaluates_without_fitting() -> None:
    for reshard in (True, None):
        module, reference = LanguageModule(), LanguageModule()
        ours, theirs = trainer(MemOptFSDPStrategy(reshard_after_forward=reshard)), trainer("ddp")
        assert ours.validate(module, verbose=False) == theirs.validate(reference, verbose=False)
        assert ours.test(module, verbose=False) == theirs.test(reference, verbose=False)
        for mine, other in zip(ours.predict(module), theirs.predict(reference), strict=True):
            assert torch.equal(mine, other)
        assert not ours.optimizers
        assert all(isinstance(param, DTensor) for param in module.parameters())  # gathered weights are freed


@case(2)
def sharding_options_reach_the_units() -> None:
    ours = MemOptFSDPStrategy(wrap=[nn.Linear, "torch.nn.Embedding"], reshard_after_forward=False)
    module = against_ddp(ours=ours)
    assert {type(unit).__name__ for _, unit in units_of(module)} == {"FSDPLinear", "FSDPEmbedding", "FSDPNetwork"}
    module = against_ddp(ours=MemOptFSDPStrategy(wrap=lambda it: isinstance(it, Block), reshard_after_forward=None))
    assert [name for name, _ in units_of(module)] == ["model", "model.layers.0", "model.layers.1"]


@case(2)
def offloaded_to_the_cpu() -> None:
    module = against_ddp(ours="memopt_fsdp_offload", gradient_clip_val=0.1)
    groups = [group for _, unit in units_of(module) for group in unit._get_fsdp_state()._fsdp_param_groups]
    assert groups
    assert all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups)
    ours = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(ours, "memopt_fsdp_offload")
    same_everywhere(ours)


# ---------------------------------------------------------------------- the meta device


class Causal(LanguageModule):
    """A model of transformers."""

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


@case(2)
def transformers_models_are_initialised_by_themselves() -> None:
    from tests._models import tiny_gpt2, tiny_llama  # seconds to import, which most ranks need not wait for

    for make in (tiny_llama, tiny_gpt2):
        for empty in (True, False):
            made = trainer(max_steps=3)
            with made.init_module(empty_init=empty):
                module = Causal(make().train())
            assert next(module.parameters()).is_meta == empty
            assert any(buffer.is_meta for buffer in module.buffers()) == (empty and make is tiny_llama)
            made.validate(module, verbose=False)
            same_everywhere(module)
            start = Causal(make())
            for name, buffer in start.named_buffers():
                torch.testing.assert_close(module.get_buffer(name), buffer, rtol=0, atol=0)
            for name, value in whole_weights(module).items():
                expected = start.get_parameter(name)
                if "norm" in name or "ln_" in name or "bias" in name:
                    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)
                else:
                    assert 0.7 < value.std() / expected.std() < 1.5, name
            if make is tiny_gpt2:
                assert module.model.lm_head.weight is module.model.transformer.wte.weight
            made.fit(module)
            same_everywhere(module)
            assert 2 < module.losses[-1] < 5


@case(2)
def whole_weights_and_norms_of_gradients_for_other_tools() -> None:
    """The example on the page of the strategy runs, and saves what the model has learned."""
    from transformers import AutoModelForCausalLM

    from tests._models import tiny_gpt2, tiny_llama

    page = (Path(__file__).parents[2] / "docs" / "strategy.md").read_text().partition("## Norms of gradients")[2]
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"CausalModel": Causal, "lightning_memopt": lm}
    exec(code, names)
    for make, size in ((tiny_llama, 2), (tiny_gpt2, 1)):  # the latter ties weights
        with shared_folder() as folder, contextlib.chdir(folder):
            module = names["Model"](make().train())
            fit(module, MemOptFSDPStrategy(replicate_size=size), max_steps=2)
            dist.barrier()
            saved = AutoModelForCausalLM.from_pretrained("trained")
            assert type(saved) is type(make())
            for name, value in whole_weights(module.model).items():
                torch.testing.assert_close(saved.get_parameter(name).detach(), value, rtol=0, atol=0)
            logged = [name for name in module.trainer.logged_metrics if name.startswith("grad_2.0_norm")]
            assert len(logged) == len(list(module.parameters())) + 1
    state = lm.full_state_dict(module.model)
    assert list(state) == (list(module.model.state_dict()) if dist.get_rank() == 0 else [])
    if state:
        assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


class Norms(Direct):
    """Compares the norms of gradients with those of Lightning, on whole gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        copy = nn.ParameterDict()
        for name, param in self.named_parameters():
            copy[name.replace(".", "-")] = nn.Parameter(whole(param))
            copy[name.replace(".", "-")].grad = None if param.grad is None else whole(param.grad)
        for norm_type in (1, 2.0, "inf"):
            expected = {name.replace("-", "."): float(norm) for name, norm in grad_norm(copy, norm_type).items()}
            found = lm.grad_norm(self, norm_type)
            assert found == pytest.approx(expected, rel=1e-5)
            assert list(found)[-1] == f"grad_{float(norm_type)}_norm_total"


@case(2, 4)
def norms_of_gradients_are_those_of_lightning() -> None:
    for strategy in ("memopt_fsdp", "memopt_fsdp_offload", "ddp_find_unused_parameters_true"):
        fit(Norms(), strategy, max_steps=1)
    with raises(ValueError, "`norm_type` must be a positive number or 'inf', got 0"):
        lm.grad_norm(nn.Linear(2, 2), 0)
    assert lm.grad_norm(nn.Linear(2, 2)) == {}


@case(2)
def inner_units_are_not_initialised_again() -> None:
    """GPT-2's blocks scale the weights of projections, which are units of their own here."""
    from tests._models import tiny_gpt2

    made = trainer(MemOptFSDPStrategy(wrap=["transformers.pytorch_utils.Conv1D"]), max_steps=2)
    with made.init_module(empty_init=True):
        module = Causal(tiny_gpt2().train())
    made.validate(module, verbose=False)
    same_everywhere(module)
    made.fit(module)
    same_everywhere(module)


class Custom(nn.Module):
    """Holds a parameter and cannot initialise it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        return value


@case(2)
def modules_of_torch_are_initialised_by_themselves() -> None:
    made = trainer(max_steps=3)
    with made.init_module(empty_init=True):
        module = LanguageModule(Network(tied=True))
        module.model.attention = nn.MultiheadAttention(WIDTH, 2)
        module.model.batch_norm = nn.BatchNorm1d(3)
    made.fit(module)
    same_everywhere(module)
    assert module.model.lm_head.weight is module.model.embed_tokens.weight
    assert whole(module.model.embed_tokens.weight).std() > 0.1
    assert torch.equal(module.model.batch_norm.running_var, torch.ones(3))
    with raises(ValueError, "model.layers.0.custom (Custom): weight, positions", "reset_parameters()", "empty_init"):
        made = trainer()
        with made.init_module(empty_init=True):
            module = LanguageModule(Network())
            module.model.layers[0].custom = Custom()
        made.fit(module)


@case(2)
def real_weights_survive_beside_meta_ones() -> None:
    module = LanguageModule()
    expected = whole(module.model.layers[0].mlp.up_proj.bias)
    module.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.empty(2 * WIDTH, WIDTH, device="meta"))
    fit(module, max_steps=1, limit_train_batches=0)
    assert torch.equal(whole(module.model.layers[0].mlp.up_proj.bias), expected)
    same_everywhere(module)


# ---------------------------------------------------------------------- what the user shards


@case(4)
def tensor_parallelism_of_the_user() -> None:
    class Parallel(LanguageModule):
        shard_over_columns = False

        def configure_model(self) -> None:
            if any(isinstance(param, DTensor) for param in self.parameters()):
                return
            if self.shard_over_columns:
                self.drop_biases()  # which only have a dimension 0
            tensors, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
            plan = {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
            colwise = set()
            for layer in self.model.layers:
                parallelize_module(layer, tensors, plan)
                colwise.add(layer.mlp.up_proj.weight)
            placed = (lambda param: Shard(1) if param in colwise else None) if self.shard_over_columns else None
            for layer in self.model.layers:
                fully_shard(layer, mesh=data, shard_placement_fn=placed)
            fully_shard(self.model, mesh=data)

        def drop_biases(self) -> None:
            for layer in self.model.layers:
                layer.mlp.up_proj.bias = None

    def strategy() -> MemOptFSDPStrategy:
        return MemOptFSDPStrategy(tensor_parallel_size=2)

    def single() -> LanguageModule:
        """The same batches in one process, from two data-parallel ranks and not four."""
        module = LanguageModule()
        optimizer = adamw(module)
        for batch in global_batches(2 * module.batch_size)[:3]:
            optimizer.zero_grad()
            module.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
        return module

    module = Parallel()
    fit(module, strategy(), gradient_clip_val=0.1)
    assert module.trainer.strategy.distributed_sampler_kwargs["num_replicas"] == 2
    close(module, single())
    with raises(NotImplementedError, "_StridedShard", "placements"):
        fit(Parallel(optimizer=lambda it: lm.AdaPMLean(it.parameters(), lr=0.01)), strategy())
    module = Parallel(optimizer=lambda it: lm.AdaPMLean(it.parameters(), lr=0.01))
    module.shard_over_columns = True
    fit(module, strategy())
    same_everywhere(module)
    with raises(ValueError, "`tensor_parallel_size` is 2", "device_mesh['tensor_parallel']"):
        fit(LanguageModule(), strategy())


class UserSharded(LanguageModule):
    """Shards the blocks and leaves the embedding and the head plain."""

    def configure_model(self) -> None:
        for layer in self.model.layers:
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


@case(2)
def what_the_user_sharded_stays_as_it_is() -> None:
    module = UserSharded()
    made = adamw(module)  # before `configure_model`
    module.make_optimizer = lambda _: made
    fit(module)
    assert [name for name, _ in units_of(module)] == ["model.layers.0", "model.layers.1"]
    assert not isinstance(module.model.lm_head.weight, DTensor)
    close(module, Reference.of("32-true"))
    same_everywhere(module)
    for option in ({"wrap": [Block]}, {"activation_checkpointing": True}, {"cpu_offload": True}):
        with raises(ValueError, f"`{next(iter(option))}` would have no effect", "configure_model"):
            fit(UserSharded(), MemOptFSDPStrategy(**option))


@case(2)
def what_the_user_sharded_on_the_meta_device_is_initialised() -> None:
    class Meta(UserSharded):
        def configure_model(self) -> None:
            super().configure_model()
            if not isinstance(self.model, FSDPModule):
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    made = trainer(max_steps=2)
    with made.init_module(empty_init=True):
        module = Meta(Network(tied=True))
    made.fit(module)
    same_everywhere(module)
    assert module.model.lm_head.weight is module.model.embed_tokens.weight
    made = trainer(max_steps=2)
    with made.init_module(empty_init=True):
        module = Meta(Network())
        module.model.custom = Custom()
    with raises(ValueError, "model.custom (Custom): weight, positions"):
        made.fit(module)


# ---------------------------------------------------------------------- refusals, names, command line


@case(2)
def different_models_on_the_ranks_are_refused() -> None:
    rank = dist.get_rank()
    module = LanguageModule(Network(layers=2 + rank))
    with raises(ValueError, "rank 0 has 'model.norm.weight", "rank 1 has 'model.layers.2.", "same model"):
        fit(module)
    assert not any(isinstance(param, DTensor) for param in module.parameters())


class Changing(nn.Linear):
    """Changes its weight in every forward pass, in one of the ways in which this is done."""

    def __init__(self, inputs: int, outputs: int, how: str) -> None:
        super().__init__(inputs, outputs)
        self.how = how

    def forward(self, value: Tensor) -> Tensor:
        weight = self.weight
        with torch.no_grad():
            if self.how == "in place":
                weight.clamp_(-5, 5)  # which changes no number yet
            elif self.how == "through data":
                weight.data.clamp_(min=0)
            elif self.how == "new data":
                weight.data = torch.renorm(weight.data, 2, 0, 100.0)
            elif self.how == "a new parameter":
                self.weight = nn.Parameter(weight.clamp(min=0))
        return super().forward(value)


def changing(how: str, *, sharded: bool = False, hook: bool = False) -> LightningModule:
    class Module(LanguageModule):
        def configure_model(self) -> None:
            if sharded and not isinstance(self.model.layers[0], FSDPModule):
                for layer in self.model.layers:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    torch.manual_seed(0)
    module = Module()
    layer = module.model.layers[1]
    layer.mlp.down_proj = Changing(2 * WIDTH, WIDTH, how)
    if hook:

        def clamp(layer: nn.Module, inputs: Any) -> None:
            layer.mlp.up_proj.weight.data.clamp_(min=0)

        layer.register_forward_pre_hook(clamp)
    return module


@case(2)
def weights_that_change_in_forward_are_refused() -> None:
    texts = ("Weights change in the forward pass of 'model.layers.1'", "would be lost", "`weight.clamp(min=0)`")
    for how in ("in place", "through data", "new data", "a new parameter"):
        for sharded in (False, True):
            with raises(NotImplementedError, *texts, ": 'model.layers.1.mlp.down_proj.weight' (Changing)."):
                fit(changing(how, sharded=sharded))
    with raises(NotImplementedError, *texts, ": 'model.layers.1.mlp.up_proj.weight' (Linear)."):
        fit(changing("not", hook=True), MemOptFSDPStrategy(activation_checkpointing=True))
    module = changing("through data")
    module.model = torch.compile(module.model, backend="eager")
    with raises(NotImplementedError, "'model._orig_mod.layers.1.mlp.down_proj.weight' (Changing)."):
        fit(module)
    module = changing("not")
    made = trainer(max_steps=1)
    made.validate(module, verbose=False)
    hooks = [len(unit._forward_hooks) for _, unit in units_of(module)]
    made.fit(module)
    assert [len(unit._forward_hooks) + 1 for _, unit in units_of(module)] == hooks  # they looked once


class PastForward(LanguageModule):
    """Uses what is in the network without calling the network."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = torch.nn.functional.embedding(batch, self.model.embed_tokens.weight)
        return nn.functional.linear(hidden, self.model.lm_head.weight).square().mean()


@case(2)
def weights_that_nothing_gathers_are_explained() -> None:
    for stage in ("fit", "validate", "test", "predict"):
        module = PastForward()
        module.predict_step = lambda batch, batch_idx, module=module: module.loss(batch)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="got mixed torch.Tensor and DTensor") as caught:
            getattr(trainer(max_steps=1), stage)(module)
        (note,) = caught.value.__notes__
        assert "its outermost units are 'model'." in note
        assert "torch.distributed.fsdp.register_fsdp_forward_method" in note


@case(2)
def callbacks_that_average_weights_are_refused() -> None:
    for make in (partial(StochasticWeightAveraging, 0.01), WeightAveraging):
        module, callback = LanguageModule(), make()
        with raises(TypeError, f"The callback {type(callback).__name__} averages", "leave it out", "strategy='ddp'"):
            fit(module, callbacks=[callback])
        assert not any(isinstance(param, DTensor) for param in module.parameters())
        trainer(callbacks=[make()]).validate(LanguageModule(), verbose=False)


class Thawed(BaseFinetuning):
    """Unfreezes what is sharded along one dimension or the other, vectors of equal values, and statistics."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.model.embed_tokens)
        self.freeze(pl_module.model.layers[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            modules = [pl_module.model.embed_tokens, pl_module.model.layers[0]]
            self.unfreeze_and_add_param_group(modules, optimizer, lr=1e-3)


@case(2)
def finetuning_adds_sharded_parameters() -> None:
    def make(module: LightningModule) -> torch.optim.Optimizer:
        return lm.AdaPMLean([(name, p) for name, p in module.named_parameters() if p.requires_grad], lr=1e-3)

    module = LanguageModule(optimizer=make)
    frozen = [*module.model.embed_tokens.parameters(), *module.model.layers[0].parameters()]
    count, names = len(frozen), {name for name, param in module.named_parameters() if any(param is p for p in frozen)}
    before = {name: param.detach().clone() for name, param in module.named_parameters() if name in names}
    fit(module, callbacks=[Thawed()], max_epochs=2, max_steps=-1)
    (optimizer,) = module.trainer.optimizers
    assert [len(group["params"]) for group in optimizer.param_groups][1:] == [count]
    after = lm.full_state_dict(module)
    if dist.get_rank() == 0:
        assert all((after[name] != before[name]).any() for name in names)


@case(2)
def callbacks_that_prune_sharded_weights_are_refused() -> None:
    module = LanguageModule()
    with raises(TypeError, "The callback ModelPruning ranks whole weights", "torch.nn.utils.prune", "strategy='ddp'"):
        fit(module, callbacks=[ModelPruning("l1_unstructured", amount=0.5)])
    assert not any(isinstance(param, DTensor) for param in module.parameters())
    trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).validate(LanguageModule(), verbose=False)


@case(2)
def embeddings_that_sharding_would_break_are_refused() -> None:
    for options, texts in (
        ({"max_norm": 1.0}, ("`max_norm`", "'model.embed_tokens.weight'", "torch.renorm")),
        ({"sparse": True}, ("Sparse gradients", "'model.embed_tokens.weight'", "`sparse=False`")),
    ):
        for kind in (nn.Embedding, nn.EmbeddingBag):
            module = LanguageModule()
            module.model.embed_tokens = kind(VOCAB, WIDTH, **options)
            with raises(ValueError, *texts):
                fit(module)
            assert not any(isinstance(param, DTensor) for param in module.parameters())
    module = LanguageModule()
    module.model.embed_tokens = nn.Embedding(VOCAB, WIDTH, sparse=True).requires_grad_(False)
    fit(module, max_steps=1)


@case(2)
def weights_that_are_computed_from_parameters() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        module = LanguageModule()
        first, second = (layer.mlp for layer in module.model.layers)
        parametrizations.weight_norm(first.up_proj)
        parametrizations.spectral_norm(first.down_proj)
        nn.utils.spectral_norm(second.up_proj)  # the older one works by hooks
        prune.random_unstructured(second.down_proj, "weight", amount=0.5)
        prune.random_unstructured(module.model.lm_head, "weight", amount=0.5)
        return module

    against_ddp(make)


@case(2)
def batch_norms_are_synchronised_if_asked() -> None:
    module = LanguageModule()
    module.model.batch_norm = nn.BatchNorm1d(3)
    trainer(sync_batchnorm=True).validate(module, verbose=False)
    assert type(module.model.batch_norm) is nn.SyncBatchNorm


@case(2)
def compiled_modules() -> None:
    def make() -> LightningModule:
        module = LanguageModule()
        module.model = torch.compile(module.model, backend="eager")
        return module

    module, reference = make(), LanguageModule()
    fit(module)
    fit(reference)
    assert [name for name, _ in units_of(module)] == [
        "model._orig_mod", "model._orig_mod.layers.0", "model._orig_mod.layers.1"]  # fmt: skip
    torch.testing.assert_close(module.losses, reference.losses)


@case(2)
def sizes_that_do_not_fit_are_refused() -> None:
    for sizes in ({"data_parallel_size": 3}, {"replicate_size": 4}, {"tensor_parallel_size": 3}):
        with raises(RuntimeError, "multiplied should equal the world size (2)"):
            fit(LanguageModule(), MemOptFSDPStrategy(**sizes))


@case(2)
def the_strategy_is_lightnings_own_kind() -> None:
    """What users of ModelParallelStrategy rely on."""
    order: list[str] = []

    class Hooks(LanguageModule):
        def configure_model(self) -> None:
            assert self.device_mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
            order.append("configure_model")

        def setup(self, stage: str) -> None:
            order.append("setup")

        def configure_optimizers(self) -> Any:
            assert all(isinstance(param, DTensor) for param in self.parameters())
            order.append("configure_optimizers")
            return super().configure_optimizers()

        def on_fit_start(self) -> None:
            order.append("on_fit_start")

    module = Hooks()
    made = fit(module, max_steps=1)
    assert order == ["setup", "configure_model", "configure_optimizers", "on_fit_start"]
    assert isinstance(made.strategy, ModelParallelStrategy)
    assert made.strategy.model is made.lightning_module is module
    assert made.strategy.restore_checkpoint_after_setup
    assert not made.strategy.lightning_restore_optimizer
    assert made.global_step == 1


def _command(tmp: Path, config: str, cli: str = "lightning_memopt.cli.MemOptCLI") -> LightningModule:
    module, _, name = cli.rpartition(".")
    path = tmp / f"rank{dist.get_rank()}.yaml"
    path.write_text(config)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "plugins": [Spawned()]}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 2, "num_sanity_val_steps": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        made = getattr(import_module(module), name)(
            LanguageModule,
            args=["fit", "--config", str(path)],
            trainer_defaults={**quiet, "max_steps": 3},
            save_config_callback=None,
        )
    return made.model


@case(2)
def command_line() -> None:
    torch.manual_seed(0)
    by_hand = LanguageModule(optimizer=lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01))
    fit(by_hand)
    with tempfile.TemporaryDirectory() as folder:
        for strategy in (
            "memopt_fsdp",
            "{class_path: lightning_memopt.MemOptFSDPStrategy, init_args: "
            "{wrap: [tests.strategy._training.Block], activation_checkpointing: true, data_parallel_size: 2}}",
        ):
            config = (
                "seed_everything: false\n"
                f"trainer: {{strategy: {strategy}}}\n"
                "optimizer: {class_path: lightning_memopt.AdaPMLean, init_args: {lr: 0.01}}\n"
            )
            module = _command(Path(folder), config)
            same_everywhere(module)
            close(module, by_hand, 1e-6)


@case(2)
def command_line_of_lightning() -> None:
    """LightningCLI makes the optimizer of `parameters()` without names, and finds the strategy by its class."""
    options = "wrap: tests.strategy._training.Block, activation_checkpointing: torch.nn.Linear"
    strategy = f"{{class_path: lightning_memopt.MemOptFSDPStrategy, init_args: {{{options}}}}}"
    with tempfile.TemporaryDirectory() as folder:
        for path, kind in (("lightning_memopt.AdaPMLean", lm.AdaPMLean), ("torch.optim.AdamW", torch.optim.AdamW)):
            by_hand = LanguageModule(optimizer=lambda it, kind=kind: kind(it.parameters(), lr=0.01))
            fit(by_hand)
            optimizer = f"{{class_path: {path}, init_args: {{lr: 0.01}}}}"
            config = f"seed_everything: false\ntrainer: {{strategy: {strategy}}}\noptimizer: {optimizer}\n"
            module = _command(Path(folder), config, "lightning.pytorch.cli.LightningCLI")
            assert type(module.trainer.optimizers[0]) is kind
            assert {type(unit).__name__ for _, unit in units_of(module)} == {"FSDPBlock", "FSDPNetwork"}
            same_everywhere(module)
            close(module, by_hand, 1e-6)


CASE_IDS = [pytest.param(size, name, id=f"{name}-{size}") for size, cases in CASES.items() for name in cases]


@pytest.mark.parametrize(("size", "name"), CASE_IDS)
def test_on_ranks(outcomes, size, name):
    for rank, results in enumerate(outcomes(size)):
        assert results[name] is None, f"on rank {rank}:\n{results[name]}"
