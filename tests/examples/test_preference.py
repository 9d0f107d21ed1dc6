import ast
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.distributed.tensor import DTensor

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import lightning_memopt as lm
from tests._ranks import run_ranks
from tests.examples._run import EXAMPLES, RECIPES, configs, fit_on_ranks
from tests.strategy._training import Spawned

pytestmark = pytest.mark.slow

METHODS = ("dpo", "remax")
QUIET_TRAINER: dict[str, Any] = {
    "max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
BODIES = (
    "total = first + second\n    return total",
    "if first < second:\n        return first\n    return second",
    "values = [first, second]\n    return values and first",
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a folder of 40 Python files with one documented function each."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(40):
        body = BODIES[number % 3]
        text = f'import os\n\n\ndef f{number}(first, second):\n    """Do it."""\n    {body}\n\n\nX = {number}\n'
        (folder / f"part{number}.py").write_text(text)
    return folder


@pytest.fixture
def small(transformers_folder: Path, sources: Path) -> dict[str, list[str]]:
    """Return the arguments that make the two methods quick."""
    both = [f"--model.path={transformers_folder}", f"--data.root={sources}",
            "--data.batch_size=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=3"]  # fmt: skip
    return {"dpo": [*both, "--data.max_length=96"], "remax": [*both, "--model.max_new_tokens=6"]}


@pytest.fixture
def tokenizer(transformers_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(transformers_folder)


def attached(data: Any, tokenizer: Any, ranks: int = 1, rank: int = 0) -> Any:
    """Return a data module as a Trainer with a model's tokenizer sets it up, on one of some ranks."""
    sampler = {"num_replicas": ranks, "rank": rank}
    module = SimpleNamespace(tokenizer=tokenizer)
    data.trainer = SimpleNamespace(lightning_module=module, distributed_sampler_kwargs=sampler)
    data.setup()
    return data


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("method", "recipe"),
    [*((method, None) for method in METHODS), *itertools.product(METHODS, RECIPES)],
)
def test_every_config_trains(method, recipe, small, fit):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = [f"preference/{method}.yaml", *([f"preference/{method}_{recipe}.yaml"] if recipe else [])]
    cli = fit(*configs(*files), *small[method])
    assert cli.trainer.global_step == 3
    logged = {"dpo": ("train_loss", "val_loss", "val_accuracy", "val_margin", "val_kl"),
              "remax": ("train_reward", "train_greedy_reward", "train_kl", "val_reward", "val_kl")}[method]  # fmt: skip
    assert all(cli.trainer.callback_metrics[name].isfinite() for name in logged)
    if method == "dpo":  # a policy whose completions all earn nothing stays where it is
        assert cli.trainer.callback_metrics["val_kl"] > 0
    (optimizer,) = cli.trainer.optimizers
    given = [param for group in optimizer.param_groups for param in group["params"]]
    frozen = set(cli.model.reference.parameters())
    assert frozen <= set(given) == set(cli.model.parameters()), "the command line passes all parameters"
    assert not frozen & {param for param, state in optimizer.state.items() if state}
    if isinstance(optimizer, lm.MemOpt):
        assert all(block.name.startswith("model.") for block in optimizer.snapshot().blocks)
    started = type(cli.model)(cli.model.hparams.path).reference
    for param, before in zip(cli.model.reference.parameters(), started.parameters(), strict=True):
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        torch.testing.assert_close(whole, before.detach(), rtol=0, atol=0)
    # What is left for transformers is the policy, not the reference.
    saved = AutoModelForCausalLM.from_pretrained(f"runs/{method}/model").state_dict()
    for name, value in lm.full_state_dict(cli.model.model).items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(f"runs/{method}/model").get_vocab() == cli.model.tokenizer.get_vocab()
    # Weights of one process: the policy's and the reference's.
    bytes_of_one = sum(param.numel() * param.element_size() for param in started.parameters())
    written = json.loads(next(Path(f"runs/{method}").rglob("memory.json")).read_text())
    assert written["history"][-1]["parameter_bytes"] == 2 * bytes_of_one


def test_both_start_from_the_model_that_the_first_command_pretrains(small, sources, fit):
    tiny = ["--data.vocab_size=300", "--model.vocab_size=300", "--trainer.limit_val_batches=0"]
    tiny += [f"--data.root={sources}", "--data.batch_size=2", "--trainer.max_steps=1"]
    pretraining = fit(*configs("pretrain/pretrain.yaml", "preference/pretrain.yaml"), *tiny)
    assert pretraining.datamodule.max_chars is None
    pretrained = lm.full_state_dict(pretraining.model.model)
    for method in METHODS:
        given = [arg for arg in small[method] if not arg.startswith("--model.path")]
        policy = fit(*configs(f"preference/{method}.yaml"), *given, "--trainer.max_steps=1").model
        for name, weight in lm.full_state_dict(policy.reference).items():
            torch.testing.assert_close(weight, pretrained[name], rtol=0, atol=0)
    assert not Path("runs/pretrain").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_config_has_the_optimizer_of_its_recipe(method):
    def optimizer(name):
        return yaml.safe_load((EXAMPLES / "preference" / name).read_text())["optimizer"]

    assert optimizer(f"{method}.yaml") == optimizer(f"{method}_adapm_lean.yaml")


def test_a_resumed_run_is_the_run_that_was_not_interrupted(small, fit):
    config = [*configs("preference/dpo.yaml"), *small["dpo"], "--lr_scheduler.decay=constant"]
    config.append("--trainer.limit_val_batches=0")
    whole = fit(*config, "--trainer.max_steps=4", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false")
    fit(*config, "--trainer.max_steps=2")
    resumed = fit(*config, "--trainer.max_steps=4", "--ckpt_path=runs/dpo/checkpoints/last.ckpt")
    assert resumed.trainer.global_step == 4
    expected = lm.full_state_dict(whole.model)
    for name, value in lm.full_state_dict(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def on_two_ranks(rank: int, world_size: int, commands: list[list[str]], runs: str, folder: str, sources: str) -> dict:
    """Run the commands, and draw."""
    return {"trained": fit_on_ranks(rank, world_size, commands, runs)} | drawn(folder, sources, world_size, [Spawned()])


def drawn(folder: str, sources: str, ranks: int, plugins: Sequence[Any] = ()) -> dict:
    """Return the tokens that this rank samples for its prompts, and the bytes of weights that it holds."""
    from lightning.pytorch import Trainer

    from examples.preference.prompts import PromptDataModule
    from examples.preference.remax import ReMax

    class Watched(ReMax):
        def training_step(self, batch, batch_idx):
            seen.append((batch.texts, self.roll_out(batch, 0)))
            return super().training_step(batch, batch_idx)

    seen: list = []
    module = Watched(folder, max_new_tokens=5)
    data = PromptDataModule(root=sources, batch_size=4 // ranks)
    module.configure_optimizers = lambda: lm.AdaPMLean(module.parameters(), lr=1e-3)
    trainer = Trainer(accelerator="cpu", devices=ranks, strategy="memopt_fsdp", plugins=list(plugins), **QUIET_TRAINER)
    trainer.fit(module, data)
    memory = lm.take_snapshot(trainer.optimizers, module).memory
    texts, (sequences, _, _) = seen[0]
    tokens = {text: row[-5:].tolist() for text, row in zip(texts, sequences.tokens, strict=True)}
    return {"drawn": tokens, "parameters": memory.parameters}


def test_two_ranks_train_every_recipe_and_draw_what_one_process_draws(small, transformers_folder, sources, tmp_path):
    runs = [("dpo", "adamw"), ("dpo", "adapm"), ("remax", "adapm_lean"), ("remax", "adam_snsm")]
    assert {recipe for _, recipe in runs} == set(RECIPES)
    commands = [
        [*configs(f"preference/{method}.yaml", f"preference/{method}_{recipe}.yaml"), *small[method]]
        for method, recipe in runs
    ]
    commands[-1] += [
        "--trainer.strategy=lightning_memopt.MemOptFSDPStrategy",
        "--trainer.strategy.activation_checkpointing=true",
        "--trainer.accumulate_grad_batches=2",
    ]
    where = (str(transformers_folder), str(sources))
    two = run_ranks(on_two_ranks, 2, commands, str(tmp_path), *where)
    for found in zip(*(rank["trained"] for rank in two), strict=True):
        assert [each["steps"] for each in found] == [3, 3]
        assert all(each["sharded"] == 1 for each in found)
        assert found[0]["metrics"] == found[1]["metrics"], "metrics are means over ranks"
    one = drawn(*where, ranks=1)
    assert [len(each["drawn"]) for each in two] == [2, 2]
    assert two[0]["drawn"] | two[1]["drawn"] == one["drawn"]
    assert {each["parameters"] for each in two} == {one["parameters"] / 2}, "policy and reference are sharded"


# ---------------------------------------------------------------------- losses


def test_dpo_loss_is_equation_7(transformers_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    from examples.preference.dpo import dpo_loss
    from examples.preference.log_probs import completion_logits, kl_divergence, log_probs
    from examples.preference.pairs import PairDataModule, Preference

    texts = [("def f():\n", "    return 1\n", "    return\n"), ("def add(a, b):\n", "    a\n", "    return a + b\n")]
    batch = PairDataModule().collate([Preference(*(tokenizer(text).input_ids for text in pair)) for pair in texts])
    policy, reference = (AutoModelForCausalLM.from_pretrained(transformers_folder).double().eval() for _ in range(2))
    with torch.no_grad():
        for param in policy.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    logits = [completion_logits(model, batch) for model in (policy, reference)]
    losses, margins = dpo_loss(*(log_probs(each, batch).view(-1, 2) for each in logits), 0.1)
    kl = kl_divergence(*logits, batch)
    for number, (prompt, *completions) in enumerate(texts):
        ratios = []
        for which, completion in enumerate(completions):
            start, ids = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
            tokens = torch.tensor([start + ids])
            both = [F.log_softmax(m(tokens).logits[0, len(start) - 1 : -1], -1) for m in (policy, reference)]
            sums = [each[range(len(ids)), ids].sum() for each in both]
            ratios.append(sums[0] - sums[1])
            exact = (both[0].exp() * (both[0] - both[1])).sum()
            torch.testing.assert_close(kl[2 * number + which].double(), exact, rtol=1e-4, atol=1e-6)
        margin = 0.1 * (ratios[0] - ratios[1])
        torch.testing.assert_close(margins[number].double(), margin, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses[number].double(), -torch.log(torch.sigmoid(margin)), rtol=1e-4, atol=1e-6)


def test_dpo_starts_at_log_2_and_moves_towards_the_chosen():
    from examples.preference.dpo import dpo_loss

    reference = torch.tensor([[-3.0, -2.0]])
    policy = reference.clone().requires_grad_()
    losses, margins = dpo_loss(policy, reference, 0.1)
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(2))
    assert margins.item() == 0
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.05, 0.05]]))


def test_policy_gradient_is_that_of_the_expected_reward():
    """With one token to draw, REINFORCE with a baseline has the gradient of the expected reward as its mean."""
    from examples.preference.log_probs import Sequences, log_probs

    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.25], dtype=torch.float64)
    probs = logits.softmax(-1).squeeze(0)
    (exact,) = torch.autograd.grad(-(probs * reward).sum(), logits, retain_graph=True)
    mean = torch.zeros_like(logits)
    baseline = reward[probs.argmax()]
    for token in range(5):
        row = Sequences(torch.tensor([[0, token]]), torch.ones(1, 2), torch.tensor([[False, True]]))
        (grad,) = torch.autograd.grad(-(reward[token] - baseline) * log_probs(logits, row).sum(), logits)
        mean += probs[token].detach() * grad
    torch.testing.assert_close(mean, exact)


