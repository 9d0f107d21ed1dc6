"""Pretraining: every config, the demo, and the text that both read."""

from __future__ import annotations

import math
import os
import re
import warnings

import pytest
import torch
import yaml

import lightning_memopt as lm
from tests._commands import run_python
from tests._ranks import run_ranks
from tests.examples._run import EXAMPLES, RECIPES, configs, fit_on_ranks

pytestmark = pytest.mark.slow

FOLDER = EXAMPLES / "pretrain"
BASE = "pretrain/pretrain.yaml"
# No checkpoints and no folder for transformers: `test_the_whole_way` sees to these.
DEMO = configs(BASE, "pretrain/demo.yaml")


@pytest.fixture
def small(texts, tmp_path):
    """Arguments that make a config of the examples quick."""
    return [
        f"--data.root={texts}", "--data.vocab_size=300", "--data.seq_len=16", "--data.batch_size=2",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=2",
    ]  # fmt: skip


def data(root, **kwargs):
    from examples.pretrain.data import TextDataModule

    return TextDataModule(str(root), **{"vocab_size": 300, "seq_len": 16, "batch_size": 2, **kwargs})


def texts_of(root, pattern="**/*", val_fraction=0.1, max_chars=None):
    from examples.pretrain.texts import Texts

    found = Texts(root, pattern, val_fraction, max_chars)
    return {split: list(found.read(split)) for split in ("train", "val")}


def arguments(path):
    """Return how a config of the examples is meant to be used."""
    content = yaml.safe_load(path.read_text())
    if "data" in content:
        mode = ["--parser_mode=omegaconf+"] if "${" in path.read_text() else []
        return mode, [f"--config={path}"]
    if path.name == "adaptive.yaml":
        return [], [*configs(BASE), f"--config={path}"]
    if "optimizer" in content or "trainer" in content or "model" in content:
        return [], [*DEMO, f"--config={path}"]
    return [], [*DEMO, "--optimizer=lightning_memopt.MemOpt", f"--optimizer.recipe={path}", "--optimizer.lr=1e-3"]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_every_config_trains(name, small, tmp_path, fit):
    first, args = arguments(FOLDER / name)
    cli = fit(*args, *small, first=first)
    assert cli.trainer.global_step == 3
    assert cli.trainer.callback_metrics["val_loss"].isfinite()
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW if name == "adamw.yaml" else lm.MemOpt)
    if isinstance(optimizer, lm.MemOpt):
        blocks = {block.name: block for block in optimizer.snapshot().blocks}
        assert {"embedding", "query", "key", "value", "attention_output", "mlp"} <= {b.role for b in blocks.values()}
        assert "other" not in {block.role for block in blocks.values()}
        if name == "adaptive.yaml":
            assert sum(b.momentum_bytes for b in blocks.values()) <= 0.05 * optimizer.snapshot().adamw_bytes / 2
        if name == "recipe.yaml":
            assert blocks["model.model.layers.0.mlp.up_proj.weight"].momentum == "dense"
            assert blocks["model.model.layers.1.mlp.up_proj.weight"].rank == 8


def test_interpolation_follows_overrides_in_one_mode_only(texts, tmp_path, fit):
    # data.seq_len is overridden; the file says seq_len: ${data.init_args.seq_len}.
    args = [*configs("pretrain/interpolation.yaml"), f"--data.root={texts}", "--data.vocab_size=300",
            "--data.batch_size=1", "--data.seq_len=160", "--trainer.max_steps=1", "--trainer.limit_val_batches=1",
            "--trainer.logger=false", "--trainer.enable_checkpointing=false"]  # fmt: skip
    follows = fit(*args, first=["--parser_mode=omegaconf+"])
    assert follows.model.model.config.max_position_embeddings == 160
    assert follows.model.model.config.vocab_size == 300
    assert follows.trainer.val_check_interval == 1
    with pytest.raises(ValueError, match="The data's `seq_len` is 160, the model's only 128"):
        fit(*args, "--trainer.val_check_interval=1", first=["--parser_mode=omegaconf"])


