"""A resumed run decides as an uninterrupted one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum
from lightning_memopt.optim.signals import Probe
from tests._compare import assert_equal
from tests.callbacks._adaptive import Module, StopsAt, Watch, dense_bytes, fit, moved, steps_of, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


def adaptive(policy: str = "energy", budget: Any = 0.25, **options: Any) -> AdaptiveMomentum:
    return AdaptiveMomentum(budget, policy, **{"every_n_steps": 4, "start": 2, "freeze_after": 0.9, **options})


@pytest.mark.parametrize(("policy", "recipe"), [("energy", "adapm_lean"), ("benefit", "adam_snsm")])
def test_a_resumed_run_decides_as_an_uninterrupted_one(tmp_path, policy, recipe):
    """Also after it was frozen, and with nothing left to do."""
    whole, one = Module(recipe), adaptive(policy)
    fit(whole, one, max_steps=30)
    stopped = adaptive(policy)
    fit(Module(recipe), stopped, StopsAt(13, path=tmp_path), max_steps=30)
    assert steps_of(stopped) == [0, 2, 6, 10]
    for step in (13, 28, 30):
        resumed, other = Module(recipe), adaptive(policy)
        watch = Watch(int(0.25 * dense_bytes(resumed)))
        fit(resumed, other, watch, StopsAt(28, 30, path=tmp_path), max_steps=30, ckpt_path=tmp_path / f"{step}.ckpt")
        assert other.history == one.history
        assert_equal(weights(resumed), weights(whole))
    assert steps_of(one) == [0, 2, 6, 10, 14, 18, 22, 26]
    assert sum(moved(one)[:3]) > 0


def test_resuming_with_another_budget_or_without_the_callback(tmp_path, capsys):
    with_it, without = tmp_path / "with" / "7.ckpt", tmp_path / "without" / "7.ckpt"
    fit(Module(), saved := adaptive(), StopsAt(7, path=with_it.parent), max_steps=30)
    fit(Module(), StopsAt(7, path=without.parent), max_steps=30)
    dense = dense_bytes(Module())

    lower, watch = adaptive(budget=0.15), Watch(int(0.15 * dense))
    capsys.readouterr()
    fit(Module(), lower, watch, max_steps=12, ckpt_path=with_it)
    out = capsys.readouterr().out
    assert "AdaptiveMomentum resumes after step 7 with " in out
    assert "; policy energy may change up to 8 blocks every 4 steps, from step 2 until step " in out
    assert lower.history[: len(saved.history)] == saved.history
    assert steps_of(lower) == [0, 2, 6, 7, 10]
    assert watch.sizes[0] > 0.1 * dense
    with pytest.raises(ValueError, match="`budget` is 1000 bytes"):
        fit(Module(), adaptive(budget=1000), max_steps=12, ckpt_path=with_it)

    higher = adaptive(budget=0.5)
    fit(Module(), higher, Watch(int(0.5 * dense)), max_steps=12, ckpt_path=with_it)
    assert higher.history[: len(saved.history)] == saved.history
    assert higher.history[-1]["momentum_bytes"] > saved.history[-1]["momentum_bytes"]

    late, watch = adaptive(), Watch(int(0.25 * dense))
    fit(Module(), late, watch, max_steps=12, ckpt_path=without)
    assert steps_of(late) == [0, 2]
    module, watch = Module(), Watch()
    fit(module, watch, max_steps=12, ckpt_path=with_it)
    assert set(watch.sizes) == {saved.history[-1]["momentum_bytes"]}, "the allocation is the optimizer's"


def test_a_checkpoint_of_the_very_first_moment(tmp_path):
    """Another callback may save before this one has begun, also in a resumed run: what it brought is not lost."""

    class SavesAtOnce(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")

    fit(Module(), one := adaptive(), StopsAt(7, path=tmp_path), max_steps=30)
    fit(Module(), SavesAtOnce(), adaptive(), max_steps=8, ckpt_path=tmp_path / "7.ckpt")
    other = adaptive()
    fit(Module(), other, max_steps=8, ckpt_path=tmp_path / "again.ckpt")
    assert other.history[:3] == one.history
    fit(Module(), SavesAtOnce(), adaptive(), max_steps=1)
    fit(Module(), fresh := adaptive(), max_steps=3, ckpt_path=tmp_path / "again.ckpt")
    assert steps_of(fresh) == [0, 2]


def test_the_state_is_numbers_and_tensors(tmp_path):
    fit(Module(), callback := adaptive(freeze_after=None), max_steps=13)
    state = callback.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["history"] == callback.history
    probe = Probe(lm.AdaPMLean(Module().named_parameters()))
    probe.load_state_dict(loaded["probe"])
    assert probe.steps == 13