def test_remax_learns_what_is_rewarded(transformers_folder, sources, monkeypatch):
    """The reward is the share of even tokens, which an untrained policy draws half of the time."""
    from lightning.pytorch import Trainer

    from examples.preference.prompts import PromptDataModule
    from examples.preference.remax import ReMax

    def evens(self, texts, completions):
        return torch.full((len(texts),), completions.shape[1]), (completions % 2 == 0).float().mean(-1)

    monkeypatch.setattr(ReMax, "_score", evens)
    module = ReMax(str(transformers_folder), max_new_tokens=2)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=3e-2)
    trainer = Trainer(accelerator="cpu", **{**QUIET_TRAINER, "max_steps": 40})
    trainer.fit(module, PromptDataModule(root=str(sources), batch_size=16))
    assert trainer.callback_metrics["train_reward"] > 0.9


# ---------------------------------------------------------------------- sampling


def test_sampling_with_a_cache_and_padding_is_that_without(transformers_folder):
    from transformers import AutoModelForCausalLM

    from examples.preference.sampling import inverse_cdf, sample_and_decode_greedily, uniforms
    from examples.pretrain.decoding import padded

    model = AutoModelForCausalLM.from_pretrained(transformers_folder).eval()
    rows = [[5, 6, 7, 8, 9], [50, 60]]
    randoms = uniforms(0, 3, ["a", "b"], 7)
    sampled, greedy = sample_and_decode_greedily(model, *padded(rows, left=True), randoms)
    for number, row in enumerate(rows):
        drawn, best = list(row), list(row)
        with torch.no_grad():
            for random in randoms[number]:
                drawn.append(int(inverse_cdf(model(torch.tensor([drawn])).logits[:, -1], random.view(1))))
                best.append(int(model(torch.tensor([best])).logits[0, -1].argmax()))
        assert sampled[number].tolist() == drawn[len(row) :]
        assert greedy[number].tolist() == best[len(row) :]


