"""Whoever gives a checkpoint directory to something that reads files learns what to do."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule, Trainer

from lightning_memopt._explaining import _PLACES, explain_directories
from lightning_memopt._registration import register_with_lightning
from lightning_memopt.strategy.files.directory import NOTE
from tests.strategy.export._saved import save


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(2, 2))


@pytest.fixture
def path(tmp_path):
    return save(tmp_path / "last one.ckpt", Module(), format="directory", global_step=0)


def explained(error) -> bool:
    (note,) = error.value.__notes__
    assert re.search(r"'.*last one.ckpt' is one checkpoint, and a folder: the strategy memopt_fsdp saved it", note)
    return "lightning-memopt export '" in note and "one.ckpt --optimizer" in note and "lightning-memopt inspect" in note


def test_a_trainer_and_load_from_checkpoint_name_the_command(path, tmp_path):
    explain_directories()  # again
    with pytest.raises(IsADirectoryError, match="Is a directory") as error:
        Module.load_from_checkpoint(path)
    assert explained(error)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, default_root_dir=tmp_path, **quiet)
    with pytest.raises(IsADirectoryError, match="Is a directory") as error:
        trainer.fit(Module(), ckpt_path=path)
    assert explained(error)


def test_so_does_one_at_a_url():
    url = "memory://explained/last one.ckpt"
    save(url, Module(), format="directory")
    with pytest.raises((IsADirectoryError, FileNotFoundError)) as error:
        Module.load_from_checkpoint(url)
    assert explained(error)
    with pytest.raises((IsADirectoryError, FileNotFoundError)) as error:
        Module.load_from_checkpoint("memory://explained")
    assert not hasattr(error.value, "__notes__")


def test_other_directories_are_not_explained(tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        Module.load_from_checkpoint(tmp_path)
    assert not hasattr(error.value, "__notes__")


def test_the_folder_explains_itself_to_whoever_uses_torch_load(path, tmp_path):
    note = (path / NOTE).read_text()
    assert note.startswith("'last one.ckpt' is one checkpoint, and a folder")
    assert "lightning-memopt export 'last one.ckpt' weights.safetensors" in note
    dcp_to_torch_save(path, tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt")["state_dict"].keys() == {"layer.weight", "layer.bias"}


def test_an_import_before_this_package_is_covered(monkeypatch):
    """The other order is in `test_registration`, in a process of its own."""
    for module, name in _PLACES:
        monkeypatch.setattr(sys.modules[module], name, getattr(sys.modules[module], name).__wrapped__)
    register_with_lightning()
    assert all(hasattr(getattr(sys.modules[module], name), "__wrapped__") for module, name in _PLACES)
