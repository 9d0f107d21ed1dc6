"""One class per recipe: MemOpt with the paper's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_memopt.optim.memopt import MemOpt, ParamsT


class RecipeOptimizer(MemOpt):
    """MemOpt with a fixed recipe.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None for the recipe's.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        options: Any other option of :class:`MemOpt`, except the recipe.
    """

    _recipe: str

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        if "recipe" in options:
            raise TypeError(
                f"{type(self).__name__} is the recipe {self._recipe!r}, got `recipe` {options['recipe']!r}: leave it "
                "out, or use `MemOpt`, which takes any recipe."
            )
        # By keyword: otherwise jsonargparse omits the options of subclasses.
        super().__init__(
            params=params, recipe=self._recipe, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options
        )


class AdaPM(RecipeOptimizer):
    """AdaPM: each block of a transformer gets the momentum it needs (arXiv 2510.09103).

    Embeddings and attention output have no momentum. Values and matrices of unknown role have a dense one. All other
    matrices have a low-rank one, which releases at once what it drops. With M = β₁ Q₋R₋ + (1−β₁) G,
    Q = orth(M R₋ᵀ) and R = Qᵀ M::

        U = Q R / (1−β₁ᵗ) + (M − Q R) / (1−β₁),   D = √(V / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    Defaults: betas (0.9, 0.95), rank 1/64 of the short side, at least 4.
    State: at most 10% of AdamW's momentum on LLaMA and GPT-2 shapes, and AdamW's full second moment.
    Learning rate: AdamW's, with warmup, since U / D is larger than Adam's while t is small. ``max_update`` bounds every
    element of U / D, since Q mixes elements and V can be almost 0 where U is not.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None for (0.9, 0.95), or for (0.9, 0.999) with ``paper``.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        paper: Use the authors' decay rates.
        options: Any other option of :class:`MemOpt`. The default ``rank`` is 1/64 of the short side, at least 4.
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
        paper: bool = False,
        **options: Any,
    ) -> None:
        betas = (0.9, 0.999) if betas is None and paper else betas
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class AdaPMMini(AdaPM):
    """AdaPM with Adam-mini's second moment (arXiv 2510.09103 with 2406.16793).

    Momentum as in :class:`AdaPM`. V is the mean of G² over each attention head for queries and keys, if the head size
    is known (bind the model, or give ``head_dim``), and over each output for all other matrices.

    State: at most 5.5% of AdamW's on LLaMA and GPT-2 shapes. Learning rate: AdamW's.
    """

    _recipe = "adapm_mini"


class AdaPMLean(RecipeOptimizer):
    """Low-rank momentum for every matrix, with Adafactor's factored second moment. The default of this package.

    U as in :class:`AdaPM`, with a ← β₂ a + (1−β₂) mean_n(G²), c ← β₂ c + (1−β₂) mean_m(G²)::

        D = √(a cᵀ / mean(a) / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    Defaults: betas (0.9, 0.95), rank 1/32 of the short side, at least 4.
    State: 2 to 3.5% of AdamW's on LLaMA and GPT-2 shapes. Learning rate: AdamW's, with warmup. ``max_update`` bounds
    every element of U / D.
    Sources: arXiv 2510.09103 (momentum), arXiv 1804.04235, section 3 (second moment).
    """

    _recipe = "adapm_lean"


class SNSMLean(RecipeOptimizer):
    """Subspace-Momentum for every matrix, with Adafactor's factored second moment.

    U as in :class:`AdamSNSM`, and D as in :class:`AdaPMLean`::

        U = X Pᵀ / (1−β₁ᵗ) + (G − G P Pᵀ),   D = √(a cᵀ / mean(a) / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    Defaults: betas (0.9, 0.95), rank 1/8 of the short side, at least 4, a new subspace every 10 steps, in which the
    momentum starts from zero.
    State: 8 to 11% of AdamW's on LLaMA and GPT-2 shapes. Learning rate: AdamW's or twice that, with warmup.
    ``max_update`` bounds every element of U / D.
    Sources: arXiv 2411.07120 (momentum), arXiv 1804.04235, section 3 (second moment).
    """

    _recipe = "snsm_lean"


