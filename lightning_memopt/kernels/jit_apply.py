"""The kernel that updates weights. Importing this file imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# The numbers of splitmix64, as in ``kinds/noise.py``.
STEP = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _start(table, matrix, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a matrix starts."""
    start = tl.load(table + matrix).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def _root(
    square, matrix, row, column, inner_m, inner_n, m, n, first, second,
    HOW: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the root of a square, as a column, a row or a tile."""
    rows = row + inner_m
    columns = column + inner_n
    if HOW == "row":
        value = tl.load(square + matrix * m + rows, mask=rows < m, other=1.0)[:, None]
    elif HOW == "column":
        value = tl.load(square + matrix * n + columns, mask=columns < n, other=1.0)[None, :]
    else:
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        if HOW == "run":  # ``first`` numbers per row, each for ``second`` columns
            start = square + (matrix * m + row) * first
            place = inner_m[:, None] * first + (columns // second)[None, :]
        else:  # ``first`` and ``second`` are the strides of a stack
            start = _start(square, matrix, ELEMENT, ALIGNED) + row * first + column * second
            place = inner_m[:, None] * first + inner_n[None, :] * second
        value = tl.load(start + place, mask=inside, other=1.0)
    return tl.sqrt_rn(value.to(tl.float32))


@triton.jit
def _noise(bases, matrix, row, column, inner_m, inner_n, noise_m, noise_n):
    """Return 16 random bits for each element: a hash of its position."""
    position = (row + inner_m)[:, None] * noise_m + (column + inner_n)[None, :] * noise_n
    mixed = position * STEP + tl.load(bases + matrix)
    mixed = (mixed ^ ((mixed >> 30) & ((1 << 34) - 1))) * FIRST_FACTOR
    mixed = (mixed ^ ((mixed >> 27) & ((1 << 37) - 1))) * SECOND_FACTOR
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return ((mixed >> 40) & 0xFFFF).to(tl.int32)


@triton.jit
def apply_kernel(
    weights, low, base, first, second, left, right, bases, factors, hits, lost,
    m, n, q, tiles_n,
    weight_m, weight_n, low_m, low_n, base_m, base_n, first_m, first_n, second_m, second_n,
    left_b, left_m, left_q, right_b, right_q, right_n, noise_m, noise_n,
    keep, scale, step, limit, correction, eps, largest,
    WEIGHT: tl.constexpr, LOW: tl.constexpr, EXTRA: tl.constexpr, BASE: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, FIRST_HOW: tl.constexpr, SECOND_HOW: tl.constexpr,
    ALIGNED: tl.constexpr, FACTORS: tl.constexpr, BOUNDED: tl.constexpr, COUNTED: tl.constexpr, CHECKED: tl.constexpr,
    NOISY: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Update one tile: W ← keep · W + step · min(max(U / D, −limit), limit).

    Grid: tiles, matrices.
    """
    # Offsets of whole tiles, which may be beyond 2³¹ elements, are wide; those inside a tile are not.
    matrix = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    column = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    inner_m = tl.arange(0, BLOCK_M)
    inner_n = tl.arange(0, BLOCK_N)
    inside_m = (row + inner_m < m)[:, None]
    inside_n = (column + inner_n < n)[None, :]
    inside = inside_m & inside_n

    update = tl.load(
        _start(base, matrix, BASE, ALIGNED) + row * base_m + column * base_n
        + (inner_m[:, None] * base_m + inner_n[None, :] * base_n),
        mask=inside, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if FACTORS:
        inner_q = tl.arange(0, BLOCK_Q)
        lefts = left + matrix * left_b + row * left_m + (inner_m[:, None] * left_m + inner_q[None, :] * left_q)
        rights = right + matrix * right_b + column * right_n + (inner_q[:, None] * right_q + inner_n[None, :] * right_n)
        update = update * scale
        for place in range(0, q, BLOCK_Q):
            some = place + inner_q < q
            one = tl.load(lefts + place * left_q, mask=inside_m & some[None, :], other=0.0)
            other = tl.load(rights + place * right_q, mask=some[:, None] & inside_n, other=0.0)
            update = tl.dot(one, other, update, input_precision=PRECISION)

    if FIRST_HOW == "none":
        change = update * step
    else:
        divisor = _root(first, matrix, row, column, inner_m, inner_n, m, n, first_m, first_n, FIRST_HOW, FIRST, ALIGNED)
        divisor = tl.div_rn(divisor, correction)
        if SECOND_HOW != "none":
            divisor = divisor * _root(
                second, matrix, row, column, inner_m, inner_n, m, n, second_m, second_n, SECOND_HOW, SECOND, ALIGNED
            )
        divisor = tl.broadcast_to(divisor + eps, (BLOCK_M, BLOCK_N))
        if BOUNDED:
            quotient = tl.div_rn(update, divisor)
            if COUNTED:
                beyond = (tl.abs(quotient) > limit) & inside
                tl.atomic_add(hits, tl.sum(tl.sum(beyond.to(tl.int32), axis=1), axis=0).to(tl.int64))
            # Not tl.clamp: NaN has to stay NaN.
            quotient = tl.where(quotient > limit, limit, quotient)
            change = tl.where(quotient < -limit, -limit, quotient) * step
        else:
            change = tl.div_rn(update * step, divisor)

    if SCALED:
        change = change * tl.load(factors + matrix)
    places = _start(weights, matrix, WEIGHT, ALIGNED) + row * weight_m + column * weight_n
    places = places + (inner_m[:, None] * weight_m + inner_n[None, :] * weight_n)
    if EXTRA:
        halves = places.to(tl.pointer_type(tl.int16), bitcast=True)
        extra = _start(low, matrix, LOW, ALIGNED) + row * low_m + column * low_n
        extra = extra + (inner_m[:, None] * low_m + inner_n[None, :] * low_n)
        upper = tl.load(halves, mask=inside, other=0).to(tl.int32) << 16
        lower = tl.load(extra, mask=inside, other=0).to(tl.int32) << (16 - EXTRA)
        # Of a weight that something else has set to zero: less than zero is no number.
        lower = tl.where(((upper << 1) == 0) & (lower < 0), 0, lower)
        before = (upper + lower).to(tl.float32, bitcast=True)
    else:
        before = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    value = before * keep + change
    if CHECKED:
        fits = tl.abs(value) <= largest
        tl.atomic_add(lost, tl.sum(tl.sum((inside & ~fits).to(tl.int32), axis=1), axis=0).to(tl.int64))
        value = tl.where(fits, value, before)
    if EXTRA:
        bits = value.to(tl.int32, bitcast=True)
        if EXTRA < 16:
            dropped: tl.constexpr = (1 << (16 - EXTRA)) - 1
            if NOISY:
                up = _noise(bases, matrix, row, column, inner_m, inner_n, noise_m, noise_n) & dropped
            else:  # to nearest, and halves to even
                up = (dropped >> 1) + ((bits >> (16 - EXTRA)) & 1)
            bits = (bits + up) & ~dropped
        upper = (bits + 0x8000) >> 16
        tl.store(halves, upper.to(tl.int16), mask=inside)
        tl.store(extra, ((bits - (upper << 16)) >> (16 - EXTRA)).to(LOW), mask=inside)
    elif tl.bfloat16 == WEIGHT:
        bits = value.to(tl.int32, bitcast=True)
        if NOISY:
            noise = _noise(bases, matrix, row, column, inner_m, inner_n, noise_m, noise_n)
        else:  # to nearest, and halves to even
            noise = 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(tl.abs(value) < float("inf"), bits + noise, bits) >> 16
        tl.store(places.to(tl.pointer_type(tl.int16), bitcast=True), bits.to(tl.int16), mask=inside)
    else:
        tl.store(places, value.to(WEIGHT), mask=inside)
