"""Precision: adapters in another dtype, mixed, and half."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lightning_memopt as lm
from tests.strategy._training import LanguageModule, Network, fit
from tests.strategy.cases.shared import Reference, against_ddp, case, same_everywhere, units_of


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
    """Return a model whose block holds weights in bfloat16 beside norms and adapters in float32."""
    torch.manual_seed(0)
    module = LanguageModule(Network(layers=1))
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
            assert len(inside) == (0 if frozen else 5), inside  # a projection and two of each dtype
            assert {param.dtype for param in module.parameters()} == {torch.bfloat16, torch.float32}
        mixed, reference = make(), make()
        fit(mixed, precision="bf16-mixed", max_steps=2)
        same_everywhere(mixed)
        fit(reference, "ddp", precision="bf16-mixed", max_steps=2)
        torch.testing.assert_close(mixed.losses, reference.losses, rtol=0, atol=0.02)
        mixed.make_optimizer = lambda it: lm.AdaPMLean(it.named_parameters(), lr=0.01)
        fit(mixed, precision="bf16-mixed", gradient_clip_val=0.5, max_steps=2)
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