def test_a_vocabulary_that_does_not_fit_is_refused(small, fit):
    with pytest.raises(ValueError, match="The data's `vocab_size` is 300, the model's only 200: set the model's"):
        fit(*DEMO, *small, "--model.vocab_size=200")


def test_a_text_with_fewer_tokens_than_the_vocabulary_is_told_of_once(texts):
    # After some merges, every text is a few tokens.
    for number, path in enumerate(texts.rglob("*.txt")):
        path.write_text("to be or not to be. " * (20 + number))
    found = data(texts, vocab_size=2048, seq_len=2)
    with pytest.warns(UserWarning, match="yield .* different tokens, fewer than `vocab_size` 2,048") as caught:
        found.setup()
    known = len(found.tokenizer)
    assert known < 300
    (message,) = (str(warning.message) for warning in caught)
    assert f"{2048 - known:,} rows" in message
    assert message.endswith(f"--data.vocab_size {known} --model.vocab_size {known}.")
    with warnings.catch_warnings(action="error"):
        found.setup()
        data(texts, vocab_size=known, seq_len=2).setup()


def test_a_model_that_will_be_replaced_is_told_of_before(texts, small, fit, caplog):
    tiny = ["--model.model=llama-1m", "--model.vocab_size=300", "--model.seq_len=16", "--trainer.max_steps=1"]
    told, warned, left = [], [], []
    for _ in range(2):
        caplog.clear()
        with warnings.catch_warnings(record=True, action="always") as caught:
            fit(*configs(BASE), *small, *tiny)
        told.append([text for text in caplog.messages if "SaveTransformers" in text])
        warned += [text for text in (str(warning.message) for warning in caught) if "is not empty" in text]
        left.append(sorted(os.listdir("runs/pretrain/checkpoints")))
    assert told[0] == []
    assert not warned
    assert left == [["last.ckpt"]] * 2
    (text,) = told[1]
    assert re.search(r"runs/pretrain/model holds a model of \d{4}-\d\d-\d\d \d\d:\d\d, which the end of this", text)


