"""Masks inside Triton kernels: which pairs (i, j) are visible, and which ranges can be skipped.

A mask crosses from Python as integers (fastattn/masks.py, ``encode``); ``encode`` below turns them
into the NamedTuple that kernels carry, and the functions after it are all that a kernel may ask:

    visible(mask, i, j)                  the definition, elementwise
    keys(mask, i0, i1, Nq, Nk)           range of keys that some query of [i0, i1) may see
    keys_all(mask, i0, i1, Nq, Nk)       range of keys that every query of [i0, i1) sees
    queries(mask, j0, j1, Nq, Nk)        the same two questions the other way round
    queries_all(mask, j0, j1, Nq, Nk)

Ranges are [begin, end) with 0 <= begin; end may lie before begin, which means none.

A new mask adds a NamedTuple and its row in ``_KINDS``, gives every mask a constexpr field that
tells them apart, and branches on it in these functions.  Kernels do not change.  The same masks in
C++ are in csrc/core/masks.h.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

FAR = 1 << 30  # beyond every sequence; no bound at all


class Band(NamedTuple):
    """Keys j with lo <= j - i <= hi: full, causal and windowed masks, and their intersections."""

    lo: Any
    hi: Any


def _band(bounds, Nq, Nk):
    left, right, left_top, right_top = bounds
    shift = Nk - Nq  # the last query stands at the last key
    # An absent bound is one number whatever the lengths: Triton compiles a kernel again for other
    # kinds of numbers (1, multiples of 16).
    return Band(
        lo=max(-FAR if left >= FAR else shift - left, -left_top),
        hi=min(FAR if right >= FAR else shift + right, right_top),
    )


_KINDS = (_band,)  # in the order of fastattn.masks.KINDS


def encode(code, Nq, Nk):
    """The mask that kernels carry, of the integers [kind, parameters...]."""
    kind, *parameters = code
    return _KINDS[kind](parameters, Nq, Nk)


@triton.jit
def visible(mask, i, j):
    """One of i and j is a column [n, 1], the other a row [1, n].

    The column does the arithmetic: a thread holds few rows of a tile and many columns.
    """
    if i.shape[1] == 1:
        seen = (j >= i + mask.lo) & (j <= i + mask.hi)
    else:
        seen = (i <= j - mask.lo) & (i >= j - mask.hi)
    return seen


@triton.jit
def keys(mask, i0, i1, Nq, Nk):
    return tl.maximum(i0 + mask.lo, 0), tl.minimum(i1 + mask.hi, Nk)


@triton.jit
def keys_all(mask, i0, i1, Nq, Nk):
    return tl.maximum(i1 - 1 + mask.lo, 0), tl.minimum(i0 + mask.hi + 1, Nk)


@triton.jit
def queries(mask, j0, j1, Nq, Nk):
    return tl.maximum(j0 - mask.hi, 0), tl.minimum(j1 - mask.lo, Nq)


@triton.jit
def queries_all(mask, j0, j1, Nq, Nk):
    return tl.maximum(j1 - 1 - mask.hi, 0), tl.minimum(j0 - mask.lo + 1, Nq)


class Walk(NamedTuple):
    """The tiles to visit along one axis: [full_begin, full_end) is full, the others are partial."""

    full_begin: Any
    full_end: Any
    num_partial: Any
    begin: Any
    num_left: Any


@triton.jit
def walk(some, all, B: tl.constexpr):
    """Tiles of B, at multiples of B, that cover the range ``some``; those inside ``all`` are full.

        begin        full_begin            full_end        end
          |  partial  |   full   |   full   |   partial  |·····

    A full tile also lies inside the tensor, since ``all`` does.
    """
    begin = some[0] // B * B
    end = tl.maximum(some[1], begin)
    full_begin = tl.cdiv(all[0], B) * B
    full_end = tl.maximum(all[1], 0) // B * B
    if full_begin >= full_end:
        full_begin = begin
        full_end = begin
    num_left = (full_begin - begin) // B
    return Walk(full_begin, full_end, num_left + tl.cdiv(end - full_end, B), begin, num_left)


@triton.jit
def partial(w, t, B: tl.constexpr):
    """Where the t-th partial tile begins: first those before the full ones, then those after."""
    return tl.where(t < w.num_left, w.begin + t * B, w.full_end + (t - w.num_left) * B)
