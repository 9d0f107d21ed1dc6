"""Activations that are planned, against those of a real pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

from torch.distributed._composable.checkpoint_activation import checkpoint

import lightning_memopt as lm
from lightning_memopt.memory.temporaries import Temporaries
from lightning_memopt.sharding.wrapping import blocks
from tests._models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.slow

BATCH = (4, 16)


def measured(model: nn.Module, *, checkpointed: bool) -> int:
    for param in filter(lambda param: param.requires_grad, model.parameters()):
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    for block in blocks(model) if checkpointed else ():
        checkpoint(block)
    ids = torch.zeros(BATCH, dtype=torch.long)
    with Temporaries() as temporaries:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return temporaries.peak


def quiet_gpt2(layers: int = 2) -> nn.Module:
    """Return a GPT-2 without dropout of attention."""
    model = tiny_gpt2(layers=layers)
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    return model


@pytest.mark.parametrize("make", [lambda: tiny_llama(layers=4), lambda: quiet_gpt2(layers=4)], ids=["llama", "gpt2"])
def test_activations_are_those_of_a_pass(make):
    found = {}
    for checkpointed in (False, True):
        plan = lm.plan_memory(make(), "adafactor", batch=BATCH, activation_checkpointing=checkpointed)
        assert plan.activation_bytes == pytest.approx(measured(make(), checkpointed=checkpointed), rel=0.03)
        found[checkpointed] = plan
    assert found[True].activation_bytes < 0.5 * found[False].activation_bytes
    without = lm.plan_memory(make(), "adafactor")
    assert without.activation_bytes is None
    adamw, more = without.rows[0], found[False].rows[0]
    assert more.total_bytes == adamw.total_bytes + found[False].activation_bytes
    half = lm.plan_memory(make(), "adafactor", batch=BATCH, precision="bf16-mixed")
    assert half.activation_bytes < found[False].activation_bytes


def test_frozen_models_and_dropout_of_attention():
    """Attention with dropout keeps no scores on a GPU, where it is part of the kernel."""
    quiet, noisy = quiet_gpt2(), tiny_gpt2()
    assert noisy.transformer.h[0].attn.attn_dropout.p > 0
    plans = [lm.plan_memory(model, "adafactor", batch=list(BATCH)) for model in (quiet, noisy)]
    assert plans[0].activation_bytes == plans[1].activation_bytes
    assert noisy.transformer.h[0].attn.attn_dropout.p > 0
    frozen = lm.plan_memory(tiny_gpt2().requires_grad_(False), "adafactor", batch=BATCH)
    assert 0 < frozen.activation_bytes < plans[0].activation_bytes


def test_a_module_and_its_hooks_stay_as_they_are():
    model = tiny_llama()
    before = dict(model.named_parameters())
    lm.plan_memory(model, "adafactor", batch=BATCH, activation_checkpointing=True)
    assert all(param is before[name] for name, param in model.named_parameters())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_built_in_model_runs(run):
    given = ("--model", "gpt2", "--recipe", "adapm_lean", "--batch", "8x256")
    code, out, error = run(*given, "--gpu-memory", "5G")
    assert (code, error) == (0, "")
    assert ", activations of 8 x 256 tokens " in out
    assert "First that fits in 5 GiB, keeping the most state: adapm_lean (" in out
    assert "left for" not in out
    code, out, _ = run(*given, "--gpu-memory", "3G")
    assert "With --activation-checkpointing, adapm_lean fits: " in out
    code, out, _ = run(*given, "--activation-checkpointing", "--gpu-memory", "4G")
    assert "124,439,808 parameters, 1 rank, 32-true, activation checkpointing, 8 x 256 tokens\n" in out
    assert "First that fits in 4 GiB, keeping the most state: torch.optim.AdamW (" in out


def test_a_module_that_holds_a_model_with_adapters():
    """What runs is the model of transformers inside, with the adapters that are in its layers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    module = nn.ModuleDict({"policy": peft.get_peft_model(tiny_llama(layers=4), config)})
    plan = lm.plan_memory(module, "adafactor", batch=BATCH)
    assert plan.activation_bytes == pytest.approx(measured(module["policy"], checkpointed=False), rel=0.03)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("mixtral-8x7b", {"batch": (1, 8)}, "activations of mixtral-8x7b depend on which experts.*Leave `batch` out"),
        (Images(), {"batch": (1, 8)}, "activations of Images are unknown.*read `input_ids` alone.*Leave `batch` out"),
        ("gpt2", {"batch": (1, 1025)}, "gpt2 has learned positions for 1,024 tokens .*sequences of 1,025: give it"),
        ("gpt2", {"batch": (1, 0)}, r"`batch` must be two positive integers, such as \(4, 512\).*got \(1, 0\)"),
        ("gpt2", {"gradient_release": True, "world_size": 4, "replicate_size": 2}, "frees nothing.*leave one of the"),
        ("gpt2", {"activation_checkpointing": True}, r"planned for a `batch`: add one, such as `batch=\(4, 512\)`"),
    ],
)
def test_bad_input_is_told(model, options, message):
    with pytest.raises(ValueError, match=message):
        lm.plan_memory(model, "adafactor", **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "gpt2", "--batch", "8"], "two numbers with an x between them, such as 4x512, are needed, got '8'"),
        (["--model", "gpt2", "--activation-checkpointing"], "activations only: say for which --batch, such as 4x512"),
    ],
)
def test_the_command_says_what_is_missing(run, args, message):
    code, _, error = run(*args)
    assert code == 2
    assert message in error
