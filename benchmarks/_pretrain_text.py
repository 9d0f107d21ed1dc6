"""Tokens for benchmarks/pretrain_gpu.py: the Python sources of everything installed, in a vocabulary of their own."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers
import torch
from _report import ROOT
from _train import Settings, Tokens

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.02  # share of the files
SAMPLE = 0.1  # share of the text that makes the vocabulary: a tenth makes almost the same one in a tenth of the time
LARGEST = 1_000_000  # bytes of a file; larger ones are tables, not code
TOGETHER = 512  # files that are read or tokenized at a time


def load(settings: Settings, roots: Sequence[Path], folder: Path) -> tuple[Tokens, str]:
    """Return the tokens, ``train`` and ``validation``, and one line about the text.

    They are kept in ``folder``, so that a call that continues does not tokenize again.
    """
    roots = roots or installed()
    key = repr((sorted(map(str, roots)), settings.max_chars, settings.vocabulary))
    path = folder / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    if not path.exists():
        save(_tokenized(settings, roots), path)
    stored = torch.load(path, weights_only=True)
    return {split: stored[split] for split in ("train", "validation")}, stored["about"]


def installed() -> list[Path]:
    """Return the folders of the standard library and of all packages that Python finds."""
    known = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    known += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return sorted({Path(path).resolve() for path in known if Path(path).is_dir()})


def save(content: dict[str, Any], path: Path) -> None:
    """Save so that a process that is killed leaves the old file, or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(content, new)
    os.replace(new, path)


def _tokenized(settings: Settings, roots: Sequence[Path]) -> dict[str, Any]:
    texts, digest = _texts(roots, settings.max_chars)
    count, size = sum(map(len, texts.values())), sum(len(text) for each in texts.values() for text in each)
    print(f"text: {count:,} files, {size / 1e6:.1f} million characters", flush=True)
    if count < 2:
        raise SystemExit(f"too few Python files in {', '.join(map(str, roots))}: name folders with more in --roots.")
    tokenizer = _vocabulary(texts["train"], settings)
    tokens = {split: _encoded(tokenizer, each) for split, each in texts.items()}
    about = f"{count:,} Python files ({digest}), {len(tokens['train']) / 1e6:.1f} million tokens to train on"
    print(f"tokens: {about}", flush=True)
    return {**tokens, "about": about}


def _texts(roots: Sequence[Path], most: int) -> tuple[dict[str, list[str]], str]:
    """Return different texts for each split, up to ``most`` characters, and a digest of them all.

    Hashes decide what is read first, and what is held out: of the path, and of the content, so that no copy of a file
    that is held out is trained on. Held-out texts that repeat most lines of others are left out, unless all do.
    """
    sys.path.insert(0, str(ROOT))
    from examples.pretrain.copies import without_copies

    texts: dict[str, list[str]] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    left, everything = most, hashlib.sha256()
    for text in _read(sorted(_files(roots), key=lambda path: hashlib.sha256(str(path).encode()).digest())):
        content = hashlib.sha256(text.encode()).digest()
        if content in seen:
            continue
        seen.add(content)
        everything.update(content)
        held_out = int.from_bytes(content[:4], "big") < HELD_OUT * 2**32
        texts["validation" if held_out else "train"].append(text)
        left -= len(text)
        if left <= 0:
            break
    if not texts["validation"] and len(texts["train"]) > 1:  # by chance, of a few files
        texts["validation"].append(texts["train"].pop())
    texts["validation"] = list(without_copies(texts["validation"], texts["train"])) or texts["validation"]
    return texts, everything.hexdigest()[:8]


def _files(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _read(paths: Sequence[Path]) -> Iterator[str]:
    """Yield what the files hold, in their order, of those that are short, not empty and UTF-8."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), TOGETHER):
            yield from filter(None, pool.map(_content, paths[start : start + TOGETHER]))


def _content(path: Path) -> str | None:
    try:
        return path.read_bytes().decode() if path.stat().st_size <= LARGEST else None
    except (OSError, UnicodeDecodeError):
        return None


def _vocabulary(texts: Sequence[str], settings: Settings) -> tokenizers.Tokenizer:
    """Train a byte-level BPE vocabulary on the first part of the texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[: max(1, round(SAMPLE * len(texts)))], trainer)
    return tokenizer


def _encoded(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return the tokens of all texts, each with an end. The tokenizer works on all cores."""
    end, found = tokenizer.token_to_id(END_OF_TEXT), array("i")
    for start in range(0, len(texts), TOGETHER):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + TOGETHER]):
            found.extend(encoding.ids)
            found.append(end)
    return torch.frombuffer(found, dtype=torch.int32).clone()
