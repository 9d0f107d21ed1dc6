import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import jsonargparse

import lightning_memopt as lm
from lightning_memopt.cli import MemOptCLI
from tests._commands import keep_parsers, run_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.syspath_prepend(str(ROOT))
    # seed_everything writes these.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    keep_parsers(monkeypatch, "fit")
    yield
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


@pytest.fixture
def texts(tmp_path):
    """A folder with 30 files of prose, each of its own."""
    folder = tmp_path / "texts"
    for number in range(30):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = (f"word{number * i % 17} and {i * i % 101}, " for i in range(60))
        path.write_text(f"File {number}. " + "".join(words))
    return folder


@pytest.fixture
def small(texts, tmp_path):
    """Arguments that make a config of the examples quick."""
    return [
        f"--data.root={texts}", "--data.vocab_size=300", "--data.seq_len=16", "--data.batch_size=2",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=3", "--trainer.val_check_interval=3",
        "--trainer.limit_val_batches=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def data(root, **kwargs):
    from examples.text import TextDataModule

    return TextDataModule(str(root), **{"vocab_size": 300, "seq_len": 16, "batch_size": 2, **kwargs})


def arguments(path):
    """Return how a config of the examples is meant to be used."""
    content = yaml.safe_load(path.read_text())
    mode = ["--parser_mode=omegaconf+"] if "${" in path.read_text() else []
    if "model" in content:
        return [*mode, "fit", f"--config={path}"]
    if "optimizer" in content or "trainer" in content:
        return ["fit", f"--config={CONFIGS / 'demo.yaml'}", f"--config={path}"]
    return ["fit", f"--config={CONFIGS / 'demo.yaml'}", "--optimizer=lightning_memopt.MemOpt",
            f"--optimizer.recipe={path}", "--optimizer.lr=1e-3"]  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_config_trains(name, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for checkpoints
    cli = MemOptCLI(args=[*arguments(CONFIGS / name), *small])
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


def test_interpolation_follows_overrides_in_one_mode_only(texts, tmp_path):
    # data.seq_len is overridden; the file says max_position_embeddings: ${data.init_args.seq_len}.
    args = ["fit", f"--config={CONFIGS / 'interpolation.yaml'}", f"--data.root={texts}", "--data.vocab_size=300",
            "--data.batch_size=1", "--data.seq_len=160", "--trainer.max_steps=1", "--trainer.limit_val_batches=1",
            "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]  # fmt: skip
    follows = MemOptCLI(args=["--parser_mode=omegaconf+", *args])
    assert follows.model.model.config.max_position_embeddings == 160
    assert follows.model.model.config.vocab_size == 300
    assert follows.trainer.val_check_interval == 1
    with pytest.raises(ValueError, match="The data's `seq_len` is 160, the model's `max_position_embeddings` only 128"):
        MemOptCLI(args=["--parser_mode=omegaconf", *args, "--trainer.val_check_interval=1"])


def test_a_vocabulary_that_does_not_fit_is_refused(small):
    with pytest.raises(ValueError, match="The data's `vocab_size` is 300, the model's `vocab_size` only 200"):
        MemOptCLI(args=["fit", f"--config={CONFIGS / 'demo.yaml'}", *small, "--model.vocab_size=200"])


def test_demo_trains_on_two_processes_and_prints_one_table(small):
    args = [arg for arg in small if "max_steps" not in arg and "accelerator" not in arg]
    done = run_python(str(ROOT / "examples" / "demo.py"), *args, "--trainer.max_steps=7")
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


def test_fabric_trains_on_two_processes_and_continues_on_one(texts, tmp_path, capsys):
    from examples.fabric import main

    args = [f"--root={texts}", "--vocab-size=300", "--seq-len=16", "--batch-size=2", "--hidden-size=16"]
    first = run_python(str(ROOT / "examples" / "fabric.py"), *args, "--steps=20", "--devices=2")
    assert first.returncode == 0, first.stderr[-3000:]
    assert re.search(r"step    20  loss \d\.\d+\nvalidation loss \d\.\d+\nsaved to runs/fabric.ckpt", first.stdout)
    assert first.stdout.count("embed_tokens") == first.stdout.count("validation loss") == 1, "rank 0 alone prints"
    main([*args, "--steps=22", "--devices=1"])
    assert capsys.readouterr().out.startswith("continuing after step 20\nvalidation loss")
    assert "model.embed_tokens.weight" in lm.load_weights(tmp_path / "runs" / "fabric.ckpt")


def test_llama_in_plain_python(texts, tmp_path):
    from lightning.pytorch import Trainer

    from examples.llama import LlamaModule

    module = LlamaModule(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    module.configure_optimizers = lambda: lm.AdaPMLean(module.named_parameters(), lr=3e-3)
    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, limit_val_batches=1,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, data(texts))
    assert module.model.config.hidden_size == 16
    assert trainer.optimizers[0].snapshot().step == 2


def test_split_by_file_is_deterministic_and_total(texts):
    from examples.text import read_texts

    first, skipped = read_texts(texts, "**/*", 0.3, None)
    again, _ = read_texts(texts, "**/*", 0.3, None)
    assert first == again
    assert skipped == 0
    everything = sorted(path.read_text() for path in texts.rglob("*.txt"))
    assert sorted(first["train"] + first["val"]) == everything
    assert 1 <= len(first["val"]) <= 18
    # A file keeps its side when another one comes.
    (texts / "new.txt").write_text("something new")
    more, _ = read_texts(texts, "**/*", 0.3, None)
    assert set(first["val"]) <= set(more["val"])
    assert set(first["train"]) <= set(more["train"])


def test_a_cap_leaves_both_sides_their_share(texts):
    from examples.text import read_texts

    capped, _ = read_texts(texts, "**/*", 0.25, 2000)
    assert [sum(map(len, capped[split])) for split in ("train", "val")] == [1500, 500]


def test_binary_and_hidden_files_are_left_out(texts):
    from examples.text import read_texts

    before, _ = read_texts(texts, "**/*", 0.1, None)
    (texts / "image.bin").write_bytes(b"\xff\xfe\x00")
    (texts / "zeros.txt").write_bytes(b"a\0b")
    (texts / ".git").mkdir()
    (texts / ".git" / "config").write_text("hidden")
    (texts / "site-packages").mkdir()
    (texts / "site-packages" / "x.txt").write_text("not ours")
    after, skipped = read_texts(texts, "**/*", 0.1, None)
    assert skipped == 2
    assert after == before


def test_tokens_are_cached_and_decode_to_the_text(texts, monkeypatch):
    from examples import text as module

    first = data(texts)
    first.prepare_data()
    first.setup()
    monkeypatch.setattr(module, "tokenize", None)  # may not be called again
    second = data(texts)
    second.prepare_data()
    second.setup()
    torch.testing.assert_close(first.tokens["train"], second.tokens["train"], rtol=0, atol=0)
    start = second.tokenizer.decode(second.tokens["train"].flatten().tolist())
    assert start.startswith(module.read_texts(texts, "**/*", 0.1, None)[0]["train"][0][:50])
    batch = next(iter(second.train_dataloader()))
    assert (batch.shape, batch.dtype) == ((2, 16), torch.int64)
    assert batch.max() < 300
    (texts / "part0" / "0.txt").write_text("other text")
    with pytest.raises(TypeError, match="not callable"):
        data(texts).prepare_data()
    assert not list(second.cache_dir.glob("*.tmp"))


def test_the_vocabulary_is_trained_without_validation_text():
    from examples.text import tokenize

    alone = tokenize({"train": ["the cat " * 50], "val": ["a"]}, 300)
    beside = tokenize({"train": ["the cat " * 50], "val": ["zebra " * 1000]}, 300)
    assert alone["tokenizer"] == beside["tokenizer"]


def test_the_standard_library_is_the_default():
    from examples.text import TextDataModule, read_texts

    module = TextDataModule()
    assert (module.root / "argparse.py").is_file()
    texts, _ = read_texts(module.root, module.pattern, 0.1, 300_000)
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
    with pytest.raises(FileNotFoundError, match=r"has 2 files that match '\*\*/\*', of which 1 are not UTF-8"):
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
