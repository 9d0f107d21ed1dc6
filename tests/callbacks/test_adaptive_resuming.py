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
from tests.callbacks._adaptive import Module, StopsAt, Watch, dense_bytes, fit, moved, steps_of, trainer, weights

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


class SavesFirst(Callback):
    """Saves at the end of some batches, before the callbacks that come after it."""

    def __init__(self, *steps: int, path: Any) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path / f"first {trainer.global_step}.ckpt")


def scheduled(module: Module) -> Any:
    """Released momentum moves weights by the rate of its moment."""
    optimizer = lm.AdaPMLean(module.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_decision_that_was_due_when_an_earlier_callback_saved(tmp_path):
    """Step 10 has a decision with moves, and step 13 has none; from step 27 on everything is frozen."""
    whole, one = Module(scheduled), adaptive()
    fit(whole, SavesFirst(10, 13, 27, path=tmp_path), one, max_steps=30)
    assert moved(one)[2] > 0
    assert steps_of(one)[3] == 10
    for step in (10, 13, 27):
        resumed, other = Module(scheduled), adaptive()
        fit(resumed, other, max_steps=30, ckpt_path=tmp_path / f"first {step}.ckpt")
        assert other.history == one.history, step
        assert_equal(weights(resumed), weights(whole))


def evenly(budget: float) -> dict[str, int]:
    fit(Module(), callback := adaptive("uniform", budget), max_steps=1)
    return callback.history[0]["ranks"]


@pytest.mark.parametrize("policy", ["energy", "uniform"])
def test_another_budget_after_the_freeze(tmp_path, policy):
    """It is divided at once, by the signals from before the freeze."""
    options = {"policy": policy, "freeze_after": 7}
    fit(Module(), saved := adaptive(**options), StopsAt(12, path=tmp_path), max_steps=30)
    for budget in (0.5, 0.15):
        watch = Watch(int(budget * dense_bytes(Module())))
        other = adaptive(budget=budget, **options)
        fit(Module(), other, watch, max_steps=14, ckpt_path=tmp_path / "12.ckpt")
        assert other.history[:-1] == saved.history
        assert other.history[-1]["step"] == 12
        assert watch.sizes[0] > 0.85 * watch.budget
        assert (other.history[-1]["ranks"] == evenly(budget)) == (policy == "uniform")
    same = adaptive(budget="25%", **options)
    fit(Module(), same, max_steps=14, ckpt_path=tmp_path / "12.ckpt")
    assert same.history == saved.history


def test_another_quality_after_the_freeze(tmp_path):
    options = {"budget": None, "freeze_after": 7}
    fit(Module(), saved := adaptive(quality=0.3, **options), StopsAt(12, path=tmp_path), max_steps=30)
    for quality in (0.3, 0.9):
        other = adaptive(quality=quality, **options)
        fit(Module(), other, max_steps=14, ckpt_path=tmp_path / "12.ckpt")
        assert (other.history == saved.history) == (quality == 0.3)
    assert other.history[-1]["step"] == 12
    assert sum(other.history[-1]["ranks"].values()) > sum(saved.history[-1]["ranks"].values())


def test_another_policy_that_divides_once_divides_at_once(tmp_path):
    fit(Module(), adaptive("energy"), StopsAt(12, path=tmp_path), max_steps=30)
    for policy in ("uniform", "energy"):
        other = adaptive(policy)
        fit(Module(), other, max_steps=20, ckpt_path=tmp_path / "12.ckpt")
        assert (12 in steps_of(other)) == (policy == "uniform")
        if policy == "uniform":
            assert other.history[-1]["ranks"] == evenly(0.25)
            assert not any(entry["moves"] for entry in other.history if entry["step"] > 12)


@pytest.mark.parametrize("recipe", ["adamw", "adapm_lean"])
def test_signals_of_the_freeze_last_until_the_probe_has_caught_up(tmp_path, recipe):
    """Its M is that of the freeze, the optimizer's is later."""
    options = {"every_n_steps": 2, "budget": 0.9}
    fit(Module(recipe), adaptive(**options, freeze_after=6), StopsAt(9, path=tmp_path), max_steps=40)
    other = adaptive(**options, freeze_after=None)
    fit(Module(recipe), other, max_steps=60, ckpt_path=tmp_path / "9.ckpt")
    after = {entry["step"]: entry["residual"] for entry in other.history if entry["step"] >= 4}
    assert after[10] == after[52]  # 44 steps to catch up
    assert after[54] != after[10]


def test_a_checkpoint_that_is_only_validated_changes_nothing(tmp_path):
    fit(Module(), StopsAt(6, path=tmp_path), adaptive(), max_steps=12)
    plain, fresh = adaptive(), adaptive()
    fit(Module(), plain, max_steps=10)
    made = trainer(fresh, max_steps=10, limit_val_batches=1)
    made.validate(module := Module(), ckpt_path=tmp_path / "6.ckpt", verbose=False)
    assert fresh.history == []
    made.fit(module)
    assert steps_of(fresh) == steps_of(plain)
    before = list(fresh.history)
    made.validate(module, ckpt_path=tmp_path / "6.ckpt", verbose=False)
    assert fresh.history == before


def test_a_training_that_fails_before_its_first_step_leaves_nothing_behind(tmp_path):
    class Fails(Callback):
        def on_train_start(self, *args: Any) -> None:
            raise RuntimeError("not yet")

    fit(Module(), StopsAt(6, path=tmp_path), adaptive(), max_steps=12)
    callback, plain = adaptive(), adaptive()
    with pytest.raises(RuntimeError, match="not yet"):
        fit(Module(), Fails(), callback, max_steps=10, ckpt_path=tmp_path / "6.ckpt")
    fit(Module(), callback, max_steps=10)
    fit(Module(), plain, max_steps=10)
    assert callback.history == plain.history


def test_a_callback_that_is_added_after_the_freeze_says_so(tmp_path, capsys):
    fit(Module(), StopsAt(8, path=tmp_path), max_steps=24)
    for freeze_after, words in (
        (0.3, "changes nothing later: training is past `freeze_after`."),
        (0.5, "from step 2 until step 4."),
    ):
        capsys.readouterr()
        callback = adaptive(freeze_after=freeze_after)
        fit(Module(), callback, max_steps=24, ckpt_path=tmp_path / "8.ckpt")
        first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("AdaptiveMomentum"))
        assert first.endswith(words)
        assert steps_of(callback) == ([0] if freeze_after == 0.3 else [0, 2])


def test_a_smaller_budget_is_divided_by_the_signals(tmp_path):
    fit(Module(), adaptive(), StopsAt(13, path=tmp_path), max_steps=30)
    lower = adaptive(budget=0.15)
    fit(Module(), lower, max_steps=14, ckpt_path=tmp_path / "13.ckpt")
    entry = lower.history[-1]
    assert entry["step"] == 13
    assert entry["oscillation"]
    assert entry["ranks"] != evenly(0.15)


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """It did not say which steps had been seen, nor what the budget was."""
    fit(Module(), one := adaptive(), StopsAt(13, path=tmp_path), max_steps=30)
    saved = torch.load(tmp_path / "13.ckpt", weights_only=True)
    state = next(state for key, state in saved["callbacks"].items() if "Adaptive" in key)
    for key in ("seen", "budget", "quality"):
        del state[key]
    torch.save(saved, tmp_path / "old.ckpt")
    fit(Module(), other := adaptive(), max_steps=14, ckpt_path=tmp_path / "old.ckpt")
    assert other.history[: len(one.history)] == one.history
    assert steps_of(other) == [0, 2, 6, 10]


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
