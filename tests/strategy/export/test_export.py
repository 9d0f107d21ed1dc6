"""What ``lightning-memopt export`` writes is what was saved, and whoever it is for reads it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

import lightning_memopt as lm
from lightning_memopt.strategy.export.export_command import main
from lightning_memopt.strategy.export.inspect_command import main as inspect
from tests._compare import assert_equal
from tests.strategy.checkpoint._checkpoints import same_content
from tests.strategy.export._saved import FORMATS, refused, save
from tests.strategy.files._faults import Hostile


class Net(nn.Module):
    """Two names for one weight, a buffer, and a module inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(16, 8), "lm_head": nn.Linear(8, 16, bias=False)})
        self.model["lm_head"].weight = self.model["embed_tokens"].weight
        self.register_buffer("count", torch.tensor(3))


def optimizer(net: nn.Module) -> lm.MemOpt:
    return lm.AdaPMLean(net.named_parameters(), lr=1e-3, rank=2)


def exported(path, out, *options):
    assert main([str(path), str(out), *options]) == 0
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_weights(tmp_path, format, capsys):
    net = Net()
    path = save(tmp_path / "last.ckpt", net, optimizer(net), format=format, global_step=7)
    expected = net.state_dict()
    out = exported(path, tmp_path / "weights.safetensors")
    assert capsys.readouterr().out == f"{out}: 3 weights, 1 KiB, from {path}, step 7\n"
    assert_equal(load_file(out), dict(expected))
    exported(path, tmp_path / "weights.pt")
    assert_equal(torch.load(tmp_path / "weights.pt", weights_only=True), dict(expected))
    inside = exported(path, tmp_path / "inside.pt", "--strip", "model.", "--dtype", "bfloat16")
    found = torch.load(inside, weights_only=True)
    assert_equal(found, {name: value.bfloat16() for name, value in net.model.state_dict().items()})
    assert sorted(os.listdir(tmp_path)) == ["inside.pt", "last.ckpt", "weights.pt", "weights.safetensors"]


@pytest.mark.parametrize("format", FORMATS)
def test_weights_with_all_bits(tmp_path, format, capsys):
    net = Net().bfloat16()
    trained = lm.AdaPMLean(net.model.named_parameters(), lr=1e-3, rank=2, master_weight_bits=24)
    for param in net.parameters():
        param.grad = torch.randn(param.shape).bfloat16()
    trained.step()
    path = save(tmp_path / "last.ckpt", net, trained, format=format)
    wide = load_file(exported(path, tmp_path / "wide.safetensors", "--dtype", "float32"))
    (name, expected), *rest = trained.full_weights().items()
    assert not rest
    for key in (name, "lm_head.weight"):
        assert_equal(wide[f"model.{key}"], expected)
    assert not torch.equal(expected, net.model[name.partition(".")[0]].weight.float())
    plain = load_file(exported(path, tmp_path / "plain.safetensors"))
    assert_equal(plain[f"model.{name}"], net.state_dict()[f"model.{name}"])
    capsys.readouterr()
    assert inspect([str(path)]) == 0
    told = capsys.readouterr().out
    assert "of state, 24 bits of each weight, lr 0.001" in told
    assert "low_bits" not in told


def test_bits_of_unknown_weights_are_refused(tmp_path, capsys):
    net = Net().bfloat16()
    trained = lm.AdaPMLean([("other.up_proj.weight", net.model["embed_tokens"].weight)], master_weight_bits=24)
    path = save(tmp_path / "last.ckpt", net, trained, format="file")
    told = refused(main, capsys, path, tmp_path / "wide.pt", "--dtype", "float32")
    assert "keeps bits of 'other.up_proj.weight', of shape (16, 8), which is no bfloat16 weight" in told


def test_everything_is_what_a_single_device_saves(tmp_path):
    rest = {"global_step": 7, "callbacks": {"a": {"seen": 2}}, "lr_schedulers": [{"last_epoch": 3}]}
    saved = {}
    for format in FORMATS:
        net = Net()
        opts = [optimizer(net), torch.optim.AdamW(net.parameters(), lr=0.1)]
        path = save(tmp_path / format, net, *opts, format=format, **rest)
        out = exported(path, tmp_path / f"{format}.ckpt", "--optimizer")
        saved[format] = torch.load(out, weights_only=True)
    expected = torch.load(tmp_path / "file", weights_only=True)
    for found in saved.values():
        same_content({key: found[key] for key in expected}, expected)
        assert set(found) == set(expected)
    other = Net()
    opts = [optimizer(other), torch.optim.AdamW(other.parameters())]
    other.load_state_dict(saved["directory"]["state_dict"])
    for opt, state in zip(opts, saved["directory"]["optimizer_states"], strict=True):
        opt.load_state_dict(state)
        same_content(opt.state_dict()["state"], state["state"])


