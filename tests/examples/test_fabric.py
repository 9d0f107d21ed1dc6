import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_memopt as lm
from tests._commands import run_python
from tests._ranks import run_ranks
from tests.examples._run import ROOT
from tests.strategy._training import Spawned

pytestmark = pytest.mark.slow


def sequences(texts: Path) -> int:
    """Return how many training sequences there are."""
    from examples.pretrain.data import TextDataModule

    data = TextDataModule(str(texts), vocab_size=300, seq_len=16)
    data.setup()
    return len(data.tokens["train"])


def test_fabric_trains_on_two_processes_and_continues_on_one(texts, capsys, monkeypatch):
    from examples.fabric.train import main

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the second process, which Fabric starts
    args = [f"--root={texts}", "--vocab-size=300", "--seq-len=16", "--batch-size=2", "--hidden-size=16"]
    first = run_python("-m", "examples.fabric.train", *args, "--steps=20", "--devices=2")
    assert first.returncode == 0, first.stderr[-3000:]
    assert re.search(r"step    20  loss \d\.\d+\nvalidation loss \d\.\d+\nsaved to runs/fabric.ckpt", first.stdout)
    assert first.stdout.count("embed_tokens") == first.stdout.count("validation loss") == 1, "rank 0 alone prints"
    # 20 steps of 2 batches of 2 sequences on each of 2 processes. Each of them has given out its own.
    place = torch.load(Path("runs") / "fabric.ckpt" / "meta.pt", weights_only=True)["data"]
    per_epoch = 4 * (sequences(texts) // 4)
    assert place["epoch"] * per_epoch + place["examples"] == 160
    main([*args, "--steps=22", "--devices=1"])
    assert capsys.readouterr().out.startswith("continuing after step 20\nvalidation loss")
    assert "model.embed_tokens.weight" in lm.load_weights(Path("runs") / "fabric.ckpt")


def shares(rank: int, world_size: int) -> list[dict[str, int]]:
    """Return this rank's share of the data: where all ranks have data of their own, and where two compute together."""
    from lightning.fabric import Fabric

    from examples.pretrain.order import data_ranks

    found = []
    for size in (1, 2):
        strategy = lm.MemOptFabricStrategy(tensor_parallel_size=size)
        fabric = Fabric(strategy=strategy, accelerator="cpu", devices=world_size, plugins=[Spawned()])
        fabric.launch()
        found.append(data_ranks(fabric.strategy))
    return found


def test_ranks_that_compute_together_get_the_same_data():
    alone, together = zip(*run_ranks(shares, 2), strict=True)
    assert alone == ({"num_replicas": 2, "rank": 0}, {"num_replicas": 2, "rank": 1})
    assert together == ({"num_replicas": 1, "rank": 0},) * 2


def test_without_a_strategy_of_several_processes_one_has_all_data():
    from examples.pretrain.order import data_ranks

    for of in (None, SimpleNamespace(distributed_sampler_kwargs=None)):
        assert data_ranks(of) == {"num_replicas": 1, "rank": 0}