class MuonLean(RecipeOptimizer):
    """Low-rank momentum for every matrix, orthogonalized for hidden ones, with a factored second moment for the rest.

    U as in :class:`AdaPM`. Of hidden matrices, U is orthogonalized as in :class:`Muon`::

        X ← U / ‖U‖,   5 times: X ← a X + b X XᵀX + c X (XᵀX)²,   W ← (1 − ηλ) W − η · 0.2 √max(m, n) · X

    Embeddings, heads, routers, adapters (rank 2) and matrices of unknown role are updated as in :class:`AdaPMLean`,
    vectors as in AdamW.

    Defaults: betas (0.9, 0.95), rank 1/32 of the short side, at least 4.
    State: 2 to 2.5% of AdamW's on LLaMA and GPT-2 shapes. Learning rate: four to eight times AdamW's in the small
    models measured, with warmup. Each step takes Muon's time, in which
    ``lightning_memopt.kinds.newton_schulz`` multiplies matrices of the short side 17 times.
    Sources: arXiv 2510.09103 (momentum), kellerjordan.github.io/posts/muon (iteration), arXiv 1804.04235 (factors).
    The combination is this package's.
    """

    _recipe = "muon_lean"


class AdamSN(RecipeOptimizer):
    """Adam with Subset-Norm step sizes on linear weights (arXiv 2411.07120).

    V ← β₂ V + (1−β₂) mean(G²) over each row of a tall weight, each column of a wide one, or each run of
    ``subset_size`` elements::

        W ← (1 − ηλ) W − η · M / (1−β₁ᵗ) / (√(V / (1−β₂ᵗ)) + ε)

    Defaults: betas (0.9, 0.999), mean squares over rows or columns.
    State: AdamW's momentum, and almost no second moment except for embeddings: slightly more than half of AdamW's.
    Learning rate: AdamW's. With ``reduction="sum"``, as in the paper, multiply it by √(subset's size).

    With ``reduction="sum", correct_eps=True, eps=1e-6``, steps equal those of the authors' code, except that theirs
    multiplies by 1 − ηλ after the update, has no ``max_update``, and lets runs of ``subset_size`` continue in the next
    row.
    """

    _recipe = "adam_sn"


class RMSPropSN(AdamSN):
    """RMSProp with Subset-Norm step sizes on linear weights, as its authors define it (arXiv 2411.07120).

    No momentum, no bias correction, and sums over subsets: V ← β₂ V + (1−β₂) sum(G²), W ← W − η G / (√V + ε).
    Betas (0, 0.999).

    State: one number per row or column of linear weights; a full second moment for all other weights.
    Learning rate: √(subset's size) times RMSProp's for linear weights, and RMSProp's for all other weights. With
    ``reduction="mean"``, RMSProp's for both. The first steps are 1/√(1−β₂) = 32 times larger than Adam's.

    With ``eps=1e-6, max_update=None``, steps equal those of the authors' code, except that theirs multiplies by 1 − ηλ
    after the update. In linear weights, the default ``max_update`` of 10 cuts elements that are most of their subset's
    norm, in the first 10 steps and at spikes.
    """

    _recipe = "rmsprop_sn"