def test_inverse_cdf_draws_from_the_distribution():
    from examples.preference.sampling import inverse_cdf

    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(1000, 4)
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert inverse_cdf(logits, numbers).bincount(minlength=4).tolist() == [500, 0, 300, 200]
    assert inverse_cdf(logits[:1], torch.zeros(1, dtype=torch.float64)).item() == 0


def test_random_numbers_depend_on_the_prompt_and_not_on_its_place():
    from examples.preference.sampling import uniforms

    first, second = uniforms(0, 1, ["a", "b"], 4)
    torch.testing.assert_close(uniforms(0, 1, ["b", "a"], 4), torch.stack([second, first]), rtol=0, atol=0)
    others = [first, second, uniforms(0, 2, ["a"], 4)[0], uniforms(1, 1, ["a"], 4)[0]]
    assert len({tuple(each.tolist()) for each in others}) == 4


# ---------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("body", "reward"),
    [
        ("    return 1\n", 1.0),
        ("    x = '\\d'\n\n    # a comment\n    return x\n", 1.0),
        ("", 0.0),
        ("    # nothing\n", 0.0),
        ("    return )\n", 0.0),
        ("    x = 1\n    y = 2\n    return )\n    pass\n", 0.5),
        ("    x = 1\n\n\n\n    return )\n", 0.5),
        ("        x = 1\n", 0.0),
        ("    x = 1\n    if x:\n", 0.5),
        ("    x = '\0'\n", 0.0),
        (f"    x = {'-' * 100_000}1\n", 0.0),
        ("    x = 1\n\fprint(x)\n", 0.0),
    ],
)
def test_syntax_reward(body, reward):
    from examples.preference.rewards import syntax_reward

    assert syntax_reward('def f():\n    """Do it.\n\n    Really."""\n', body) == reward