@pytest.mark.parametrize("format", FORMATS)
def test_no_optimizer_is_no_state(tmp_path, format):
    path = save(tmp_path / "last.ckpt", Net(), format=format)
    found = torch.load(exported(path, tmp_path / "one.pt", "--optimizer"), weights_only=True)
    assert found["optimizer_states"] == []


# --- transformers ----------------------------------------------------------------------------------------------------


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**options):
    pytest.importorskip("transformers")
    from examples.pretrain.model import LanguageModel

    return LanguageModel("llama-1m", 64, 16, config={**SMALL, **options})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_for_transformers(tmp_path, format, tied):
    """The model of an example, with tied weights or without: equal logits."""
    module = llama(tie_word_embeddings=tied)
    path = save(tmp_path / "last.ckpt", module, optimizer(module), format=format, hyper_parameters=dict(module.hparams))
    out = exported(path, tmp_path / "model", "--module", "examples.pretrain.model.LanguageModel")
    assert_read(out, module)
    other = exported(path, tmp_path / "again", "--model-config", str(out))
    assert sorted(os.listdir(other)) == sorted(os.listdir(out))
    assert_read(other, module)


def test_modules_of_the_working_directory_are_found(tmp_path, monkeypatch):
    """A console script does not have the working directory in its path."""
    (tmp_path / "mine_alone.py").write_text("from examples.pretrain.model import LanguageModel\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    module = llama()
    path = save(tmp_path / "last.ckpt", module, format="directory", hyper_parameters=dict(module.hparams))
    assert_read(exported(path, tmp_path / "model", "--module", "mine_alone.LanguageModel"), module)


def assert_read(folder, module) -> None:
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(folder)
    assert type(read) is type(module.model)
    assert_equal(dict(read.state_dict()), dict(module.model.state_dict()))
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert_equal(read(tokens).logits, module.model.eval()(tokens).logits)


def test_a_folder_in_another_dtype(tmp_path):
    from transformers import AutoModelForCausalLM

    module = llama()
    path = save(tmp_path / "last.ckpt", module, format="directory", hyper_parameters=dict(module.hparams))
    out = exported(path, tmp_path / "model", "--module", "examples.pretrain.model.LanguageModel", "--dtype", "bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {param.dtype for param in AutoModelForCausalLM.from_pretrained(out).parameters()} == {torch.bfloat16}


def test_one_of_two_models_has_to_be_named(tmp_path, capsys):
    """A policy and its frozen reference: which one a folder would get is not for the order to decide."""
    module = llama()
    both = nn.ModuleDict({"policy": module.model, "reference": llama().model})
    path = save(tmp_path / "last.ckpt", both, format="directory")
    module.model.config.architectures = ["LlamaForCausalLM"]
    module.model.config.to_json_file(tmp_path / "config.json")
    args = (path, tmp_path / "model", "--model-config", str(tmp_path / "config.json"))
    message = refused(main, capsys, *args)
    assert "holds 2 models with the weights of LlamaForCausalLM: 'policy.', 'reference.'. Export" in message
    assert "--strip policy." in message
    assert not (tmp_path / "model").exists()


class Wrapped(nn.Module):
    """Not a model of transformers."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)


class Needy(nn.Module):
    def __init__(self) -> None:
        raise OSError("weights are not here")


def test_what_is_no_model_of_transformers_is_refused(tmp_path, capsys):
    path = save(tmp_path / "last.ckpt", Net(), format="directory")
    out, here = tmp_path / "model", __name__

    def message(*options) -> str:
        found = refused(main, capsys, path, out, *options)
        assert not out.exists()
        return found

    assert "needs the model's configuration: name the LightningModule's class with --module" in message()
    assert "--module nothing.Model cannot be imported (No module named 'nothing')" in message(
        "--module", "nothing.Model"
    )
    assert f"{here}.Wrapped holds 0 models of transformers" in message("--module", f"{here}.Wrapped")
    text = message("--module", f"{here}.Needy")
    assert (
        "could not be created on the meta device from the hyperparameters in the checkpoint (OSError: weights" in text
    )
    assert "Give the model's configuration with --model-config" in text
    assert "No such file or directory" in message("--model-config", str(tmp_path / "nothing.json"))
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "unheard", "architectures": ["Unheard"]}')
    text = message("--model-config", str(config))
    assert "has the `model_type` 'unheard' and the architecture 'Unheard', which transformers" in text
    llama().model.config.save_pretrained(tmp_path / "llama")
    entries = json.loads((tmp_path / "llama" / "config.json").read_text())
    config.write_text(json.dumps({**entries, "architectures": ["LlamaForCausalLM"]}))
    text = message("--model-config", str(config))
    assert "The weights of the checkpoint are not those of LlamaForCausalLM: Error(s) in loading state_dict" in text


# --- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_is_replaced_without_force(tmp_path, capsys):
    net = Net()
    path = save(tmp_path / "last.ckpt", net, format="file")
    out = tmp_path / "weights.pt"
    out.write_text("mine")
    assert "exists: name another place, or add --force to replace it" in refused(main, capsys, path, out)
    text = refused(main, capsys, path, "s3://bucket/weights.pt")
    assert "'s3://bucket/weights.pt' is a URL, and an export is written to local files: name a path" in text
    assert out.read_text() == "mine"
    exported(path, out, "--force")
    assert_equal(torch.load(out, weights_only=True), dict(net.state_dict()))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    text = refused(main, capsys, path, folder, "--model-config", folder, "--force")
    assert "holds files that replacing it would delete: 'tokenizer.json'. Name another place" in text
    assert len(os.listdir(folder)) == 2


def test_options_that_do_not_go_together(tmp_path, capsys):
    path = save(tmp_path / "last.ckpt", Net(), format="file")

    def message(out: str, *options: str) -> str:
        return refused(main, capsys, path, tmp_path / out, *options)

    assert "a .ckpt file holds the optimizer, too. Add --optimizer" in message("a.ckpt")
    assert "--optimizer writes a file that ends in .ckpt or .pt, got" in message("a.safetensors", "--optimizer")
    assert "--dtype changes weights, and --optimizer writes them as they are" in message(
        "a.pt", "--optimizer", "--dtype", "float16"
    )
    assert "--module and --model-config describe a folder, got the file" in message("a.pt", "--module", "a.B")
    assert "unknown format '.bin'. Name a file that ends in .safetensors or .pt, or a folder" in message("a.bin")
    assert "--strip has no effect on a folder" in message("model", "--module", "a.B", "--strip", "model.")
    assert "No weight has the prefix 'net.': the checkpoint has count, model.embed" in message(
        "a.pt", "--strip", "net."
    )
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt"]


def test_extra_state_is_no_tensor(tmp_path, capsys):
    class Extra(Net):
        def get_extra_state(self):
            return {"a": [1, {"b": 2}]}

        def set_extra_state(self, state):
            pass

    for format in FORMATS:
        path = save(tmp_path / format, Extra(), format=format)
        text = refused(main, capsys, path, tmp_path / "weights.safetensors")
        assert "'_extra_state' is of type dict, and safetensors holds tensors only" in text
        found = torch.load(exported(path, tmp_path / f"{format}.pt"), weights_only=True)
        assert found["_extra_state"] == {"a": [1, {"b": 2}]}


def test_a_damaged_or_hostile_checkpoint_writes_nothing(tmp_path, capsys):
    path = save(tmp_path / "last.ckpt", Net(), format="directory")
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    assert "'__0_0.distcp' is truncated" in refused(main, capsys, path, tmp_path / "weights.pt")
    bad = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Hostile(tmp_path / "was-run")}, bad)
    assert "which is not allowed in a checkpoint" in refused(main, capsys, bad, tmp_path / "weights.pt")
    assert sorted(os.listdir(tmp_path)) == ["bad.ckpt", "last.ckpt"]


def test_a_library_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    path = save(tmp_path / "last.ckpt", Net(), format="directory")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert "pip install safetensors" in refused(main, capsys, path, tmp_path / "weights.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install transformers" in refused(main, capsys, path, tmp_path / "model", "--module", "a.B")
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt"]


def test_a_failed_write_changes_nothing(tmp_path, capsys, monkeypatch):
    path = save(tmp_path / "last.ckpt", Net(), format="directory")
    out = tmp_path / "weights.safetensors"
    out.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert "No space left on device" in refused(main, capsys, path, out, "--force")
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "weights.safetensors"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_commands_on_the_page_run(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).resolve().parents[3] / "docs" / "export.md").read_text()
    commands = re.findall(r"^\| `lightning-memopt export ([^`]*)` \|", page, flags=re.MULTILINE)
    commands += re.findall(r"^lightning-memopt (inspect .*)$", page, flags=re.MULTILINE)
    assert len(commands) == 7
    monkeypatch.chdir(tmp_path)
    module = llama()
    save(tmp_path / "last.ckpt", module, optimizer(module), format="directory", hyper_parameters=dict(module.hparams))
    module.model.config.architectures = ["LlamaForCausalLM"]
    module.model.config.to_json_file("config.json")
    for command in commands:
        args = command.replace("my_module.MyModel", "examples.pretrain.model.LanguageModel").split()
        if args[0] == "inspect":
            assert inspect(args[1:]) == 0
        else:
            assert main([*args, "--force"]) == 0
    assert "recipe adapm_lean" in capsys.readouterr().out
    assert_read("folder", module)
