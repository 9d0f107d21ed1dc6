"""The bits of bfloat16 weights: those that the weight holds, those that state holds, and how the last one rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memopt.kinds.batch import Index, Large, Scratch
from lightning_memopt.kinds.linalg import pieces, store_chunk_
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.sharding.layout import Layout
from lightning_memopt.sharding.state import like_param
from lightning_memopt.sharding.tensors import fill_, local_tensor

# State key of what a bfloat16 weight lacks: the signed difference to the weight of more bits, in its last bits.
LOW_BITS = "low_bits"
LOW_DTYPES = {24: torch.int8, 32: torch.int16}
SIZES = (16, *LOW_DTYPES)


@dataclass(frozen=True)
class WeightBits:
    """How bfloat16 weights are kept. Weights of other dtypes have all bits that they need, or round to nearest.

    The extra bits and the weight together are a float32 number, or its first 24 bits (FlashOptim, arXiv 2602.23349).
    The weight itself is that number, rounded to nearest.

    Attributes:
        kept: Number of bits: 16 (those of the weight), 24 or 32.
        stochastic: Whether the last bit rounds up with the probability of the remainder, or to nearest.
    """

    kept: int = 16
    stochastic: bool = True

    @property
    def extra(self) -> torch.dtype | None:
        """The dtype of the extra bits, or None without any."""
        return LOW_DTYPES.get(self.kept)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the extra bits of a weight."""
        return self.kept // 8 - 2

    @property
    def rounds_by_noise(self) -> bool:
        """Whether rounding draws random numbers."""
        return self.stochastic and self.kept < 32


def weight_bits(kept: int, *, stochastic: bool) -> WeightBits:
    """Return the value of the options ``master_weight_bits`` and ``bf16_stochastic_round``.

    Raises:
        TypeError: If ``stochastic`` is not a boolean.
        ValueError: If ``kept`` is not 16, 24 or 32.
    """
    if not isinstance(stochastic, bool):
        raise TypeError(f"`bf16_stochastic_round` must be True or False, got {stochastic!r}.")
    if isinstance(kept, bool) or not isinstance(kept, int) or kept not in SIZES:
        raise ValueError(
            f"`master_weight_bits` must be 16 (those of a bfloat16 weight), 24 or 32 (those of float32), got {kept!r}."
        )
    return WeightBits(kept, stochastic)


@dataclass(frozen=True)
class Weights:
    """The local weights of a block, or of a batch.

    Attributes:
        values: The weights.
        low: Their extra bits, if there are any.
        noise: Random numbers for the last bit, or None to round to nearest.
    """

    values: Large
    low: Large | None = None
    noise: Noise | None = None

    def read(self, index: Index, scratch: Scratch, *, copy: bool = False) -> Tensor:
        """Return a chunk in the dtype of the scratch memory: the weights themselves if they have it and no ``copy``."""
        values = self.values[index]
        if self.low is None:
            return scratch.take("weights", values.shape).copy_(values) if copy else scratch.cast("weights", values)
        return joined_(scratch.take("weights", values.shape), values, self.low[index])

    def write_(self, index: Index, chunk: Tensor) -> None:
        """Write a chunk that :meth:`read` returned, changed since."""
        if self.low is None:
            store_chunk_(self.values, index, chunk, self.noise)
            return
        values, low, noise = self.values[index], self.low[index], self.noise and self.noise.part(index)
        for piece in pieces(chunk):
            split_(chunk[piece], values[piece], low[piece], noise and noise.part(piece))


def joined_(out: Tensor, weights: Tensor, low: Tensor) -> Tensor:
    """Write bfloat16 weights with their extra bits into a float32 tensor, and return it.

    A weight of zero has negative bits only if something else has set it to zero since: less than zero is no number.
    """
    bits = out.view(torch.int32).copy_(weights.view(torch.int16)).mul_(1 << 16)
    bits.add_(low.where((weights != 0) | (low > 0), 0), alpha=1 << _dropped(low))
    return out


def split_(value: Tensor, weights: Tensor, low: Tensor, noise: Noise | None) -> None:
    """Write a float32 tensor into bfloat16 weights and their extra bits."""
    bits = value.contiguous().view(torch.int32)
    dropped = _dropped(low)
    if dropped:
        if noise is None:  # half of the last bit that is kept, and halves to even
            up = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        else:
            up = noise.bits(bits.shape, bits.device) & ((1 << dropped) - 1)
        bits = (bits + up) & (-1 << dropped)
    high = (bits + (1 << 15)) >> 16
    weights.view(torch.int16).copy_(high)
    low.copy_((bits - (high << 16)) >> dropped)


def _dropped(low: Tensor) -> int:
    """Return how many of float32's bits are not kept."""
    return 16 - 8 * low.element_size()


# ---------------------------------------------------------------------- state


def zero_bits(layout: Layout, bits: WeightBits | None) -> dict[str, Tensor]:
    """Return the state of a parameter whose weights have no extra bits yet, given the layout of one of its blocks."""
    return {} if bits is None or bits.extra is None else {LOW_BITS: like_param(layout, bits.extra)}


def carried_bits(saved: Mapping[str, Tensor], layout: Layout, bits: WeightBits | None) -> dict[str, Tensor]:
    """Return the extra bits that continue from saved ones of any number: more are zero, fewer are rounded."""
    state = zero_bits(layout, bits)
    if state and LOW_BITS in saved:
        theirs, mine = saved[LOW_BITS], state[LOW_BITS]
        if theirs.dtype == mine.dtype:
            fill_(mine, theirs)
        else:
            wide = like_param(layout, torch.int16)
            fill_(wide, theirs)
            local = local_tensor(wide).int()
            local_tensor(mine).copy_(local << 8 if theirs.dtype == torch.int8 else ((local + 128) >> 8).clamp_(max=127))
    return state


def dropped_bits(saved: Mapping[str, Tensor], bits: WeightBits | None) -> tuple[int, int] | None:
    """Return how many bits saved weights have and how many are kept of them, or None if all are."""
    found = [kept for kept, dtype in LOW_DTYPES.items() if LOW_BITS in saved and saved[LOW_BITS].dtype == dtype]
    theirs = found[0] if found else 16
    mine = 16 if bits is None else bits.kept
    return (theirs, mine) if theirs > mine else None


def full_weight(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return a parameter in float32 with all of its bits, sharded like the parameter."""
    whole = param.detach().float()
    if LOW_BITS in state and param.dtype == torch.bfloat16:
        joined_(local_tensor(whole), local_tensor(param.detach()), local_tensor(state[LOW_BITS]))
    return whole
