"""What AdaptiveMomentum decides: when, how many moves, and what a policy or a subclass may answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning.pytorch")

import lightning_memopt as lm
from lightning_memopt import AdaptiveMomentum
from lightning_memopt.optim.signals import BlockSignals
from tests.callbacks._adaptive import Module, Watch, dense_bytes, fit, kept_rank, moved, steps_of, trainer

pytestmark = pytest.mark.slow


class Noise(Module):
    """Its gradients are independent noise."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        return sum((param * torch.randn(param.shape, generator=generator)).sum() for param in self.parameters())


@pytest.mark.parametrize(("kind", "budget"), [(Module, 0.25), (Noise, None)])
@pytest.mark.parametrize("policy", ["energy", "benefit"])
def test_moves_settle(kind, budget, policy):
    """With a decision after every step; a block of pure noise stops once it has turned back twice."""
    module = kind()
    callback = AdaptiveMomentum(budget, policy, every_n_steps=1, freeze_after=None, max_moves=4)
    fit(module, callback, max_steps=90)
    counts = moved(callback)
    assert len(counts) == 90
    assert 0 < max(counts) <= 4
    assert sum(counts[75:]) == 0, counts


def test_when_decisions_are_due():
    def steps(**options: Any) -> list[int]:
        callback = AdaptiveMomentum(0.25, "energy", **options)
        fit(Module(layers=0), callback, max_steps=12)
        return steps_of(callback)

    assert steps(every_n_steps=2, freeze_after=7) == [0, 2, 4, 6]
    assert steps(every_n_steps=2, freeze_after=0.5) == [0, 2, 4]
    assert steps(every_n_steps=4, start=1, freeze_after=None) == [0, 1, 5, 9]
    assert steps(every_n_steps=3, freeze_after=1.0) == [0, 3, 6, 9]
    assert steps(every_n_steps=50) == [0]
    assert steps(every_n_steps=2, freeze_after=2) == [0]


def test_history_tells_what_happened():
    module = Module()
    callback = AdaptiveMomentum(0.2, "energy", every_n_steps=3, max_moves=2, freeze_after=None)
    fit(module, callback, max_steps=30)
    optimizer = module.optimizers(use_pl_optimizer=False)
    matrices = [block for block in optimizer.snapshot().blocks if len(block.shape) > 1]
    names = [block.name for block in matrices]
    assert sum(moved(callback)) > 0
    before = None
    for entry in callback.history:
        assert list(entry) == ["step", "moves", "ranks", "dense", "momentum_bytes", "oscillation", "residual"]
        assert list(entry["ranks"]) == names
        if before is not None:
            changed = {name: [before[name], rank] for name, rank in entry["ranks"].items() if rank != before[name]}
            assert entry["moves"] == changed
            assert len(changed) <= 2
            assert list(entry["oscillation"]) == list(entry["residual"]) == names
            assert all(-1 <= value <= 1 for value in entry["oscillation"].values())
            assert all(0 <= value <= 1 for value in entry["residual"].values())
        before = entry["ranks"]
    assert before == {block.name: kept_rank(block) for block in matrices}
    assert callback.history[-1]["momentum_bytes"] == optimizer.snapshot().momentum_bytes
    assert json.loads(json.dumps(callback.history)) == callback.history


class Rotates(AdaptiveMomentum):
    """Momentum goes from block to block."""

    def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
        assert {block.name for block in snapshot.blocks} >= set(signals)
        assert all(isinstance(entry, BlockSignals) for entry in signals.values())
        first, second = [name for name in signals if "mlp" in name]
        if self.history[-1]["ranks"][first]:
            return {first: {"momentum": "none"}, second: {"momentum": "low_rank", "rank": 2, "second_moment": "dense"}}
        return {second: {"momentum": "none"}, first: {"momentum": "subspace", "rank": 1}}


