"""Memory of activations: a language model of transformers runs on fake tensors, whose storages are counted."""

from __future__ import annotations

import sys
from collections.abc import Container, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.memory.temporaries import Temporaries
from lightning_memopt.planner.planned import outline
from lightning_memopt.planner.settings import RunSettings
from lightning_memopt.planner.skeletons import ALIASES, MODELS, LlamaSizes, Skeleton
from lightning_memopt.sharding.wrapping import blocks

POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


@dataclass(frozen=True)
class Activations:
    """The most bytes at a time of what a pass forward and backward makes.

    Attributes:
        peak: Besides gradients of weights.
        with_outer: The same, with gradients of the outer parameters from when they are made.
        before_layers: Besides gradients of weights, before the first block runs.
    """

    peak: int
    with_outer: int
    before_layers: int


class _Recorded(Temporaries):
    """Records when storages are made and freed.

    Attributes:
        events: Number of a storage, and its bytes, negative when it is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._numbers: dict[int, int] = {}

    def number(self, storage: torch.UntypedStorage) -> int | None:
        """Return the number of a storage that is alive; None if it was not made inside."""
        return self._numbers.get(id(storage))

    def _changed(self, key: int, nbytes: int) -> None:
        made = key not in self._numbers
        number = self._numbers.setdefault(key, len(self.events))
        if not made:
            del self._numbers[key]
        self.events.append((number, nbytes))
        super()._changed(key, nbytes)

    def most(self, *, without: Container[int], kept: Container[int] = (), until: int | None = None) -> int:
        """Return the most bytes at a time, up to an event.

        Args:
            without: Storages that do not count.
            kept: Storages that count as if they were never freed.
            until: The number of events.
        """
        now = most = 0
        for number, nbytes in self.events[:until]:
            if number in kept:
                now += max(0, nbytes)
            elif number not in without:
                now += nbytes
            most = max(most, now)
        return most


def activations_of(module: nn.Module, name: str, settings: RunSettings, outer: Set[Tensor]) -> Activations:
    """Return the most bytes of what a pass forward and backward makes.

    These are activations that are kept for the backward pass, temporaries of operations, logits and their cross entropy
    in float32, and what is recomputed with activation checkpointing. Attention is that of
    ``scaled_dot_product_attention``, which keeps no scores, unless the model's configuration chooses another one.

    Args:
        module: A language model, called with ``input_ids``, or a module that holds one of transformers. It does not
            change.
        name: The name of the model.
        settings: The settings of the run, with a batch.
        outer: Parameters of the module that stay gathered while blocks run, with gradients that are reduced last.

    Raises:
        ValueError: If the model cannot run that way, or has learned positions for shorter sequences only.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._composable.checkpoint_activation import checkpoint

    assert settings.batch is not None
    half = settings.precision != "32-true"
    source = callable_model(module, name)
    _check_positions(source, name, settings.batch[1])
    stay = _same_in(source, module, outer)
    recorded, grads, kept, begun = _Recorded(), set[int](), set[int](), list[int]()

    def fake(tensor: Tensor) -> Tensor:
        dtype = torch.bfloat16 if half and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    def fake_parameter(param: nn.Parameter) -> nn.Parameter:
        made = nn.Parameter(fake(param), requires_grad=param.requires_grad)
        if param.requires_grad:
            made.register_hook(lambda grad: note(grad, kept if param in stay else grads))
            made.register_post_accumulate_grad_hook(_drop)
        return made

    def note(grad: Tensor, among: set[int]) -> None:
        among.update(number for number in [recorded.number(grad.untyped_storage())] if number is not None)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = outline(source, fake_parameter, buffers=fake).train()
            _without_attention_dropout(model)
            for block in blocks(model):
                block.register_forward_pre_hook(lambda *_: begun.append(len(recorded.events)))
                if settings.activation_checkpointing:
                    checkpoint(block)
            ids = torch.zeros(settings.batch, dtype=torch.long)
            with recorded:
                loss = _loss(model, ids)
                if loss.requires_grad:
                    loss.backward()
    except Exception as error:
        raise ValueError(
            f"The activations of {name} are unknown: only language models of transformers that read `input_ids` alone "
            f"are supported ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Leave `batch` out."
        ) from error
    return Activations(
        peak=recorded.most(without=grads | kept),
        with_outer=recorded.most(without=grads, kept=kept),
        before_layers=recorded.most(without=(), until=next(iter(begun), None)),
    )


