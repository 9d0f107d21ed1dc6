"""A user's file that touches every public name. It is never run: ``mypy --strict`` reads it as it reads a user's.

A ``type: ignore`` marks a mistake that mypy has to find. Under ``--strict`` one that finds nothing is an error itself.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, assert_type

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_memopt as lm
from lightning_memopt.callbacks import POLICIES, Problem
from lightning_memopt.kinds.batch import Large
from lightning_memopt.kinds.momentum.base import State
from lightning_memopt.kinds.tick import Tick
from lightning_memopt.planner import sweep_memory
from lightning_memopt.sharding.layout import Layout

# ---------------------------------------------------------------------- optimizers

model = nn.TransformerEncoderLayer(64, 4, 256)
optimizer = lm.MemOpt(
    model.named_parameters(),
    recipe="adam_snsm",
    lr=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    rank=1 / 4,
    overrides={"value": {"momentum": "dense"}, "*linear1*": lm.Recipe("low_rank", "factored"), "head": {"rank": 8}},
    nonfinite="skip",
    state_dtype=torch.bfloat16,
    projection="svd",
)
by_parameters = lm.AdaPMLean(model.parameters(), lr=torch.tensor(1e-3), eps=1e-8, max_update=None)
by_groups = lm.AdaPM([{"params": model.named_parameters(), "lr": 1e-4}], paper=True, clip_update=1.0)
recipes: list[type[lm.MemOpt]] = [lm.AdaGradSNSM, lm.AdaPMMini, lm.Adafactor, lm.AdamMini, lm.AdamSN, lm.AdamSNSM]
recipes += [lm.Apollo, lm.ApolloMini, lm.Fira, lm.GaLore, lm.Muon, lm.MuonLean, lm.RMSPropSN, lm.SCALE, lm.SNSMLean]
any_torch_optimizer: torch.optim.Optimizer = recipes[0](model.named_parameters())

lm.MemOpt(model.named_parameters(), lr="fast")  # type: ignore[arg-type]
lm.AdaPM(model.named_parameters(), betas=0.9)  # type: ignore[arg-type]
misspelt = lm.AdaPm  # type: ignore[attr-defined]

assert_type(optimizer.bind(model), lm.MemOpt)
assert_type(lm.AdaPM(model.parameters()).bind(model), lm.AdaPM)
optimizer.step()
optimizer.zero_grad(set_to_none=True)
optimizer.reformat({"linear2.weight": {"rank": 32}, "value": lm.Recipe("none", "dense")}, dropped="discard")
released = optimizer.release_gradients(model)
assert_type(released.peak_bytes, int)
released.remove()
optimizer.register_update_hook(lambda params: print(len(params))).remove()
assert_type(optimizer.full_weights(), dict[str, Tensor])
assert_type(optimizer.skipped, int)
assert_type(optimizer.plan_table(), str)
optimizer.load_state_dict(optimizer.state_dict())
for group, param, block in optimizer.blocks():
    print(group["lr"], param.shape, block.name)

schedule = lm.WarmupSchedule(optimizer, 100, "cosine", final=0.1, total_steps=1000)
assert_type(schedule.factor(5), float)
lm.WarmupSchedule(optimizer, 100, "exponential")  # type: ignore[arg-type]

# ---------------------------------------------------------------------- what a snapshot tells

with lm.trace_step([optimizer, any_torch_optimizer], model) as traced:
    optimizer.step()
assert_type(traced.scratch, int)
snapshot: lm.Snapshot = lm.take_snapshot([optimizer, any_torch_optimizer], model, step=traced)
assert_type(optimizer.snapshot(), lm.Snapshot)
assert_type(snapshot.saved, float)
facts: lm.BlockFacts = snapshot.blocks[0]
parts: lm.PartBytes = facts.local
assert_type(parts.total, int)
memory: lm.ProcessMemory | None = snapshot.memory
print(memory.parameters if memory else 0)
print(memory.parameters)  # type: ignore[union-attr]

state_bytes = lm.metrics.OptimizerStateBytes(sync_on_compute=False)
state_bytes.update(snapshot)
assert_type(state_bytes.compute(), dict[str, Tensor])
savings, peak, allocation = lm.metrics.MemorySavings(), lm.metrics.PeakMemory(), lm.metrics.MomentumAllocation()
figure, axes = savings.plot([savings(snapshot), savings(snapshot)])
assert_type(lm.metrics.memory_savings(snapshot), dict[str, float])
assert_type(lm.metrics.optimizer_state_bytes(snapshot), dict[str, int])
lm.metrics.peak_memory(snapshot)
lm.metrics.momentum_allocation(snapshot)

# ---------------------------------------------------------------------- plans and roles

plan: lm.Plan = lm.load_plan("adapm_lean").updated(options={"rank": 8})
lm.MemOpt(model.named_parameters(), recipe=plan)
lm.MemOpt(model.named_parameters(), recipe={"name": "mine", "base": "adapm", "roles": {"value": {"rank": 4}}})
assert_type(lm.recipe_names(), list[str])
memory_plan: lm.MemoryPlan = lm.plan_memory("llama-1b", ["adapm_lean", plan], world_size=8, gpu_memory="24GiB")
assert_type(memory_plan.row("adapm_lean").total_bytes, int)
assert_type(sweep_memory(model, world_sizes=(1, 2)), tuple[lm.MemoryPlan, ...])
for name, roles in lm.classify(model, head_dim=16).items():
    print(name, roles[0].role)
mine = lm.NamingScheme("mine", (lm.Rule("qkv", ("query", "key", "value"), fused_dim=0), lm.Rule("out", ("output",))))
assert_type(lm.register_naming_scheme(mine), lm.NamingScheme)
warnings: tuple[type[Warning], ...] = (lm.PlanWarning, lm.ResumeWarning, lm.RoleWarning)

# ---------------------------------------------------------------------- kinds of one's own


@lm.MOMENTA.register("scaled")
@dataclass(frozen=True)
class Scaled(lm.Momentum):
    """The gradient, without momentum."""

    name: ClassVar[str] = "scaled"
    needs_matrix: ClassVar[bool] = False
    strength: float = 1.0

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta1: float, tick: Tick
    ) -> Generator[Any, Any, lm.Direction]:
        """Return the gradient."""
        yield from ()
        return lm.Direction(grad)

    def to_dense(self, state: State, layout: Layout) -> Tensor:
        """Return zeros."""
        return torch.zeros(layout.local)


@lm.SECOND_MOMENTS.register("one")
@dataclass(frozen=True)
class One(lm.SecondMoment):
    """A denominator of 1."""

    name: ClassVar[str] = "one"

    def update(
        self, grad: Large, state: Mapping[str, Any], layout: Layout, *, beta2: float, eps: float, tick: Tick
    ) -> Generator[Any, Any, lm.Denominator]:
        """Return 1."""
        yield from ()
        return lm.Denominator()


assert_type(Scaled(strength=2.0).strength, float)
assert_type(lm.MOMENTA.get("scaled"), type[lm.Momentum])


@POLICIES.register("first")
def first(problem: Problem) -> Mapping[str, int]:
    """Give the first block the smallest rank, and the others none."""
    return {block.name: problem.min_rank * (position == 0) for position, block in enumerate(problem.blocks)}


# ---------------------------------------------------------------------- Lightning


class Model(L.LightningModule):
    """A module as users write it."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return an optimizer and its schedule."""
        mine = lm.AdaPMLean(self.named_parameters()).bind(self)
        return {"optimizer": mine, "lr_scheduler": {"scheduler": lm.WarmupSchedule(mine, 10), "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norms of the gradients."""
        self.log_dict(lm.grad_norm(self, norm_type=2))

    def on_train_end(self) -> None:
        """Gather the weights."""
        assert_type(lm.full_state_dict(self, ignore_frozen_params=True), dict[str, Any])


class EveryTenSteps(lm.AdaptiveMomentum):
    """A callback with changes of its own."""

    def propose(self, snapshot: lm.Snapshot, signals: Mapping[str, Any]) -> Mapping[str, Any]:
        """Halve the rank of every block."""
        return {block.name: {"rank": max(1, block.rank // 2)} for block in snapshot.blocks if block.rank}


callbacks: list[L.Callback] = [
    lm.AdaptiveMomentum(budget="512MiB", policy="benefit", every_n_steps=10, freeze_after=0.3),
    EveryTenSteps(0.05, first),
    lm.OptimizerMemoryMonitor(every_n_steps=100, figures=True),
    lm.BindNames(),
]
strategy = lm.MemOptFSDPStrategy("auto", wrap=nn.TransformerEncoderLayer, activation_checkpointing=True)
trainer = L.Trainer(strategy=strategy, callbacks=callbacks, max_steps=20)
trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(8, 64))))
fabric = L.Fabric(strategy=lm.MemOptFabricStrategy(verify=False), devices=2)
assert_type(lm.load_weights("last.ckpt"), dict[str, Any])
lm.MemOptCLI(Model, args=["fit", "--trainer.max_steps=1"], run=False)
