"""A number for each pair (i, j) of a query and a key: where it lies, and tiles of it.

A tensor [B, Hq, Nq, Nk] of which any axis may be 1; such an axis has the stride None, a constexpr, so
that a bias of keys is read as a row and not as a tile.  What lies outside the tensor is read as 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common.triton_dtypes import narrow


class Place(NamedTuple):
    """Where in the call a tile lies: batch (or sequence), query head, and the lengths there."""

    b: Any
    h: Any
    Nq: Any
    Nk: Any


class Pairs(NamedTuple):
    p: Any
    stride_b: Any
    stride_h: Any
    stride_i: Any
    stride_j: Any
    num_i: Any
    num_j: Any
    num_b: Any  # None unless batches take them in turn
    IS_WIDE: Any  # constexpr: places inside a head pass 2^31


def pairs(t, num=None):
    """A tensor of at most four axes, aligned at the last; of ``num`` batches, if it may have fewer of its own."""
    t = t[(None,) * (4 - t.dim())]
    strides = (None if n == 1 else stride for n, stride in zip(t.shape, t.stride()))
    num_i, num_j = t.shape[2:]
    is_wide = (num_i + 256) * t.stride(2) + (num_j + 256) * t.stride(3) >= 1 << 31
    num_b = None if num is None or t.shape[0] in (1, num) else t.shape[0]
    return Pairs(t, *strides, num_i, num_j, num_b, tl.constexpr(is_wide))


@triton.jit
def _p_head(t, place):
    p = t.p
    if t.stride_b is not None:
        b = place.b if t.num_b is None else place.b % t.num_b
        p += tl.cast(b, tl.int64) * t.stride_b
    if t.stride_h is not None:
        p += tl.cast(place.h, tl.int64) * t.stride_h
    return p


@triton.jit
def _at(t, x, stride):
    return (x.to(tl.int64) if t.IS_WIDE else x) * stride


@triton.jit
def load(t, place, i, j):
    """At queries i and keys j, one of them a column and the other a row."""
    p = _p_head(t, place)
    if t.stride_i is not None and t.stride_j is not None:
        inside = (i < t.num_i) & (j < t.num_j)
        x = tl.load(p + (_at(t, i, t.stride_i) + _at(t, j, t.stride_j)), mask=inside, other=0)
    elif t.stride_i is not None:
        x = tl.load(p + _at(t, i, t.stride_i), mask=i < t.num_i, other=0)
    elif t.stride_j is not None:
        x = tl.load(p + _at(t, j, t.stride_j), mask=j < t.num_j, other=0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def store(t, place, i, j, x):
    """Write float32 x, of the shape of i and j together; what lies past the tensor's ends is dropped."""
    p = _p_head(t, place) + tl.zeros_like(i + j)
    inside = (i < t.num_i) & (j < t.num_j)
    if t.stride_i is not None:
        p += _at(t, i, t.stride_i)
    if t.stride_j is not None:
        p += _at(t, j, t.stride_j)
    tl.store(p, narrow(x, t.p.dtype.element_ty), mask=inside)
