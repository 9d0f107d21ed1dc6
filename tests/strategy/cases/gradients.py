"""When gradients are reduced, what hooks see of them, clipping, and their norms."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lightning_memopt as lm
from lightning_memopt import MemOptFSDPStrategy
from lightning_memopt.strategy import unsharded
from lightning_memopt.strategy.checkpoint.states import gathered
from lightning_memopt.strategy.gradients import average_gradients
from tests.strategy._training import LanguageModule, fit, global_batches, raises, whole_tensors, whole_weights
from tests.strategy.cases.shared import (
    FINDS_UNUSED,
    Causal,
    Counted,
    Direct,
    against_ddp,
    case,
    close,
    same_everywhere,
    shared_folder,
)


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
        grads = whole_tensors(param.grad for param in self.parameters())
        self.seen.append(dict(zip(dict(self.named_parameters()), grads, strict=True)))


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


class Norms(Direct):
    """Compares the norms of gradients with those of Lightning, on whole gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        copy = nn.ParameterDict()
        for name, param in self.named_parameters():
            copy[name.replace(".", "-")] = nn.Parameter(torch.zeros(param.shape))
        with_grad = {name: param.grad for name, param in self.named_parameters() if param.grad is not None}
        for name, grad in zip(with_grad, whole_tensors(with_grad.values()), strict=True):
            copy[name.replace(".", "-")].grad = grad
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
def whole_weights_and_norms_of_gradients_for_other_tools() -> None:
    """The example on the page of the strategy runs, and saves what the model has learned."""
    from transformers import AutoModelForCausalLM

    from tests._models import tiny_gpt2, tiny_llama

    page = (
        (Path(__file__).parents[3] / "docs" / "strategy.md")
        .read_text()
        .partition("## Gradient norms, and weights for other tools")[2]
    )
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"CausalModel": Causal, "lightning_memopt": lm}
    exec(code, names)
    for model, size in ((tiny_llama, 2), (tiny_gpt2, 1)):  # the latter ties weights
        make = partial(model, layers=1)
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


@case(2)
def frozen_weights_are_not_gathered_if_they_are_not_asked_for() -> None:
    module = LanguageModule()
    module.model.layers[0].requires_grad_(False)
    module.model.register_buffer("scale", torch.ones(3))
    frozen = {f"model.layers.0.{name}" for name, _ in module.model.layers[0].named_parameters()}
    fit(module, max_steps=1)
    everything = lm.full_state_dict(module)
    with pytest.MonkeyPatch.context() as patch:
        calls: list[list[Any]] = []
        patch.setattr(unsharded, "gathered", lambda values, keep: calls.append(values) or gathered(values, keep))
        found = lm.full_state_dict(module, ignore_frozen_params=True)
    (asked,) = calls
    assert frozen
    assert len(asked) == len(module.state_dict()) - len(frozen)
    assert set(everything) - set(found) == (frozen if dist.get_rank() == 0 else set())
    assert ("model.scale" in found) is (dist.get_rank() == 0)
    for name, value in found.items():
        torch.testing.assert_close(value, everything[name], rtol=0, atol=0)