def test_a_subclass_decides():
    module = Module()
    callback, watch = Rotates(0.25, every_n_steps=2, freeze_after=None), Watch(int(0.25 * dense_bytes(module)))
    fit(module, callback, watch, max_steps=6)
    first, second = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    ranks = [(entry["ranks"][first], entry["ranks"][second]) for entry in callback.history[1:]]
    assert ranks == [(0, 2), (1, 0), (0, 2)]
    by_name = {block.name: block for block in module.optimizers().snapshot().blocks}
    assert (by_name[first].momentum, by_name[second].momentum) == ("none", "low_rank")
    assert (by_name[first].second_moment, by_name[second].second_moment) == ("factored", "dense")


def test_a_subclass_that_proposes_wrongly_is_told_so():
    class Greedy(AdaptiveMomentum):
        def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
            return {name: {"momentum": "dense"} for name in signals}

    class Mistaken(AdaptiveMomentum):
        def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
            return {"model.lm_head": {"momentum": "dense"}}

    class Forgetful(AdaptiveMomentum):
        def propose(self, snapshot: Any, signals: Any) -> Any:
            return None

    class Greedier(AdaptiveMomentum):
        def propose(self, snapshot: Any, signals: Any) -> dict[str, Any]:
            return {"mlp": {"rank": 16}, "*lm_head*": {"momentum": "dense"}}

    over_budget = r"changes that need .* of momentum, but the budget is .*\. Return smaller ranks, or raise"
    nothing = r"propose\(\) must return a mapping from names of blocks to changes.*, got None"
    for kind, match in ((Greedy, over_budget), (Greedier, over_budget), (Mistaken, "model.lm_h"), (Forgetful, nothing)):
        module, callback = Module(), kind(0.25, every_n_steps=2, freeze_after=None)
        made = trainer(callback, max_steps=4)
        with pytest.raises((ValueError, TypeError), match=match):
            made.fit(module)
        assert steps_of(callback) == [0]
        ranks = {block.name: kept_rank(block) for block in made.optimizers[0].snapshot().blocks if len(block.shape) > 1}
        assert ranks == callback.history[0]["ranks"]
    callback = Greedy(None, every_n_steps=2, freeze_after=None)
    fit(Module(), callback, max_steps=2)
    assert callback.history[-1]["momentum_bytes"] == dense_bytes(Module())


def test_policy_as_a_function():
    asked = []

    def policy(problem: Any) -> dict[str, int]:
        asked.append(problem)
        return {block.name: 1 + (block.role == "value") * (block.signals is not None) for block in problem.blocks}

    callback = AdaptiveMomentum(0.3, policy, every_n_steps=2, freeze_after=None)
    fit(Module(), callback, max_steps=6)
    assert all(rank == 1 for rank in callback.history[0]["ranks"].values())
    assert callback.history[-1]["ranks"] == {block.name: 1 + (block.role == "value") for block in asked[-1].blocks}
    assert [problem.progress for problem in asked] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    with pytest.raises(ValueError, match="requested changes that need"):
        fit(Module(), AdaptiveMomentum(0.3, lambda problem: {b.name: b.dense_rank for b in problem.blocks}))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda problem: {}, "None"),
        (lambda problem: None, "None"),
        (lambda problem: 3, "3"),
        (lambda problem: {block.name: 1.5 for block in problem.blocks}, "1.5"),
        (lambda problem: {block.name: -1 for block in problem.blocks}, "-1"),
        (lambda problem: {block.name: block.dense_rank + 1 for block in problem.blocks}, "[0-9]+"),
    ],
)
def test_a_policy_that_answers_wrongly_is_told_so(answer, found):
    with pytest.raises(
        ValueError, match=rf"The policy '<lambda>' returned {found} for '.*embed_tokens.*from 0 to [0-9]+"
    ):
        fit(Module(), AdaptiveMomentum(0.3, answer))