def test_validation_files_that_repeat_training_files_are_left_out(texts):
    from examples.pretrain.texts import is_held_out

    shared = "".join(f"this is line {number} of every file\n" for number in range(5))
    held_out = [path for path in sorted(texts.rglob("*.txt")) if is_held_out(path.relative_to(texts).as_posix(), 0.3)]
    own = {
        path: f"{path.name} has lines of its own\n" * (4 if path in held_out[1:] else 6)
        for path in texts.rglob("*.txt")
    }
    for path, lines in own.items():
        path.write_text(shared + lines)
    first = held_out[0].read_text()
    found = data(texts, val_fraction=0.3)
    found.setup()
    tokens = found.tokenizer(first + "<|endoftext|>").input_ids
    assert found.tokens["val"].count == len(tokens)
    assert found.tokens["val"][:].flatten().tolist() == tokens[: len(tokens) // 16 * 16]


def test_validation_files_that_all_repeat_training_files_are_told_of(texts):
    for path in texts.rglob("*.txt"):
        path.write_text("this is the only line of every file\n" * 20)
    found = data(texts)
    with pytest.warns(UserWarning, match="Every validation file of .* repeats training files"):
        found.setup()
    assert len(found.tokens["val"]) > 0


def test_models_by_name():
    from examples.pretrain.model import LanguageModel
    from examples.pretrain.sizes import GPT2, LLAMA, config_of

    for name in (*LLAMA, *GPT2):
        config_of(name, 300, 16)
    module = LanguageModel("llama-1m", 300, 16, config={"num_key_value_heads": 2})
    assert module.model.config.num_key_value_heads == 2
    with pytest.raises(ValueError, match="There is no model 'llama-2m'; use one of llama-1m, "):
        LanguageModel("llama-2m")


def test_the_whole_way(small, texts, tmp_path, fit, capsys):
    """Two ranks train every recipe and save; one process continues; what it leaves opens in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = ["--model.model=llama-1m", "--model.vocab_size=300", "--model.seq_len=16"]
    recipes = [[*DEMO, *configs(f"pretrain/{name}.yaml"), *small, *tiny] for name in RECIPES]
    base = [*configs(BASE), *small, *tiny]
    ranks = run_ranks(fit_on_ranks, 2, [*recipes, base], str(tmp_path))
    for found in ranks[0]:
        assert found["steps"] == 3
        assert found["sharded"] > 0.9
        assert found["metrics"]["val_perplexity"] == pytest.approx(math.exp(found["metrics"]["val_loss"]), rel=1e-5)
    saved = tmp_path / "runs" / "pretrain" / "checkpoints" / "last.ckpt"
    cli = fit(*base, "--trainer.max_steps=5", f"--ckpt_path={saved}", "--data.batch_size=4")
    assert cli.trainer.global_step == 5
    folder = tmp_path / "runs" / "pretrain" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name, weight in cli.model.model.state_dict().items():
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        torch.testing.assert_close(model.state_dict()[name], whole.cpu(), rtol=0, atol=0)
    assert tokenizer.decode(tokenizer("File 7.").input_ids) == "File 7."
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert "A sample of the model:" in capsys.readouterr().out


def test_demo_trains_on_two_processes_and_prints_one_table(small):
    done = run_python(
        str(FOLDER / "compare.py"), *small, "--trainer.max_steps=7", "--trainer.enable_progress_bar=false"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The same model, data and steps") == 1, "rank 0 alone prints"
    table = done.stdout[done.stdout.rindex("The same model, data and steps") :]
    for word in ("recipe", "val. loss", "state (MiB)", "per rank (MiB)", "saved", "steps/s"):
        assert word in table
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in table.splitlines() if "│" in line]
    (adamw, lean) = ({"loss": float(row[1]), "state": float(row[2]), "rank": float(row[3])} for row in rows)
    assert [row[0] for row in rows] == ["AdamW", "adapm_lean"]
    assert lean["state"] < 0.035 * adamw["state"]
    assert lean["rank"] <= 0.52 * lean["state"]
    assert adamw["rank"] <= 0.52 * adamw["state"]
    assert 0 < lean["loss"] < 10
    assert rows[0][4] == "0.0%"
    saved = 100 * (1 - lean["state"] / adamw["state"])
    assert float(rows[1][4].rstrip("%")) == pytest.approx(saved, abs=0.2)
    assert done.stdout.count("Optimizer state of AdamW") == done.stdout.count("Optimizer state of AdaPMLean") == 1


def test_llama_in_plain_python(texts, tmp_path):
    from lightning.pytorch import Trainer

    from examples.pretrain.model import LanguageModel

    module = LanguageModel("llama-1m", vocab_size=300, seq_len=16)
    module.configure_optimizers = lambda: lm.AdaPMLean(module.named_parameters(), lr=3e-3)
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, limit_val_batches=1,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, data(texts))
    assert trainer.optimizers[0].snapshot().step == 2


def test_split_by_file_is_deterministic_and_total(texts):
    first = texts_of(texts, val_fraction=0.3)
    assert first == texts_of(texts, val_fraction=0.3)
    everything = sorted(path.read_text() for path in texts.rglob("*.txt"))
    assert sorted(first["train"] + first["val"]) == everything
    assert 1 <= len(first["val"]) <= 18
    # A file keeps its side when another one comes.
    (texts / "new.txt").write_text("something new")
    more = texts_of(texts, val_fraction=0.3)
    assert set(first["val"]) <= set(more["val"])
    assert set(first["train"]) <= set(more["train"])


def test_a_cap_leaves_both_sides_their_share(texts):
    capped = texts_of(texts, val_fraction=0.25, max_chars=2000)
    assert [sum(map(len, capped[split])) for split in ("train", "val")] == [1500, 500]


def test_binary_and_hidden_files_are_left_out(texts):
    before = texts_of(texts)
    (texts / "image.bin").write_bytes(b"\xff\xfe\x00")
    (texts / "zeros.txt").write_bytes(b"a\0b")
    (texts / ".git").mkdir()
    (texts / ".git" / "config").write_text("hidden")
    (texts / "site-packages").mkdir()
    (texts / "site-packages" / "x.txt").write_text("not ours")
    assert texts_of(texts) == before


def test_both_sides_have_text_where_chance_left_one_without(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    for fraction in (1e-6, 1 - 1e-6):
        found = texts_of(tmp_path, val_fraction=fraction)
        assert all(found.values())
        assert sorted(found["train"] + found["val"]) == ["a", "b", "c"]


def test_tokens_are_cached_and_decode_to_the_text(texts, monkeypatch):
    from examples.pretrain import tokens

    first = data(texts)
    first.prepare_data()
    first.setup()
    monkeypatch.setattr(tokens, "train_tokenizer", None)  # may not be called again
    second = data(texts)
    second.prepare_data()
    second.setup()
    torch.testing.assert_close(first.tokens["train"][:], second.tokens["train"][:], rtol=0, atol=0)
    start = second.tokenizer.decode(second.tokens["train"][:].flatten().tolist())
    assert start.startswith(texts_of(texts)["train"][0][:50])
    batch = next(iter(second.train_dataloader()))
    assert (batch.shape, batch.dtype) == ((2, 16), torch.int64)
    assert batch.max() < 300
    (texts / "part0" / "0.txt").write_text("other text")
    with pytest.raises(TypeError, match="not callable"):
        data(texts).prepare_data()
    assert not list(second.cache_dir.glob("unfinished-*"))


@pytest.fixture
def other_tokenizer(transformers_folder, tmp_path):
    """Return a folder with a tokenizer of 275 tokens that begins texts with one, ends them with another, and cuts."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(transformers_folder)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_given_tokenizer_is_used_and_saved(other_tokenizer, texts, small, fit, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = ["--model.model=llama-1m", "--model.vocab_size=275", "--model.seq_len=16", "--data.vocab_size=275"]
    cli = fit(*configs(BASE), *small, *tiny, f"--data.tokenizer={other_tokenizer}")
    first = texts_of(texts)["train"][0]
    expected = AutoTokenizer.from_pretrained(other_tokenizer)
    tokens = [*expected(first, add_special_tokens=False).input_ids, 274]
    assert cli.datamodule.tokens["train"][:].flatten()[: len(tokens)].tolist() == tokens
    saved = AutoTokenizer.from_pretrained("runs/pretrain/model")
    assert (saved.eos_token_id, saved.chat_template) == (274, expected.chat_template)
    model = AutoModelForCausalLM.from_pretrained("runs/pretrain/model")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 274
    trained = data(texts, vocab_size=275)
    trained.setup()
    assert trained.tokens["train"].count != cli.datamodule.tokens["train"].count, "the tokenizer is in the cache's key"


def test_tokenizers_that_cannot_be_used(other_tokenizer, texts, tmp_path):
    from transformers import AutoTokenizer, ByT5Tokenizer

    with pytest.raises(FileNotFoundError, match="'nowhere' has no tokenizer_config.json"):
        data(texts, tokenizer="nowhere")
    with pytest.raises(
        ValueError, match=r"is 300, but .* has 275 tokens: add --data.vocab_size 275 --model.vocab_size"
    ):
        data(texts, tokenizer=str(other_tokenizer))
    endless = AutoTokenizer.from_pretrained(other_tokenizer)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="endless' has no `eos_token`, which ends every text: use another one"):
        data(texts, tokenizer=str(tmp_path / "endless"))
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match="slow' has no fast version, made with `tokenizers`: use another one"):
        data(texts, tokenizer=str(tmp_path / "slow"))


