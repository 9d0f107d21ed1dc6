"""One class per recipe: MemOpt with the paper's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_memopt.optim.memopt import MemOpt, ParamsT


class AdaPM(MemOpt):
    """AdaPM: each block of a transformer gets the momentum it needs (arXiv 2510.09103).

    Embeddings and attention output have no momentum, values a dense one, everything else a low-rank one whose dropped
    part is released at once: with M = β₁ Q₋R₋ + (1−β₁) G and Q = orth(M R₋ᵀ), R = Qᵀ M::

        U = Q R / (1−β₁ᵗ) + (M − Q R) / (1−β₁),   D = √(V / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    State: at most 10% of AdamW's momentum on LLaMA and GPT-2 shapes, and AdamW's full second moment.
    Learning rate: AdamW's, warmed up: U / D is larger than Adam's while t is small. No element of it exceeds
    ``max_update``, since Q mixes elements and V can be almost 0 where U is not.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None means (0.9, 0.95), or with ``paper`` (0.9, 0.999).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Rank of the low-rank momentum; None means 1/64 of the short side, at least 4.
        paper: Use the authors' decay rates.
        overrides: As for :class:`MemOpt`.
        options: Any other option of :class:`MemOpt`.
    """

    _recipe = "adapm"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        paper: bool = False,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        betas = (0.9, 0.999) if betas is None and paper else betas
        super().__init__(params, self._recipe, lr, betas, eps, weight_decay, rank=rank, overrides=overrides, **options)


class AdaPMMini(AdaPM):
    """AdaPM with Adam-mini's second moment (arXiv 2510.09103 with 2406.16793).

    Momentum as in :class:`AdaPM`; V is one number per attention head for queries and keys (where the size of a head is
    known: bind the model, or give ``head_dim``) and one per output for everything else: the mean of G² over it.

    State: at most 5.5% of AdamW's on LLaMA and GPT-2 shapes. Learning rate: AdamW's.
    """

    _recipe = "adapm_mini"


class AdaPMLean(MemOpt):
    """Low-rank momentum for every matrix, Adafactor's factored second moment: this package's default.

    U as in :class:`AdaPM`; a ← β₂ a + (1−β₂) mean_n(G²), c ← β₂ c + (1−β₂) mean_m(G²)::

        D = √(a cᵀ / mean(a) / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    State: 2 to 3.5% of AdamW's on LLaMA and GPT-2 shapes. Learning rate: AdamW's, warmed up. No element of U / D
    exceeds ``max_update``.
    Sources: arXiv 2510.09103 (momentum), arXiv 1804.04235, section 3 (second moment).

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None means (0.9, 0.95).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Rank of the momentum; None means 1/32 of the short side, at least 4.
        overrides: As for :class:`MemOpt`.
        options: Any other option of :class:`MemOpt`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, "adapm_lean", lr, betas, eps, weight_decay, rank=rank, overrides=overrides, **options)


class AdamSN(MemOpt):
    """Adam with Subset-Norm step sizes on linear weights (arXiv 2411.07120).

    V ← β₂ V + (1−β₂) mean(G²) over each row of a tall weight, each column of a wide one, or each run of
    ``subset_size`` elements::

        W ← (1 − ηλ) W − η · M / (1−β₁ᵗ) / (√(V / (1−β₂ᵗ)) + ε)

    State: AdamW's momentum, and almost no second moment except for embeddings: a little over half of AdamW's.
    Learning rate: AdamW's. With ``reduction="sum"``, as in the paper, √(subset's size) times it.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None means (0.9, 0.999).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        reduction: ``mean`` or ``sum``.
        subset_size: Elements per subset; None means rows or columns.
        overrides: As for :class:`MemOpt`.
        options: Any other option of :class:`MemOpt`.
    """

    _recipe = "adam_sn"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        reduction: str | None = None,
        subset_size: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options |= {"reduction": reduction, "subset_size": subset_size}
        super().__init__(params, self._recipe, lr, betas, eps, weight_decay, overrides=overrides, **options)


class RMSPropSN(AdamSN):
    """RMSProp with Subset-Norm step sizes on linear weights, as its authors define it (arXiv 2411.07120).

    No momentum, no bias correction, sums over the subsets: V ← β₂ V + (1−β₂) sum(G²), W ← W − η G / (√V + ε).
    Betas (0, 0.999).

    State: one number per row or column of linear weights; a full second moment for embeddings and the rest.
    Learning rate: √(subset's size) times RMSProp's for the linear weights, but RMSProp's for everything else; with
    ``reduction="mean"`` the same for both. The first steps are 1/√(1−β₂) = 32 times larger than Adam's.
    """

    _recipe = "rmsprop_sn"


class AdamSNSM(MemOpt):
    """Adam with Subset-Norm step sizes and Subspace-Momentum on linear weights (arXiv 2411.07120).

    Momentum lives in a k-dimensional subspace of the short side, its complement follows plain SGD; every ``gap`` steps
    P is the leading singular subspace of G, X ← 0::

        X ← β₁ X + (1−β₁) G P,   U = X Pᵀ / (1−β₁ᵗ) + (G − G P Pᵀ),   D = √(V / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    with V the mean of G² over each row or column.

    State: k(m + n) + max(m, n) numbers for an m × n weight, AdamW's for embeddings: 14% of AdamW's on LLaMA 1B at the
    default rank of 1/8, 23% at 1/4. Learning rate: AdamW's; with ``reduction="sum"`` or ``paper`` √(subset's size)
    times it. ``max_update`` bounds U / D: P mixes elements, and a mean of squares hides small ones.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None means (0.9, 0.999).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Dimension of the subspace; None means 1/8 of the short side, at least 4.
        gap: Steps between two choices of the subspace; None means 10, or with ``paper`` 200.
        projection: ``power``, ``svd``, ``random`` or ``topk``; None means ``power``, or with ``paper`` ``svd``.
        handover: ``reset``, ``rotate`` or ``keep``; None means ``reset``.
        reduction: ``mean`` or ``sum``; None means ``mean``, or with ``paper`` ``sum``.
        subset_size: Elements per subset; None means rows or columns.
        paper: Follow the authors' code: sums over the subsets, the complement divided by 1−β₁ᵗ, too, a new subspace
            by SVD every 200 steps. Their use of the old momentum's coordinates in the new basis for one step, before
            they reset it, is not copied: the signs of singular vectors are arbitrary.
        overrides: As for :class:`MemOpt`.
        options: Any other option of :class:`MemOpt`.
    """

    _recipe = "adam_snsm"
    _paper: Mapping[str, Any] = {"reduction": "sum", "correct_complement": True, "gap": 200, "projection": "svd"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        gap: int | None = None,
        projection: str | None = None,
        handover: str | None = None,
        reduction: str | None = None,
        subset_size: int | None = None,
        paper: bool = False,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options |= {"rank": rank, "gap": gap, "projection": projection, "handover": handover}
        options |= {"reduction": reduction, "subset_size": subset_size}
        if paper:
            options |= {key: value for key, value in self._paper.items() if options.get(key) is None}
        super().__init__(params, self._recipe, lr, betas, eps, weight_decay, overrides=overrides, **options)


class AdaGradSNSM(AdamSNSM):
    """AdaGrad with Subset-Norm and Subspace-Momentum on linear weights, as its authors define it (arXiv 2411.07120).

    V ← V + sum(G²) over each row or column (β₂ = 1), no bias correction: U = X Pᵀ + (G − G P Pᵀ), D = √V + ε.
    Betas (0.9, 1).

    State: as :class:`AdamSNSM`. Learning rate: AdaGrad's, far larger than AdamW's, since V only grows: in
    ``benchmarks/convergence.py`` the best was 180 times AdamW's.
    """

    _recipe = "adagrad_snsm"
    _paper: Mapping[str, Any] = {"gap": 200, "projection": "svd"}


class AdamMini(MemOpt):
    """Adam-mini: one second-moment number per block of the Hessian's structure (arXiv 2406.16793).

    V ← β₂ V + (1−β₂) mean(G²) over each attention head (queries and keys, where the size of a head is known: bind the
    model, or give ``head_dim``) or each output (everything else; each token for embeddings)::

        W ← (1 − ηλ) W − η · M / (1−β₁ᵗ) / (√(V / (1−β₂ᵗ)) + ε)

    State: AdamW's momentum and almost no second moment: 50% of AdamW's. Learning rate: AdamW's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        head_dim: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options |= {"head_dim": head_dim}
        super().__init__(params, "adam_mini", lr, betas, eps, weight_decay, overrides=overrides, **options)


class Adafactor(MemOpt):
    """Adafactor's factored second moment without momentum (arXiv 1804.04235, section 3).

    a ← β₂ a + (1−β₂) mean_n(G²), c ← β₂ c + (1−β₂) mean_m(G²)::

        W ← (1 − ηλ) W − η · G / (√(a cᵀ / mean(a) / (1−β₂ᵗ)) + ε)

    Without the paper's relative step sizes and its schedule of β₂, and with a bound per element (``max_update``) in
    place of its clipping: this is its second moment in AdamW's frame, to compare with. State: m + n numbers for an
    m × n weight, under 1% of AdamW's. Learning rate: AdamW's or less, for lack of momentum.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, "adafactor", lr, betas, eps, weight_decay, overrides=overrides, **options)