def _same_in(source: nn.Module, module: nn.Module, params: Set[Tensor]) -> set[Tensor]:
    """Return the parameters of the model that runs which are those of the module: by name if it is built in."""
    names = {name for name, param in module.named_parameters() if param in params}
    return {param for name, param in source.named_parameters() if param in params or name in names}


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the cross entropy. The logits end here, as in a ``training_step`` that returns the loss alone."""
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


def callable_model(module: nn.Module, name: str) -> nn.Module:
    """Return what is called with tokens: the module, or the model of transformers in it or of its sizes.

    Raises:
        ValueError: If it holds several models, or one that reads no tokens, or if it is built in and has experts.
        ImportError: If transformers is missing.
    """
    if not isinstance(module, Skeleton):
        return _held_model(module, name)
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Activations of a built-in model need transformers: pip install transformers.") from error
    sizes = MODELS[ALIASES.get(name, name)]
    if isinstance(sizes, LlamaSizes) and sizes.experts is not None:
        raise ValueError(f"The activations of {name} depend on which experts its tokens choose. Leave `batch` out.")
    with torch.device("meta"):
        if isinstance(sizes, LlamaSizes):
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    hidden_size=sizes.hidden,
                    intermediate_size=sizes.intermediate,
                    num_hidden_layers=sizes.layers,
                    num_attention_heads=sizes.heads,
                    num_key_value_heads=sizes.kv_heads,
                    vocab_size=sizes.vocabulary,
                )
            )
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=sizes.hidden,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                vocab_size=sizes.vocabulary,
                n_positions=sizes.positions,
            )
        )


def _held_model(module: nn.Module, name: str) -> nn.Module:
    """Return the model of transformers that a module holds, or the module if it holds none."""
    library = sys.modules.get("transformers")
    if library is None:
        return module
    held: dict[str, Any] = {}
    for path, child in module.named_modules():
        inside = any(not above or path.startswith(f"{above}.") for above in held)
        if isinstance(child, library.PreTrainedModel) and not inside:
            held[path] = child
    if len(held) > 1:
        raise ValueError(
            f"The activations of {name} are unknown: it holds several models ({', '.join(map(repr, held))}), and a "
            "plan does not see which of them run. Leave `batch` out, or plan for one of them."
        )
    for path, model in held.items():
        if model.main_input_name != "input_ids":
            raise ValueError(
                f"The activations of {name} are unknown: its model {path!r} reads `{model.main_input_name}`, and "
                "`batch` means tokens. Leave `batch` out."
            )
        return model
    return module


def _check_positions(model: nn.Module, name: str, length: int) -> None:
    """Refuse a sequence that a table of positions cannot index, which fake tensors would not notice."""
    for path, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITION_TABLES
        if is_table and length > module.num_embeddings:
            raise ValueError(
                f"{name} has learned positions for {module.num_embeddings:,} tokens (`{path}`), and `batch` has "
                f"sequences of {length:,}: give it sequences of at most {module.num_embeddings:,}."
            )


def _without_attention_dropout(model: nn.Module) -> None:
    """Turn dropout of attention off: with it, attention on a CPU keeps scores, which it does not on a GPU."""
    for module in model.modules():
        for name in ("attn_dropout", "attention_dropout", "attn_pdrop", "dropout_p"):
            found = getattr(module, name, None)
            if isinstance(found, nn.Dropout):
                module._modules[name] = nn.Dropout(0.0)
            elif isinstance(found, float):
                setattr(module, name, 0.0)


def _drop(param: Tensor) -> None:
    """Free the gradient of a weight, which is counted elsewhere."""
    param.grad = None