def test_the_vocabulary_is_trained_without_validation_text(texts):
    from examples.pretrain.texts import Texts
    from examples.pretrain.tokens import cached
    from examples.pretrain.vocabulary import train_tokenizer

    found = Texts(texts, "**/*", 0.1, None)
    folder, _ = cached(found, 300, texts.parent / "cache")
    alone = train_tokenizer(found.read("train"), 300)
    assert (folder / "tokenizer.json").read_text() == alone.to_str(pretty=True)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_step_has_the_same_examples_on_any_number_of_processes_also_after_a_resume(replicas):
    from examples.pretrain.order import ResumableLoader

    def steps(replicas, skipped=0):
        """The examples of every step of two epochs."""
        loaders = [ResumableLoader(torch.arange(50), 8 // replicas, replicas, rank) for rank in range(replicas)]
        for loader in loaders:
            loader.load_state_dict({"epoch": 0, "examples": 8 * skipped})
        found = []
        for _ in range(2):
            for batches in zip(*loaders, strict=True):
                found.append(sorted(torch.cat(batches).tolist()))
                epoch, number = divmod(len(found) + skipped, 6)
                assert all(loader.state_dict() == {"epoch": epoch, "examples": 8 * number} for loader in loaders)
        return found

    whole = steps(1)
    assert len(whole) == 12
    assert whole[:6] != whole[6:]
    assert steps(replicas) == whole
    assert steps(replicas, skipped=2) == whole[2:]


@pytest.mark.parametrize("length", [{"max_steps": 8}, {"max_epochs": 3}], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_continues_with_the_next_batch_of_its_epoch(length, workers, tmp_path):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from examples.pretrain.order import ResumableDataModule

    class Ten(ResumableDataModule):
        """Three batches an epoch."""

        def train_dataloader(self):
            return self.resumable(torch.arange(10.0), 3, seed=0, num_workers=workers)

    class Seen(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.batches = torch.nn.Parameter(torch.ones(())), []

        def training_step(self, batch, batch_idx):
            self.batches.append(batch.tolist())
            return self.weight * batch.mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(path=None):
        module = Seen()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=[saving], enable_progress_bar=False,
                          enable_model_summary=False, **length)  # fmt: skip
        trainer.fit(module, Ten(), ckpt_path=path)
        return module.batches

    whole = run()
    assert len({tuple(map(tuple, whole[i : i + 3])) for i in (0, 3)}) == 2, "every epoch has an order of its own"
    for step in range(1, len(whole)) if workers == 0 else (1, 3, 5):
        rest = run(tmp_path / f"step={step}.ckpt")
        # With `max_epochs`, Lightning 2.6 adds an epoch to some resumed runs, with any loader.
        assert (rest[: len(whole) - step] if "max_epochs" in length else rest) == whole[step:], step


def test_a_resumed_run_ends_with_the_same_weights(texts, tmp_path):
    from lightning.pytorch import Trainer

    from examples.pretrain.model import LanguageModel

    def run(steps, path=None):
        torch.manual_seed(0)
        module = LanguageModel("llama-1m", vocab_size=300, seq_len=64)
        module.configure_optimizers = lambda: lm.AdaPMLean(module.named_parameters(), lr=3e-3)
        trainer = Trainer(accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
                          limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
                          default_root_dir=tmp_path)  # fmt: skip
        trainer.fit(module, data(texts, batch_size=8, seq_len=64), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return {name: weight.clone() for name, weight in module.state_dict().items()}

    whole = run(12)
    run(5)
    torch.testing.assert_close(run(12, tmp_path / "5.ckpt"), whole, rtol=0, atol=0)


def test_the_standard_library_is_the_default():
    from examples.pretrain.data import TextDataModule

    module = TextDataModule()
    assert (module.root / "argparse.py").is_file()
    texts = texts_of(module.root, module.pattern, 0.1, 300_000)
    assert sum(map(len, texts["train"])) == 270_000
    assert sum(map(len, texts["val"])) == 30_000


def test_folders_that_cannot_be_used(tmp_path, texts):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        data(tmp_path / "nowhere").prepare_data()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="at least two non-empty text files.*has 0 files"):
        data(empty).prepare_data()
    (empty / "a.bin").write_bytes(b"\xff")
    (empty / "a.txt").write_text("one file")
    with pytest.raises(FileNotFoundError, match=r"has 2 files that match '\*\*/\*', of which 1 are empty or not"):
        data(empty).prepare_data()
    (empty / "b.txt").write_text("another file")
    short = data(empty)
    short.prepare_data()
    with pytest.raises(ValueError, match="make [0-9]+ tokens, which is less than 2 x 16"):
        short.setup()
    with pytest.raises(FileNotFoundError, match=r"match '\*.rst'"):
        data(texts, pattern="*.rst").prepare_data()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vocab_size", 256),
        ("seq_len", 1),
        ("batch_size", 0),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("max_chars", 0),
    ],
)
def test_settings_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be .*{value}"):
        data(".", **{option: value})