def test_a_completion_ends_at_the_end_of_text_or_at_an_unindented_line(tokenizer):
    from examples.preference.rewards import body_of, completion_length

    def ended(text, more=""):
        kept, tokens = tokenizer(text).input_ids, tokenizer(text + more).input_ids
        assert tokens[: len(kept)] == kept
        length = completion_length(tokenizer, tokens)
        return length - len(kept), body_of(tokenizer, tokens[:length])

    assert ended("    return é\n    x = 1\n", "X = 1\n") == (1, "    return é\n    x = 1\n")
    assert ended("    return 1\n", "<|endoftext|>    x") == (1, "    return 1\n")
    assert ended("    return 1", "<|endoftext|>    x") == (1, "    return 1")
    assert ended("    return 1\n    unfinished") == (0, "    return 1\n")
    assert ended("", "X = 1\n") == (1, "")


# ---------------------------------------------------------------------- data


def test_corruption_is_seeded_and_never_the_original():
    from examples.preference.corruption import corrupt

    found = set()
    for body, seed in itertools.product(BODIES, range(40)):
        body = f"    {body}\n"
        worse = corrupt(body, seed)
        assert worse == corrupt(body, seed)
        assert worse != body
        found.add(worse)
        changed = sum(a != b for a, b in zip(body.split("\n"), worse.split("\n"), strict=True))
        assert changed in (1, 2)
    assert "    return total\n    total = first + second\n" in found, "lines"
    assert "    total = first - second\n    return total\n" in found, "operator"
    assert {corrupt("    f(x)\n", seed) for seed in range(40)} == {"    x(x)\n", "    f(f)\n"}, "name"
    assert corrupt("    pass\n", 0) is None
    assert corrupt("    return 'a + b'\n", 0) is None, "strings are not operators"


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ("# one\n    # two\n    return a + b", ["return a - b", "return a + a", "return b + b"]),
        ("a = 1\n    a = 1  # again", []),
        ("# one\n    a()\n    b()", ["b()\n    a()", "a()\n    a()", "b()\n    b()"]),
    ],
)
def test_what_is_corrupted_is_another_program(body, faults):
    from examples.preference.corruption import corrupt

    def program(text):
        return ast.dump(ast.parse(f"def f():\n{text}\n"))

    found = {corrupt(f"    {body}\n", seed) for seed in range(60)}
    assert {program(text) for text in found if text} == {program(f"    {text}") for text in faults}
    assert (None in found) is (not faults)