def test_after_an_exception_the_optimizer_is_let_go():
    class Failing(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 2:
                raise RuntimeError("no more")

    module = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        fit(module, AdaptiveMomentum(0.3))
    (optimizer,) = (module.optimizers(use_pl_optimizer=False),)
    assert not optimizer._optimizer_step_post_hooks


def frozen_galore(module: Module) -> lm.MemOpt:
    """It could train later."""
    module.model.lm_head.requires_grad_(False)
    kinds = {"momentum": "galore", "second_moment": "none"}
    return lm.AdaPMLean(module.named_parameters(), overrides={"*lm_head*": kinds})


def test_two_on_one_optimizer_are_refused():
    first, second = AdaptiveMomentum(0.15, optimizer_idx=0), AdaptiveMomentum(0.3, max_moves=4)
    with pytest.raises(ValueError, match="Two AdaptiveMomentum callbacks adapt the same optimizer: remove one"):
        fit(Module(), first, second)


@pytest.mark.parametrize(
    ("configure", "options", "match"),
    [
        (lambda m: torch.optim.AdamW(m.parameters()), {}, "optimizer 0: AdamW is not an optimizer of lightning_memopt"),
        (lambda m: lm.MemOpt(m.named_parameters(), "adafactor"), {}, "its recipe 'adafactor' has no momentum"),
        (lambda m: lm.AdaPMLean(m.named_parameters(), betas=(0.0, 0.9)), {}, "its beta1 is 0"),
        (lambda m: lm.AdaPMLean(m.model.norm.named_parameters()), {}, "it trains no matrix"),
        (lambda m: lm.AdaPMLean(list(m.parameters())), {}, "bind"),
        (lambda m: lm.AdaPMLean(m.named_parameters()), {"optimizer_idx": 1}, "`optimizer_idx` is 1, but the module"),
        (frozen_galore, {}, "the momentum 'galore' of 'model.lm_head.weight' holds a second moment"),
        (lambda m: None, {}, "_MockOptimizer is not an optimizer of lightning_memopt"),
    ],
    ids=["AdamW", "adafactor", "beta1", "vectors", "names", "index", "inner Adam, frozen", "none"],
)
@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned.*None")
def test_optimizers_that_cannot_be_adapted(configure, options, match, monkeypatch):
    seen = []
    monkeypatch.setattr(Module, "training_step", lambda self, *_: seen.append(1) or self.loss(0))
    with pytest.raises(ValueError, match=match):
        fit(Module(configure), AdaptiveMomentum(0.25, **options))
    assert not seen


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 1}, "`budget` 1 has no unit"),
        ({"budget": "5 apples"}, "`budget` must be"),
        ({"policy": "greedy"}, "Unknown policy 'greedy'"),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"start": 0}, "`start` must be"),
        ({"min_rank": 1.5}, "`min_rank` must be"),
        ({"max_moves": True}, "`max_moves` must be"),
        ({"quality": 0}, "`quality` must be"),
        ({"quality": "0.5"}, "`quality` must be"),
        ({"quality": True}, "`quality` must be"),
        ({"optimizer_idx": -1}, "`optimizer_idx` must be an index from 0 on, or None, got -1"),
        ({"optimizer_idx": "0"}, "`optimizer_idx` must be"),
        ({"budget": "1.0"}, "`budget` must be"),
        ({"budget": "1500.0"}, "`budget` must be"),
        ({"freeze_after": 0}, "`freeze_after` must be"),
        ({"freeze_after": 1}, "`freeze_after` 1 could mean one step or the whole training: write 1.0"),
        ({"freeze_after": True}, "`freeze_after` must be"),
        ({"freeze_after": 1.5}, "`freeze_after` must be"),
        ({"freeze_after": "30%"}, "`freeze_after` must be"),
        ({"dropped": "keep"}, "Unknown value of `dropped` 'keep'"),
    ],
    ids=str,
)
def test_values_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        AdaptiveMomentum(**options)


@pytest.mark.parametrize(("name", "match"), [("budget", "`budget` 1 has no unit"), ("freeze_after", "could mean one")])
def test_one_means_the_same_in_yaml_and_python(name, match, tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AdaptiveMomentum, "adaptive")
    parser.add_argument("--config", action="config")
    config = tmp_path / "config.yaml"
    for text in ("1", "1.0"):
        config.write_text(f"adaptive:\n  {name}: {text}\n")
        for given in (["--config", str(config)], [f"--adaptive.{name}", text]):
            value = getattr(parser.parse_args(given).adaptive, name)
            assert type(value) is type(json.loads(text))
            if text == "1.0":
                assert getattr(AdaptiveMomentum(**{name: value}), name) == 1.0
                continue
            with pytest.raises(ValueError, match=match):
                AdaptiveMomentum(**{name: value})
