import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")
pytest.importorskip("peft", exc_type=ImportError)

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_memopt as lm
from tests._ranks import run_ranks
from tests.examples._run import RECIPES, configs, fit_on_ranks
from tests.examples._sft import write_functions

pytestmark = pytest.mark.slow

SFT, LORA = ("sft/sft.yaml",), ("sft/lora.yaml",)
OVERLAYS = [
    *((*SFT, f"sft/{recipe}.yaml") for recipe in RECIPES),
    *((*LORA, f"sft/lora_{recipe}.yaml") for recipe in RECIPES),
]
LEAN = (*SFT, "sft/adapm_lean.yaml")


@pytest.fixture
def functions(tmp_path):
    return write_functions(tmp_path / "functions")


@pytest.fixture
def small(functions, transformers_folder):
    """Return arguments that make a config quick: three steps, then a validation."""
    return [
        f"--data.root={functions}", f"--model.path={transformers_folder}",
        "--data.seq_len=256", "--data.batch_size=4", "--trainer.val_check_interval=3",
        "--trainer.check_val_every_n_epoch=null", "--trainer.logger=false",
    ]  # fmt: skip


def saved_by(names):
    """Return the folder that a config leaves for transformers."""
    return Path("runs") / Path(names[0]).stem / "model"


def whole(folder):
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("names", [SFT, LORA, *OVERLAYS], ids=lambda names: Path(names[-1]).stem)
def test_every_config_trains(names, small, fit, transformers_folder, tmp_path, monkeypatch):
    gathered, gather = [], lm.full_state_dict
    monkeypatch.setattr(
        lm, "full_state_dict", lambda *args, **how: gathered.append(gather(*args, **how)) or gathered[0]
    )
    cli = fit(*configs(*names), *small)
    saved = saved_by(names)
    assert cli.trainer.global_step == 3
    assert cli.trainer.callback_metrics["val_loss"].isfinite()
    assert "parses" in cli.trainer.callback_metrics
    (optimizer,) = cli.trainer.optimizers
    before, after = whole(transformers_folder), whole(saved)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert isinstance(optimizer, torch.optim.AdamW if names[-1].endswith("adamw.yaml") else lm.MemOpt)
    if names[0] == LORA[0]:
        if isinstance(optimizer, lm.MemOpt):
            assert {block.role for block in optimizer.snapshot().blocks} == {"lora"}
        # transformers loads the model that was adapted, and adds the adapter.
        assert (saved / "adapter_config.json").is_file()
        assert not changed
        assert any("lora_B" in name and tensor.any() for name, tensor in after.items())
        assert all("lora_" in name for name in gathered[0]), "frozen weights are not gathered"
    else:
        assert changed == set(before)
    template = AutoTokenizer.from_pretrained(saved).chat_template
    assert template == cli.model.tokenizer.chat_template
    assert (saved.parent / "checkpoints" / "last.ckpt").exists()


def test_an_adapter_that_will_be_replaced_is_told_of_before(small, fit, caplog):
    told = []
    for _ in range(2):
        caplog.clear()
        fit(*configs(*LORA), *small, "--trainer.max_steps=1")
        told.append([text for text in caplog.messages if "SaveTransformers" in text])
    assert told[0] == []
    (text,) = told[1]
    assert "runs/lora/model holds an adapter of " in text


def test_an_epoch_that_ends_leaves_a_checkpoint(small, fit, monkeypatch):
    found = []
    monkeypatch.setattr(
        "examples.sft.model.SFTModule.on_train_epoch_start",
        lambda self: found.append(Path("runs/sft/checkpoints/last.ckpt").exists()),
        raising=False,
    )
    fit(*configs(*SFT), *small, "--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.val_check_interval=1.0",
        "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=2")  # fmt: skip
    assert found == [False, True]


def passes(task, answer):
    return "x(" in task


def on_ranks(rank, world_size, commands, folder):
    """Run the commands; answers pass by their task, because what three steps have taught is not Python."""
    from examples.sft import generation

    generation.parses = passes
    return fit_on_ranks(rank, world_size, commands, folder)


def test_two_ranks_train_and_report_as_one_process(small, fit, tmp_path, monkeypatch):
    def callbacks(num_tasks, dirpath):
        rate = {"class_path": "examples.sft.generation.ParseRate", "init_args": {"num_tasks": num_tasks}}
        save = {"class_path": "examples.pretrain.finish.SaveTransformers", "init_args": {"dirpath": dirpath}}
        return f"--trainer.callbacks={json.dumps([rate, save])}"

    # Of one task, the second rank gets none; of three, it gets one.
    small = [*small, "--data.batch_size=2"]
    lora, lean = [*configs(*LORA), *small], [*configs(*LEAN), *small]
    commands = [[*lora, callbacks(1, "adapter")]]
    commands += [[*configs(*names), *small] for names in OVERLAYS if names != LEAN]
    commands += [[*lean, callbacks(3, "sharded")]]
    found, other = run_ranks(on_ranks, 2, commands, str(tmp_path))
    assert found == other
    assert all(run["steps"] == 3 and run["sharded"] == 1 for run in found)
    assert found[0]["metrics"]["parses"] in (0, 1)
    monkeypatch.setattr("examples.sft.generation.parses", passes)
    fit(*lora, callbacks(1, "alone"), "--data.batch_size=4")
    adapter, expected = (load_file(Path(name) / "adapter_model.safetensors") for name in ("adapter", "alone"))
    assert all("lora_" in name for name in adapter)
    torch.testing.assert_close(adapter, expected, rtol=1e-3, atol=1e-4)
    cli = fit(*lean, callbacks(3, "whole"), "--data.batch_size=4")
    alone = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    assert found[-1]["metrics"] == pytest.approx(alone, rel=1e-4)
    assert 0 < alone["parses"] < 1
    torch.testing.assert_close(whole("sharded"), whole("whole"), rtol=1e-3, atol=1e-4)


def test_a_folder_that_is_no_model(small, fit, transformers_folder, tmp_path):
    with pytest.raises(ValueError, match=r"'nowhere' does not exist: run the pretraining with which the example's"):
        fit(*configs(*SFT), *small, "--model.path=nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer_config.json: run the pretraining with which"):
        fit(*configs(*SFT), *small, f"--model.path={tmp_path}")


def test_pairs_longer_than_the_model_are_refused(small, fit):
    with pytest.raises(ValueError, match="`max_length` is 200, the model's `max_position_embeddings` only 128"):
        fit(*configs(*SFT), *small, "--data.max_length=200")


def test_a_template_of_the_folder_is_used(small, fit, transformers_folder, tmp_path):
    theirs = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    theirs += "{{ '[assistant]' if add_generation_prompt }}"
    folder = tmp_path / "with_template"
    tokenizer = AutoTokenizer.from_pretrained(transformers_folder)
    tokenizer.chat_template = theirs
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(transformers_folder).save_pretrained(folder)
    cli = fit(*configs(*SFT), *small, f"--model.path={folder}")
    example = cli.datamodule.examples["train"][0]
    assert tokenizer.decode(example.prompt) == f"[user]{example.pair.task}<|endoftext|>[assistant]"
    assert AutoTokenizer.from_pretrained(saved_by(SFT)).chat_template == theirs