def test_comments_alone_are_no_difference():
    from examples.preference.corruption import corrupt

    assert {corrupt("    # one\n    # two\n    pass\n", seed) for seed in range(20)} == {None}
    assert {corrupt("    pass  # one\n    # two\n", seed) for seed in range(20)} == {None}


def test_pairs_mask_prompts_and_padding(sources, tokenizer):
    from examples.preference.pairs import PairDataModule

    data = attached(PairDataModule(root=str(sources), batch_size=4, max_length=96), tokenizer)
    batch = next(iter(data.val_dataloader()))
    for number, pair in enumerate(data.examples["val"][:4]):
        assert pair.chosen != pair.rejected
        for row, completion in zip((2 * number, 2 * number + 1), (pair.chosen, pair.rejected), strict=True):
            assert batch.tokens[row][batch.completion[row]].tolist() == completion
            assert batch.tokens[row][batch.attended[row].bool()].tolist() == [*pair.prompt, *completion]
            assert ast.parse(tokenizer.decode([*pair.prompt, *pair.chosen]))


def test_a_step_has_the_same_data_on_any_number_of_ranks(sources, tokenizer):
    from examples.preference.prompts import PromptDataModule

    def steps(ranks):
        found = []
        for rank in range(ranks):
            data = attached(PromptDataModule(root=str(sources), batch_size=4 // ranks), tokenizer, ranks, rank)
            found.append([batch.texts for batch in data.train_dataloader()])
        return [{text for texts in step for text in texts} for step in zip(*found, strict=True)]

    assert steps(1) == steps(2)
    assert len(steps(1)) >= 5


def test_a_file_keeps_its_side(sources, tokenizer):
    from examples.preference.prompts import PromptDataModule

    def sides():
        data = attached(PromptDataModule(root=str(sources), batch_size=2, val_fraction=0.3), tokenizer)
        return {split: {text for text, _ in rows} for split, rows in data.examples.items()}

    before = sides()
    (sources / "new.py").write_text('def new():\n    """Do."""\n    return 1\n')
    after = sides()
    assert all(before[split] <= after[split] for split in before)
    assert sum(map(len, after.values())) == 41


# ---------------------------------------------------------------------- errors


def test_folders_that_do_not_exist(tmp_path, tokenizer, sources):
    from examples.preference.dpo import DPO
    from examples.preference.pairs import PairDataModule

    with pytest.raises(FileNotFoundError, match="'runs/preference/model' does not exist: run the pretraining"):
        DPO()
    with pytest.raises(NotADirectoryError, match="nowhere"):
        attached(PairDataModule(root=str(tmp_path / "nowhere")), tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="needs at least two non-empty text files; .* has 0 files"):
        attached(PairDataModule(root=str(tmp_path / "empty")), tokenizer)
    both = r"3\d train functions make 0 of at least 8 examples and \d val functions make 0 of at least 1 examples"
    with pytest.raises(ValueError, match=both):
        attached(PairDataModule(root=str(sources), max_length=5), tokenizer)


def test_data_that_do_not_fit_the_model(small, fit, transformers_folder, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(transformers_folder).save_pretrained(tmp_path / "larger")
    tokenizer.add_tokens([f"<new{number}>" for number in range(301 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="The tokenizer has 301 tokens, the model of the same folder only 300: give"):
        fit(*configs("preference/dpo.yaml"), *small["dpo"], f"--model.path={tmp_path / 'larger'}")
    with pytest.raises(ValueError, match=r"up to 400 tokens, but the model's `max_position_embeddings` is 128"):
        fit(*configs("preference/dpo.yaml"), *small["dpo"], "--data.max_length=400")
    with pytest.raises(ValueError, match=r"up to 164 tokens, but"):
        fit(*configs("preference/remax.yaml"), *small["remax"], "--model.max_new_tokens=100")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("dpo.DPO", "beta", 0.0),
        ("remax.ReMax", "max_new_tokens", 0),
        ("remax.ReMax", "kl_coefficient", -1.0),
        ("pairs.PairDataModule", "max_length", 2),
        ("pairs.PairDataModule", "batch_size", 0),
        ("prompts.PromptDataModule", "val_fraction", 1.0),
        ("prompts.PromptDataModule", "max_prompt_tokens", 0),
    ],
)
def test_settings_out_of_range(name, option, value):
    from importlib import import_module

    module, _, cls = name.partition(".")
    with pytest.raises(ValueError, match=f"`{option}` must .*{value}"):
        getattr(import_module(f"examples.preference.{module}"), cls)(**{option: value})
