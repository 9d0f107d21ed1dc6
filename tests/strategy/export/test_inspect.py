"""What ``lightning-memopt inspect`` says about a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

import lightning_memopt as lm
from lightning_memopt.strategy.checkpoint.save import save_directory
from lightning_memopt.strategy.export.inspect_command import main
from lightning_memopt.strategy.files.directory import CHECKSUMS, NOTE
from tests.strategy.export._saved import FORMATS, refused, save
from tests.strategy.files._faults import Hostile

FACTS = {"global_step": 7, "epoch": 1, "pytorch-lightning_version": "2.6.0"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"self_attn": nn.ModuleDict({"qkv_proj": nn.Linear(8, 24)}), "norm": nn.LayerNorm(8)})


def inspected(path, capsys, *options) -> dict:
    assert main([str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("format", FORMATS)
def test_it_says_what_a_checkpoint_holds(tmp_path, capsys, format):
    net = model()
    optimizer = lm.AdaPMLean(net.named_parameters(), lr=1e-3, rank=2)
    path = save(tmp_path / "last.ckpt", net, optimizer, format=format, **FACTS)
    found = inspected(path, capsys)
    assert (found["format"], found["ranks"]) == (format, 1 if format == "directory" else None)
    assert (found["step"], found["epoch"], found["lightning"], found["checksums"]) == (7, 1, "2.6.0", "verified")
    assert (found["weights"], found["parameters"], found["dtypes"]) == (4, 8 * 24 + 24 + 16, ["float32"])
    assert sum(found["files"].values()) == sum(
        entry.stat().st_size for entry in (path.iterdir() if path.is_dir() else [path]) if entry.name != NOTE
    )
    (saved,) = found["optimizers"]
    facts = {block.name: block for block in optimizer.snapshot().blocks}
    assert saved["recipes"] == ["adapm_lean"]
    assert {block["name"] for block in saved["blocks"]} == set(facts)
    for block in saved["blocks"]:
        fact = facts[block["name"]]
        assert (block["momentum"], block["rank"], block["second_moment"]) == (
            fact.momentum,
            fact.rank,
            fact.second_moment,
        )
        assert block["bytes"] == fact.momentum_bytes + fact.second_moment_bytes


def test_the_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    net = model()
    path = save(tmp_path / "last.ckpt", net, lm.AdaPMLean(net.named_parameters(), rank=2), format="directory", **FACTS)
    assert main([str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith(f"{path}: a directory of 3 files, ")
    assert lines[1:4] == [
        "step 7, epoch 1, saved by 1 rank, Lightning 2.6.0",
        "weights: 4 tensors, 232 elements, 928 B, float32",
        "checksums: verified",
    ]
    assert lines[4].startswith("optimizer 0: recipe adapm_lean, 4 parameters, ")
    assert "low_rank 2 factored 3 576 B" in lines
    assert "dense dense 3 320 B" in lines


def test_other_optimizers_and_none(tmp_path, capsys):
    net = model()
    save(tmp_path / "a.ckpt", net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), format="file")
    (saved,) = inspected(tmp_path / "a.ckpt", capsys)["optimizers"]
    assert (saved["recipes"], saved["learning_rates"]) == ([], [0.1])
    assert [(block["name"], block["momentum"], block["second_moment"]) for block in saved["blocks"]] == [
        (name, "momentum_buffer", "none") for name, _ in net.named_parameters()
    ]
    rate = torch.tensor(0.125)
    save(tmp_path / "c.ckpt", net, torch.optim.AdamW(net.parameters(), lr=rate), format="directory")
    (saved,) = inspected(tmp_path / "c.ckpt", capsys)["optimizers"]
    assert (saved["learning_rates"], {block["momentum"] for block in saved["blocks"]}) == ([0.125], {"dense"})
    save(tmp_path / "b.ckpt", net, format="directory")
    assert main([str(tmp_path / "b.ckpt")]) == 0
    assert "optimizer: none, the weights alone were saved" in capsys.readouterr().out


def test_damage_is_found_and_can_be_passed_over(tmp_path, capsys):
    path = save(tmp_path / "last.ckpt", model(), format="directory")
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is damaged: '__0_0.distcp' does not match its checksum" in refused(main, capsys, path)
    assert inspected(path, capsys, "--no-verify")["checksums"] == "not verified"
    assert "there is no file or directory of that name" in refused(main, capsys, tmp_path / "nothing")


def test_a_checkpoint_without_checksums_is_shown_without_a_warning(tmp_path, capsys, recwarn):
    path = save(tmp_path / "last.ckpt", model(), format="directory")
    rest = torch.load(path / "meta.pt", weights_only=True)
    rest.pop(CHECKSUMS)
    torch.save(rest, path / "meta.pt")
    assert main([str(path)]) == 0
    assert "checksums: none (another tool or an earlier version saved it)" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "checksums" in str(warning.message)]


def test_state_that_no_group_lists_is_an_error(tmp_path, capsys):
    """As a filter of Fabric may leave it."""
    states = [{"state": {"weight": {"exp_avg": torch.ones(2)}}}]
    save_directory({"state_dict": {"weight": torch.ones(2)}, "optimizer_states": states}, tmp_path / "last.ckpt")
    text = refused(main, capsys, tmp_path / "last.ckpt")
    assert "The checkpoint has optimizer state for parameter 'weight', which no group lists." in text


def test_nothing_is_run(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "callbacks": Hostile(tmp_path / "was-run")}, path)
    message = refused(main, capsys, path)
    assert "contains `os.system`, which is not allowed in a checkpoint" in message
    assert not (tmp_path / "was-run").exists()
    torch.save({"model": 1}, path)
    text = "has no key 'state_dict', it has 'model': it was not saved by Lightning"
    assert text in refused(main, capsys, path)
    with pytest.raises(ValueError, match=text):
        lm.load_weights(path)
