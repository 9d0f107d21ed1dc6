"""The rows of a plan, measured in training: exact where storages decide, and never above a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from lightning.pytorch import LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import lightning_memopt as lm
from lightning_memopt.memory.rows import ROWS
from lightning_memopt.metrics import peak_memory
from lightning_memopt.planner.memory_plan import MemoryPlan
from lightning_memopt.planner.planning import candidates, plan_module
from lightning_memopt.planner.settings import RunSettings
from lightning_memopt.sharding.wrapping import find_units
from lightning_memopt.strategy.model.shard import Sharding, shard
from tests._models import LENGTH, VOCAB, tiny_llama
from tests._ranks import run_ranks

pytestmark = pytest.mark.slow

RECIPES = ("adamw", "adapm_lean", "snsm_lean", "muon_lean")
RELEASE = (False, True)


class Model(LightningModule):
    def __init__(self, recipe: str = "adamw") -> None:
        super().__init__()
        self.model = tiny_llama(hidden=48, intermediate=96, layers=3)
        self.recipe = recipe

    def training_step(self, tokens: Tensor, batch_idx: int = 0) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def configure_optimizers(self) -> lm.MemOpt:
        return lm.MemOpt(self.named_parameters(), self.recipe, lr=1e-3)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randint(0, VOCAB, (8, LENGTH)), batch_size=2)


def planned(recipe: str, release: bool, ranks: int = 1, rank: int = 0) -> MemoryPlan:
    settings = RunSettings(ranks, gradient_release=release, fsdp=ranks > 1)
    return plan_module(Model(), candidates([recipe]), settings, name="model", rank=rank)


def rows(plan: MemoryPlan, recipe: str) -> dict[str, int]:
    """Return the rows of a plan, with the counters of steps, which are measured with the state."""
    found = plan.row(recipe)
    sizes = (plan.parameter_bytes, found.gradient_bytes, plan.buffer_bytes, found.state_bytes + plan.counter_bytes)
    return dict(zip(ROWS, (*sizes, plan.unsharded_bytes, found.scratch_bytes), strict=True))


def measured(recipe: str, release: bool, prepare: Callable[[Model], Any] = lambda module: None) -> list[dict[str, int]]:
    """Return the rows as metrics report them, after every one of three steps."""
    torch.manual_seed(0)
    module = Model()
    prepare(module)
    optimizer = lm.MemOpt(module.named_parameters(), recipe, lr=1e-3).bind(module)
    if release:
        optimizer.release_gradients(module)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        with lm.trace_step(optimizer, module) as step:
            module.training_step(torch.randint(0, VOCAB, (2, LENGTH))).backward()
            optimizer.step()
        found.append(peak_memory(lm.take_snapshot(optimizer, module, step=step)))
    return [{name: entry[name] for name in ROWS} for entry in found]


def sharded(module: Model) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    shard(module, find_units(module), Sharding(mesh, "32-true", False, torch.device("cpu"), None))


def on_ranks(rank: int, world: int) -> dict[tuple[str, bool], list[dict[str, int]]]:
    return {(recipe, release): measured(recipe, release, sharded) for recipe in RECIPES for release in RELEASE}


def check(found: list[dict[str, int]], plan: MemoryPlan, recipe: str, *, release: bool) -> None:
    """Compare the most of all steps with the plan, row by row."""
    most, expected = {name: max(entry[name] for entry in found) for name in ROWS}, rows(plan, recipe)
    bounds = ("unsharded", "gradients") if release else ("unsharded",)
    assert {name: size for name, size in most.items() if name not in bounds} == {
        name: size for name, size in expected.items() if name not in bounds
    }
    for name in bounds:
        assert 0.5 * expected[name] <= most[name] <= expected[name], name
    if plan.sharded and not release:
        assert most["unsharded"] > 0.95 * expected["unsharded"]


@pytest.mark.parametrize("release", RELEASE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rows_of_one_process_are_those_of_the_plan(recipe, release):
    check(measured(recipe, release), planned(recipe, release), recipe, release=release)


def test_the_rows_of_two_ranks_are_those_of_the_plan():
    for rank, found in enumerate(run_ranks(on_ranks, 2)):
        for (recipe, release), steps in found.items():
            check(steps, planned(recipe, release, 2, rank), recipe, release=release)


class Modes(nn.Module):
    """Notes the dispatch modes that are active in the forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, list[TorchDispatchMode]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += _get_current_dispatch_mode_stack()
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_monitor_reports_the_rows_and_no_mode_is_active_in_a_pass(recipe, tmp_path, capsys):
    module, monitor = Model(recipe), lm.OptimizerMemoryMonitor(every_n_steps=100)
    modes = module.model.lm_head = Modes(module.model.lm_head)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=4, callbacks=[monitor], default_root_dir=tmp_path, **quiet).fit(module)
    assert modes.seen == []
    expected, last = rows(planned(recipe, False), recipe), monitor.history[-1]
    scalars = ("parameter_bytes", "gradient_bytes", "buffer_bytes", "state_bytes_rank", "unsharded_bytes")
    assert {scalar: last[scalar] for scalar in (*scalars, "scratch_bytes")} == dict(
        zip((*scalars, "scratch_bytes"), expected.values(), strict=True)
    )
    assert f"{ROWS['scratch']} " in capsys.readouterr().out


def test_another_optimizer_is_traced_once_it_has_state_and_its_closure_is_not():
    module, seen = Model(), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, foreach=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.training_step(torch.zeros(2, LENGTH, dtype=torch.long))
        loss.backward()
        seen.extend(_get_current_dispatch_mode_stack())
        return loss

    found = []
    for _ in range(2):
        with lm.trace_step([optimizer], module) as step:
            optimizer.step(closure)
        found.append(step.scratch)
    size = 4 * sum(param.numel() for param in module.parameters())
    assert found[0] == 0
    assert size <= found[1] < 3 * size, "foreach makes lists of temporaries, each as large as the model"
    assert seen == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_who_traces_around_a_trace_finds_as_much():
    module = Model()
    optimizer = lm.AdaPMLean(module.named_parameters(), lr=1e-3)
    with lm.trace_step(optimizer, module) as outer, lm.trace_step(optimizer, module) as inner:
        module.training_step(torch.zeros(2, LENGTH, dtype=torch.long)).backward()
        optimizer.step()
    assert outer == inner
    assert outer.scratch > 0


def test_a_step_that_is_compiled_is_left_alone():
    module = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, foreach=True)
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(lambda: optimizer.step(), backend=backend)
    with lm.trace_step(optimizer, module) as found:
        step()
    assert len(graphs) == 1
    assert found.scratch == 0
    assert _get_current_dispatch_mode_stack() == []


def test_nothing_is_left_after_an_error():
    module = Model()
    optimizer = lm.AdaPMLean(module.named_parameters(), lr=1e-3)
    for param in module.parameters():
        param.grad = torch.full_like(param, float("nan"))
    with pytest.raises(FloatingPointError), lm.trace_step(optimizer, module):
        optimizer.step()
    assert _get_current_dispatch_mode_stack() == []
    other = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    other.step()
    other.param_groups[0]["lr"] = "wrong"
    with lm.trace_step(other, module):
        with pytest.raises(TypeError):
            other.step()
        other.param_groups[0]["lr"] = 1e-3
        other.step()
        assert _get_current_dispatch_mode_stack() == [], "the next step ends what the failed one began"
    assert _get_current_dispatch_mode_stack() == []
