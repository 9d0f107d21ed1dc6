"""What a model says about its weights: the sort of module that holds each, and the numbers of its attention layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

from lightning_memopt.plans.roles.names import canonical_names

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead")
# The last one is gpt-fast's; Meta's code, where it counts queries, has others before it.
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "kv_heads",
    "n_query_groups",
    "num_query_groups",
    "n_kv_heads",
    "n_kv_head",
    "num_heads_kv",
    "n_head_kv",
    "kv_n_heads",
    "n_local_kv_heads",
    "n_local_heads",
)
_QUERIES_PER_KEY = ("num_key_value_groups", "n_rep")
# Where only a part of a query is rotated, `head_dim` may be the size of that part.
_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head")
_CONFIG_SIZES = ("qk_head_dim", "head_size", "head_dim", "kv_channels")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim_out")
_INNER_WIDTHS = ("internal_dim", "inner_dim", "all_head_size")  # of all heads together
_LATENT = ("qk_nope_head_dim", "v_head_dim")


class Facts(NamedTuple):
    """What a model says about one weight.

    Attributes:
        module: The class of the module that holds it.
        sort: ``embedding``, ``norm``, ``convolution``, ``transposed`` or ``linear``, or nothing of these.
        modules: The classes of all modules around it, with those they derive from.
        numbers: Those of :data:`~lightning_memopt.plans.roles.schemes.NUMBERS` that are known.
    """

    module: str = ""
    sort: str = ""
    modules: tuple[str, ...] = ()
    numbers: tuple[tuple[str, int], ...] = ()


NOTHING = Facts()


def facts_of(model: Any) -> dict[str, Facts]:
    """Return what a model says about every parameter, by canonical name."""
    inside: dict[str, Facts] = {}
    configs: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        above, own = prefix.rpartition(".")[0], vars(module)
        outer = inside.get(above, NOTHING) if prefix else NOTHING
        numbers, config = dict(outer.numbers), configs.get(above)
        if own.get("config") is not None and own["config"] is not config:
            config = own["config"]
            numbers = _of_config(config) or numbers
        configs[prefix] = config
        classes, sort = _class(type(module))  # type: ignore[arg-type]
        inside[prefix] = Facts(classes[0], sort, outer.modules + classes, tuple(_of_module(own, numbers).items()))
    raw = [name for name, _ in model.named_parameters()]
    return {name: inside.get(_holder(full), NOTHING) for name, full in zip(canonical_names(raw), raw, strict=True)}


def _holder(name: str) -> str:
    """Return the name of the module that holds a parameter, around torch's parametrizations of it."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


@lru_cache(maxsize=1024)
def _class(cls: type) -> tuple[tuple[str, ...], str]:
    """Return the names of a class and of those it derives from, and the sort of module. Names need no import."""
    names = tuple(each.__name__ for each in cls.__mro__ if each.__name__ not in ("Module", "object")) or ("Module",)
    if "Embedding" in names or "EmbeddingBag" in names:
        return names, "embedding"
    if "_ConvNd" in names:
        return names, "convolution"
    if "Conv1D" in names:
        return names, "transposed"
    if {"RNNBase", "RNNCellBase"} & set(names) or any(name.endswith("Linear") for name in names):
        return names, "linear"
    return names, "norm" if any("Norm" in name for name in names) else ""


def _of_config(config: Any) -> dict[str, int]:
    """Return the numbers that a configuration gives, or nothing if it counts no heads."""

    def first(names: Iterable[str]) -> int | None:
        return next((found for name in names if _is_size(found := _read(config, name))), None)

    heads = first(_HEADS)
    if heads is None:
        return {}
    found = {"heads": heads, "kv_heads": first(_KV_HEADS) or heads}
    width, size = first(_WIDTHS), first(_CONFIG_SIZES)
    if size is None and width is not None and width % heads == 0:
        size = width // heads
    return found | _sizes({"head_dim": size, **{name: _read(config, name) for name in _LATENT}})


def _of_module(own: Mapping[str, Any], known: dict[str, int]) -> dict[str, int]:
    """Return the numbers inside a module with the attributes ``own``. What it does not give itself stays ``known``."""

    def first(names: Iterable[str]) -> int | None:
        return next((own[name] for name in names if name in own and _is_size(own[name])), None)

    heads, size, inner = first(_HEADS), first(_SIZES), first(_INNER_WIDTHS)
    if heads is not None and heads != known.get("heads"):
        known = {"heads": heads, "kv_heads": heads}  # the configuration's are those of other layers
    width = inner or (None if "head_dim" in known else first(_WIDTHS))
    if size is None and heads is not None and width is not None and width % heads == 0:
        size = width // heads
    ratio, heads = first(_QUERIES_PER_KEY), known.get("heads")
    kv_heads = first(_KV_HEADS) or (heads // ratio if heads and ratio else None)
    latent = {name: own.get(name) for name in _LATENT}
    return known | _sizes({"kv_heads": kv_heads, "head_dim": size, **latent})


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses to give one number where layers differ
        return None


def _sizes(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: number for name, number in values.items() if _is_size(number)}


def _is_size(number: Any) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
