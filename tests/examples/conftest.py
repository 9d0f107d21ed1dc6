from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("transformers")

import jsonargparse

from tests._commands import keep_parsers
from tests.examples._run import ROOT, fit_command


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.syspath_prepend(str(ROOT))
    # seed_everything writes these.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that does as ``lightning-memopt fit *args`` does in this process, and returns the CLI."""
    keep_parsers(monkeypatch, "fit")
    return fit_command


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Return a folder with 30 files of prose, each of its own."""
    folder = tmp_path / "texts"
    for number in range(30):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = (f"word{number * i % 17} and {i * i % 101}, " for i in range(60))
        path.write_text(f"File {number}. " + "".join(words))
    return folder


@pytest.fixture(scope="session")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as transformers saves it: a LLaMA of one layer, and a byte-level tokenizer with 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n" * 20], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