class AdamSNSM(RecipeOptimizer):
    """Adam with Subset-Norm step sizes and Subspace-Momentum on linear weights (arXiv 2411.07120).

    Momentum lives in a k-dimensional subspace of the short side. The complement follows plain SGD. Every ``gap`` steps,
    P becomes the leading singular subspace of G, and X ← 0::

        X ← β₁ X + (1−β₁) G P,   U = X Pᵀ / (1−β₁ᵗ) + (G − G P Pᵀ),   D = √(V / (1−β₂ᵗ)) + ε,   W ← (1 − ηλ) W − η U / D

    with V the mean of G² over each row or column.

    State: k(m + n) + max(m, n) numbers for an m × n weight, and AdamW's state for embeddings: on LLaMA 1B 14% of
    AdamW's at the default rank of 1/8, 23% at 1/4. Learning rate: AdamW's. With ``reduction="sum"`` or ``paper``,
    multiply it by √(subset's size). ``max_update`` bounds U / D: P mixes elements, and a mean of squares hides small
    ones.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None for (0.9, 0.999).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        paper: Follow the authors' code: sums over subsets, the complement and ε also corrected for bias, and a new
            subspace by SVD at step 1 and at every multiple of 200, for all weights at once: these steps take longer.
            With ``eps=1e-6``, as theirs, steps are equal until the second subspace. Then theirs uses the coordinates
            of the old momentum in the new basis for one step, and drops that step's gradient from the momentum. This
            is not copied, since the signs of singular vectors are arbitrary. Theirs also multiplies by 1 − ηλ after
            the update, and has no ``max_update``.
        options: Any other option of :class:`MemOpt`. The defaults are ``rank`` 1/8 of the short side, at least 4,
            ``gap`` 10, ``projection`` ``power``, ``handover`` ``reset`` and ``reduction`` ``mean``.
    """

    _recipe = "adam_snsm"
    _paper: Mapping[str, Any] = {
        "reduction": "sum",
        "correct_complement": True,
        "correct_eps": True,
        "gap": 200,
        "stagger": False,
        "projection": "svd",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        paper: bool = False,
        **options: Any,
    ) -> None:
        if paper:
            options |= {key: value for key, value in self._paper.items() if options.get(key) is None}
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class AdaGradSNSM(AdamSNSM):
    """AdaGrad with Subset-Norm and Subspace-Momentum on linear weights, as its authors define it (arXiv 2411.07120).

    V ← V + sum(G²) over each row or column (β₂ = 1), without bias correction: U = X Pᵀ + (G − G P Pᵀ), D = √V + ε.
    Betas (0.9, 1).

    State: as in :class:`AdamSNSM`. Learning rate: AdaGrad's, far larger than AdamW's, since V only grows. The best one
    in ``docs/benchmarks/convergence.md`` was 180 times AdamW's.

    With ``paper=True, eps=1e-6``, steps equal those of the authors' code as far as those of :class:`AdamSNSM` do.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None for (0.9, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        paper: Follow the authors' code: a new subspace by SVD at step 1 and at every multiple of 200, for all weights
            at once. These steps take longer.
        options: As for :class:`AdamSNSM`, but the default ``reduction`` is ``sum``.
    """

    _recipe = "adagrad_snsm"
    _paper: Mapping[str, Any] = {"gap": 200, "stagger": False, "projection": "svd"}


class AdamMini(RecipeOptimizer):
    """Adam-mini: one second-moment number per block of the Hessian's structure (arXiv 2406.16793).

    V ← β₂ V + (1−β₂) mean(G²) over each attention head for queries and keys, if the head size is known (bind the model,
    or give ``head_dim``), and over each output for all other matrices (for embeddings, each token)::

        W ← (1 − ηλ) W − η · M / (1−β₁ᵗ) / (√(V / (1−β₂ᵗ)) + ε)

    State: AdamW's momentum, and almost no second moment: 50% of AdamW's. Learning rate: AdamW's.
    """

    _recipe = "adam_mini"


class Adafactor(RecipeOptimizer):
    """Adafactor's factored second moment without momentum (arXiv 1804.04235, section 3).

    a ← β₂ a + (1−β₂) mean_n(G²), c ← β₂ c + (1−β₂) mean_m(G²)::

        W ← (1 − ηλ) W − η · G / (√(a cᵀ / mean(a) / (1−β₂ᵗ)) + ε)

    Omits the paper's relative step sizes and its schedule of β₂, and replaces its clipping by a bound per element
    (``max_update``). Use it to compare Adafactor's second moment within AdamW's update. State: m + n numbers for an
    m × n weight, under 1% of AdamW's. Learning rate: AdamW's or less, since there is no momentum.
    """

    _recipe = "adafactor"


