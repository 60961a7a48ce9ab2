"""Biases and weights: a float for each pair (i, j), in one of the three forms of fastattn/bias.py.

    values   [B|1, Hq|1, Nq|1, Nk|1]                 as it stands
    table    [Hq|1, 2 L - 1]                         by offset: j - (i + Nk - Nq) + L - 1
    table    [Hq|1, T], index int32 [Nq, Nk]         by index

``value(term, place, i, j)`` is all that a kernel asks.  Places in tables are clamped to them: an
index is not looked at before it is used; of an empty table everything is 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common import triton_pairs as pairs

VALUES, OFFSET, INDEX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Values(NamedTuple):
    pairs: Any
    FORM: Any  # last, as masks' KIND


class Table(NamedTuple):
    """Entry t of head h lies at  p + h stride_h + t stride_t."""

    p: Any
    stride_h: Any
    stride_t: Any
    last: Any  # the greatest t
    index: Any  # pairs, or None by offset
    FORM: Any


def encode(values, index, num=None):
    """The term that kernels carry, None where there is none; ``num`` batches take its own in turn."""
    if values is None:
        return None
    if values.dim() == 4:
        return Values(pairs.pairs(values, num), VALUES)
    H, T = values.shape
    return Table(
        values, values.stride(0) if H > 1 else 0, values.stride(1), T - 1,
        None if index is None else pairs.pairs(index), OFFSET if index is None else INDEX,
    )  # fmt: skip


@triton.jit
def value(term, place, i, j):
    """float32, of a shape that broadcasts to that of i and j."""
    if term.FORM == VALUES:
        x = pairs.load(term.pairs, place, i, j)
    else:
        if term.FORM == OFFSET:
            t = j - i - (place.Nk - place.Nq) + term.last // 2
        else:
            t = pairs.load(term.index, place, i, j)
        t = tl.minimum(tl.maximum(t, 0), term.last)
        x = tl.load(term.p + (place.h * term.stride_h + t * term.stride_t), mask=t >= 0, other=0)
    return x.to(tl.float32)
