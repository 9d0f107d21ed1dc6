"""Models that are born on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from lightning_memopt import MemOptFSDPStrategy
from tests.strategy._training import WIDTH, LanguageModule, Network, fit, raises, trainer, whole, whole_weights
from tests.strategy.cases.shared import Causal, Custom, case, same_everywhere


@case(2)
def transformers_models_are_initialised_by_themselves() -> None:
    from tests._models import tiny_gpt2, tiny_llama  # seconds to import, which most ranks need not wait for

    for make in (tiny_llama, tiny_gpt2):
        for empty in (True, False):
            made = trainer(max_steps=2)
            with made.init_module(empty_init=empty):
                module = Causal(make(layers=1).train())
            assert next(module.parameters()).is_meta == empty
            assert any(buffer.is_meta for buffer in module.buffers()) == (empty and make is tiny_llama)
            made.validate(module, verbose=False)
            same_everywhere(module)
            start = Causal(make(layers=1))
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