class SCALE(RecipeOptimizer):
    """SCALE: gradients over the norms of their own columns, with momentum for the head only (arXiv 2506.16659).

    With M ← β₁ M + (1−β₁) G for the head and M = G elsewhere::

        W ← (1 − ηλ) W − η M / (rms(M) + ε)

    where rms is over the weights of each output: a row of a linear weight, a column of an embedding. In the authors'
    code, 1e-8 is a lower bound of the root instead of a summand. Vectors get AdamW's update, as there. An embedding
    that is also the head counts as an embedding.

    Defaults: betas (0.9, 0.999); the second one is for vectors.
    State: the head's momentum, and AdamW's state of vectors: 1 to 14% of AdamW's on LLaMA shapes, under 0.1% where
    embeddings are tied.
    Learning rate: AdamW's, since every row has an update of unit size: 1e-3 at 60M and 130M parameters and 2e-4 at 1B
    in the paper, after 10% warmup. Vectors have a higher one there, 5 times (1B) or 20 times the others':
    ``overrides={"vector": {"lr_multiplier": 5}}``.
    """

    _recipe = "scale"


class Muon(RecipeOptimizer):
    """Muon: orthogonalized momentum for hidden matrices, AdamW for the rest (kellerjordan.github.io/posts/muon).

    With M ← β₁ M + (1−β₁) G and N = β₁ M + (1−β₁) G, or N = M without ``nesterov``::

        X ← N / ‖N‖,   5 times: X ← a X + b X XᵀX + c X (XᵀX)²,   W ← (1 − ηλ) W − η · 0.2 √max(m, n) · X

    All of it follows from the k × k matrix NᵀN of the short side, in float64, so ranks that hold some rows need one
    sum. ``torch.optim.Muon`` makes the same update of matrices, up to its iteration in bfloat16. Embeddings, heads,
    routers, vectors and weights of unknown role get AdamW's update, with the same rate, betas and ε; the authors' code
    gives them a rate of their own, ε = 1e-10, and a β₁ of 0.9 or 0.8.

    Defaults: betas (0.95, 0.95).
    State: half of AdamW's for hidden matrices. Learning rate: AdamW's, thanks to the factor (arXiv 2502.16982). With
    ``adjust_lr_fn="original"``, which replaces it by √max(1, outputs / inputs), about 0.02, and a smaller
    ``lr_multiplier`` for embeddings, heads and vectors.

    Args:
        params: As for :class:`MemOpt`.
        lr: Learning rate.
        betas: Decay rates; None for (0.95, 0.95). The first one is torch's ``momentum``.
        eps: Added to AdamW's denominator.
        weight_decay: Decoupled weight decay.
        nesterov: Orthogonalize N, instead of M.
        ns_coefficients: a, b and c of the iteration; None for torch's.
        ns_steps: Number of iterations; None for 5.
        adjust_lr_fn: What scales X: ``match_rms_adamw`` (0.2 √max(m, n), also for None) or ``original``.
        options: Any other option of :class:`MemOpt`.
    """

    _recipe = "muon"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | None = None,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        **options: Any,
    ) -> None:
        options |= {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        # Not for AdamW's momentum, which has the option as well: without one for all, the recipe's is True.
        options["nesterov"] = None if nesterov is True else nesterov
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class GaLore(RecipeOptimizer):
    """GaLore: Adam in the leading subspace of the gradient (arXiv 2403.03507).

    For linear weights of attention and MLP, m ≥ n (wide ones are transposed). All other weights get AdamW. Every
    ``gap`` steps, P becomes the k leading right singular vectors of G. M and V keep their numbers::

        R = G P,  M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²
        W ← (1 − ηλ) W − η · ``scale`` · √(1−β₂ᵗ) / (1−β₁ᵗ) · M / (√V + ε) Pᵀ

    Defaults: betas (0.9, 0.999), ``rank`` 1/4 of the short side, ``gap`` 200, ``scale`` 0.25, ``projection`` ``svd``.
    State: k(2m + n) numbers for an m × n weight, and AdamW's state for embeddings and head. Learning rate: the authors
    use 0.01 for LLaMA from 60M to 1B, with warmup, and ε = 1e-6.

    Differences from the authors' package: blocks take turns with new subspaces, where the package renews all of them at
    steps 1, ``gap`` + 1, 2 ``gap`` + 1; signs of singular vectors are fixed, where the package has LAPACK's, so M
    continues otherwise in a new subspace; directions that G lacks when P is chosen do not move until the next P, where
    the package divides rounding noise by its own size; weight decay acts before the update; no element changes by more
    than ``max_update`` · η.
    """

    _recipe = "galore"


class Fira(RecipeOptimizer):
    """Fira: GaLore, and the rest of the gradient, scaled by norms (arXiv 2410.01623).

    P, R, M and V as in :class:`GaLore`, N = M / (√V + ε), a = ``scale``, and one s for each row of a tall weight (each
    column of a wide one)::

        S = s (G − a R Pᵀ),  s = ‖N‖ / ‖R‖,  S ← S · min(1, ``growth`` ‖S₋‖ / ‖S‖)
        W ← (1 − ηλ) W − η · √(1−β₂ᵗ) / (1−β₁ᵗ) · (a N Pᵀ + S)

    As in the authors' code, S holds the part 1 − a of the gradient inside the subspace, too.

    Defaults: betas (0.9, 0.999), ``rank`` 1/4 of the short side, ``gap`` 200, ``scale`` 0.25, ``projection`` ``svd``,
    ``growth`` 1.01. State: as in :class:`GaLore`, and one number for each weight. Learning rate: the authors use 0.01
    for LLaMA from 60M to 1B, with warmup, and at 1B a ``scale`` of 0.0625.

    Differences from the authors' package: those of :class:`GaLore`; no 1e-8 is added to norms, so that gradients of any
    size do; a step without a gradient leaves the limiter as it is.
    """

    _recipe = "fira"


class Apollo(RecipeOptimizer):
    """APOLLO: the gradient, scaled by what Adam does to the norms of a random sketch of it (arXiv 2412.05270).

    For linear weights of attention and MLP, m ≥ n (wide ones are transposed). All other weights get AdamW. P is random,
    n × k with variance 1/k, new every ``gap`` steps and never stored; one s for each row (each column of a wide
    weight)::

        R = G P,  M ← β₁ M + (1−β₁) R,  V ← β₂ V + (1−β₂) R²,  N = M / (√V + ε)
        S = s G,  s = ‖N‖ / ‖R‖,  S ← S · min(1, ``growth`` ‖S₋‖ / ‖S‖)
        W ← (1 − ηλ) W − η · ``scale`` · √(1−β₂ᵗ) / (1−β₁ᵗ) · S

    Defaults: betas (0.9, 0.999), ``rank`` 1/4 of the short side, ``gap`` 200, ``scale`` 1, ``scaling`` ``channel``,
    ``growth`` 1.01. State: 2km + 1 numbers for an m × n weight, and AdamW's state for embeddings and head. Learning
    rate: the authors use 0.01 for LLaMA from 60M to 1B, with warmup, and ε = 1e-6.

    Differences from the authors' package: ``scale`` is the factor itself, where the package takes the root of its
    option; P comes from another generator, and all matrices of a stack share it; blocks take turns with new
    projections; no 1e-8 is added to norms; a step without a gradient leaves the limiter as it is; weight decay acts
    before the update; no element changes by more than ``max_update`` · η, which cuts the largest elements of
    :class:`ApolloMini` where inputs differ much in size. Whether the limiter comes before or after the scale
    (``scale_front``) changes nothing.
    """

    _recipe = "apollo"


class ApolloMini(Apollo):
    """APOLLO-Mini: APOLLO with a sketch of rank 1 and one factor for each weight (arXiv 2412.05270).

    As :class:`Apollo`, with s = ‖N‖ / ‖R‖ of the whole matrix.

    Defaults: ``rank`` 1, ``scale`` √128 (128 in the authors' package), ``scaling`` ``tensor``. State: 2m + 1 numbers
    for an m × n weight, and AdamW's state for embeddings and head. Learning rate: as for :class:`Apollo`.
    """

    _recipe = "apollo_mini"
