import re
import shutil
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

SMALL = ("--model=llama-1m", "--vocab-size=300", "--seq-len=16", "--batch-size=8", "--steps=20", "--save-every=10")


def sequences(texts: Path) -> int:
    """Return how many training sequences there are."""
    from examples.pretrain.data import TextDataModule

    data = TextDataModule(str(texts), vocab_size=300, seq_len=16)
    data.setup()
    return len(data.tokens["train"])


def printed(text: str) -> dict[str, float]:
    """Return the printed losses, by what stands before them."""
    return {name: float(loss) for name, loss in re.findall(r"^(.*) loss (\d+\.\d{4})$", text, flags=re.MULTILINE)}


def test_two_processes_then_one_train_as_two_do(texts, tmp_path, capsys, monkeypatch):
    from examples.fabric.train import main

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the second process, which Fabric starts
    recipe = ROOT / "examples" / "pretrain" / "recipe.yaml"
    args = [f"--root={texts}", *SMALL, f"--recipe={recipe}"]
    first = run_python("-m", "examples.fabric.train", *args, "--devices=2", f"--folder={tmp_path / 'whole'}")
    assert first.returncode == 0, first.stderr[-3000:]
    losses = printed(first.stdout)
    assert list(losses) == ["step    10 ", "step    20 ", "validation"]
    assert first.stdout.count("embed_tokens") == first.stdout.count("validation") == 1, "rank 0 alone prints"
    assert re.search(r"layers.0.self_attn.q_proj.weight .* dense +factored ", first.stdout), "as the recipe file says"
    halfway, end = (tmp_path / "whole" / f"step-000000{step}.ckpt" for step in (10, 20))
    # 10 steps of 8 sequences.
    place = torch.load(halfway / "meta.pt", weights_only=True)["data"]
    assert place["epoch"] * (4 * (sequences(texts) // 4)) + place["examples"] == 80

    moved = tmp_path / "moved"
    shutil.copytree(halfway, moved / halfway.name)
    capsys.readouterr()
    main([*args, "--devices=1", f"--folder={moved}"])
    second = capsys.readouterr().out
    assert second.startswith("continuing after step 10\nstep    20  loss ")
    assert printed(second)["step    20 "] == pytest.approx(losses["step    20 "], abs=1.5e-4), "the last digit at most"
    torch.testing.assert_close(lm.load_weights(moved / end.name), lm.load_weights(end), rtol=1e-4, atol=1e-5)
    before, after = (lm.load_weights(path)["lm_head.weight"] for path in (halfway, end))
    assert not torch.allclose(before, after, atol=1e-3)


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
