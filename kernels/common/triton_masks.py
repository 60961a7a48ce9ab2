"""Masks inside Triton kernels: which pairs (i, j) are visible, and which tiles can be skipped.

A mask crosses from Python as a formula in postfix order (fastattn/masks.py, ``KINDS``); ``encode``
below turns it into the NamedTuples that kernels carry, and the functions after it are all that
a kernel may ask.  ``place`` says which batch and query head, and how long they are (triton_pairs).

    visible(mask, place, i, j)           the definition, elementwise
    keys(mask, i0, i1, Nq, Nk)           range of keys outside which no query of [i0, i1) sees any
    queries(mask, j0, j1, Nq, Nk)        the same the other way round
    keys_all(mask, i0, i1, Nq, Nk)       range of keys that every query of [i0, i1) sees
    queries_all(mask, j0, j1, Nq, Nk)
    found(mask, place, i0, i1, j0, j1)   of the pairs [i0, i1) x [j0, j1): ALL are visible, SOME may
                                         be, or NONE is

Ranges are [begin, end) with 0 <= begin; end may lie before begin, which means none.  Those of a band
are tight; of other masks ``all`` is empty, and tiles are asked for with ``found``.

``found`` is exact where a part of the mask is regular (band, prefix, dilated) and looks at the data
where it is not: the blocks of the layout that a tile meets, or the tile of the bool tensor.  Of ``&``
it is the least and of ``|`` the most of both sides, which may say SOME for ALL or NONE, never more.

In groups i and j are slots and masks speak of the tokens in them: ``of_tokens`` puts the slots around a mask.

A new mask adds a NamedTuple, its row in ``_KINDS`` and a branch on its KIND in these functions.
Kernels do not change.  The same masks in C++ are in csrc/core/masks.h.

One file because all answers about a mask must agree.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import triton_pairs as pairs
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common.triton_pairs import Place

FAR = 1 << 30  # beyond every sequence; no bound at all
FAR_AWAY = tl.constexpr(FAR)
WIDTH = 6  # integers a node, as in fastattn/masks.py
NONE, SOME, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The kinds of nodes, after fastattn/masks.py, and bands whose limits are still to be found.  A KIND is
# the last field of its node: Triton 3.6 forgets constants inside a tuple's tuples if none follows them.
BAND, DILATED, PREFIX, BLOCKS, DENSE, AND, OR, BOUNDS, FORMULA, TOKENS = map(
    tl.constexpr, range(10)
)


class Band(NamedTuple):
    """Keys j with lo <= j - i <= hi: full, causal and windowed masks, and their intersections."""

    lo: Any
    hi: Any
    KIND: Any


class Bounds(NamedTuple):
    """A band as fastattn.masks.Band says it, for lengths that only the GPU knows."""

    left: Any
    right: Any
    left_top: Any
    right_top: Any
    KIND: Any


class Dilated(NamedTuple):
    """Keys at most ``reach`` away from the query's position, a multiple of ``step``."""

    reach: Any
    step: Any
    KIND: Any


class Prefix(NamedTuple):
    """The first n keys."""

    n: Any
    KIND: Any


class Blocks(NamedTuple):
    """Blocks of ``block`` queries by ``block`` keys, by a layout [H|1, num_i, num_j] of bytes.

    A tile meets at most MEETS_I by MEETS_J of them (powers of two).
    """

    p: Any
    stride_h: Any
    num_i: Any
    num_j: Any
    block: Any
    MEETS_I: Any
    MEETS_J: Any
    KIND: Any


class Dense(NamedTuple):
    """A bool tensor, as bytes; ``found`` looks at tiles of BM x BN of it."""

    bytes: Any
    BM: Any
    BN: Any
    KIND: Any


class Operator(NamedTuple):
    """Puts the two masks before it together: KIND is AND or OR."""

    KIND: Any


class Formula(NamedTuple):
    """Several nodes in postfix order, of which no more than four values wait at any time."""

    nodes: Any
    NUM: Any
    KIND: Any


class Tokens(NamedTuple):
    """A mask of Nq x Nk tokens for the slots that hold them; tokens of other labels are hidden from each other."""

    mask: Any
    q: Any  # slots
    k: Any
    ends_q: Any
    ends_k: Any
    heads: Any  # as How's: the slots of keys are those of a key head
    group: Any
    Nq: Any
    Nk: Any
    BM: Any
    BN: Any
    KIND: Any


class Call(NamedTuple):
    """What nodes are made of beside their parameters."""

    Nq: Any
    Nk: Any
    is_packed: Any
    blocks: Any
    visible: Any
    BM: Any
    BN: Any


def _band(call, left, right, left_top, right_top, _):
    if call.is_packed:
        return Bounds(left, right, left_top, right_top, BOUNDS)
    shift = call.Nk - call.Nq  # the last query stands at the last key
    # An absent bound is one number whatever the lengths: Triton compiles a kernel again for other
    # kinds of numbers (1, multiples of 16).
    return Band(
        lo=max(-FAR if left >= FAR else shift - left, -left_top),
        hi=min(FAR if right >= FAR else shift + right, right_top),
        KIND=BAND,
    )


def _dilated(call, reach, step, *_):
    return Dilated(reach, step, DILATED)


def _prefix(call, n, *_):
    return Prefix(n, PREFIX)


def _blocks(call, offset, H, num_i, num_j, block):
    layout = call.blocks.view(torch.uint8)[offset:]
    meets = (min(B, triton.next_power_of_2((B - 2) // block + 2)) for B in (call.BM, call.BN))
    return Blocks(
        layout,
        num_i * num_j if H > 1 else 0,
        num_i,
        num_j,
        block,
        *map(tl.constexpr, meets),
        BLOCKS,
    )


def _dense(call, *_):
    seen = pairs.pairs(call.visible.view(torch.uint8))
    return Dense(seen, tl.constexpr(call.BM), tl.constexpr(call.BN), DENSE)


_KINDS = (_band, _dilated, _prefix, _blocks, _dense, AND, OR)  # in the order of fastattn.masks


def encode(code, Nq, Nk, is_packed=False, blocks=None, visible=None, BM=64, BN=64):
    """The mask that kernels carry, of the formula [kind, five parameters, kind, ...]."""
    call = Call(Nq, Nk, is_packed, blocks, visible, BM, BN)
    stack = []  # (how many values wait at once, nodes)
    for at in range(0, len(code), WIDTH):
        make = _KINDS[code[at]]
        if isinstance(make, tl.constexpr):
            (less, second), (more, first) = sorted((stack.pop(), stack.pop()), key=lambda x: x[0])
            stack.append((max(more, less + 1), [*first, *second, Operator(make)]))
        else:
            stack.append((1, [make(call, *code[at + 1 : at + WIDTH])]))
    ((_, nodes),) = stack
    if len(nodes) == 1:
        return nodes[0]
    # A constant behind the nodes, as behind everything that holds tuples.
    return Formula((*nodes, tl.constexpr(0)), tl.constexpr(len(nodes)), FORMULA)


def of_tokens(mask, q, k, ends_q, ends_k, heads, group, Nq, Nk, BM, BN):
    """``mask`` asked by slots, ``found`` of tiles of BM x BN of them."""
    BM, BN = tl.constexpr(BM), tl.constexpr(BN)
    return Tokens(mask, q, k, ends_q, ends_k, heads, group, Nq, Nk, BM, BN, TOKENS)


def is_band(mask):
    """Whether ranges say everything, so that tiles need not be asked one by one."""
    return isinstance(mask, (Band, Bounds))


# ---- Elementwise --------------------------------------------------------------------------------


@triton.jit
def visible(mask, place, i, j):
    """One of i and j is a column [n, 1], the other a row [1, n]."""
    if mask.KIND == TOKENS:
        at_i, at_j = _tokens(mask, place, i, j)
        here = Place(place.b // mask.ends_q.num, place.h, mask.Nq, mask.Nk)
        # What is no token asks for the first one, and is hidden.
        seen = _visible_to(mask.mask, here, tl.maximum(at_i, 0), tl.maximum(at_j, 0))
        seen = seen & (at_i >= 0) & (at_j >= 0)
        if mask.q.HAS_LABELS:
            hk = rows.key_head(mask, place.h, mask.group)
            label_i = rows.labels(mask.q, mask.ends_q, place.b, place.h, i, place.Nq)
            seen = seen & (label_i == rows.labels(mask.k, mask.ends_k, place.b, hk, j, place.Nk))
    else:
        seen = _visible_to(mask, place, i, j)
    return seen


@triton.jit
def _tokens(mask, place, i, j):
    """The tokens of slots i of queries and j of keys, below 0 for none."""
    hk = rows.key_head(mask, place.h, mask.group)
    at_i = rows.tokens(mask.q, mask.ends_q, place.b, place.h, i, place.Nq)
    return at_i, rows.tokens(mask.k, mask.ends_k, place.b, hk, j, place.Nk)


@triton.jit
def _visible_to(mask, place, i, j):
    """The same of any mask but that of slots."""
    if mask.KIND == FORMULA:
        seen = _visible(mask.nodes[0], place, i, j)
        second, third, fourth = seen, seen, seen  # what waits; no recursion, which Triton 3.4 lacks
        for n in tl.static_range(1, mask.NUM):
            if mask.nodes[n].KIND == AND:
                seen, second, third = seen & second, third, fourth
            elif mask.nodes[n].KIND == OR:
                seen, second, third = seen | second, third, fourth
            else:
                second, third, fourth = seen, second, third
                seen = _visible(mask.nodes[n], place, i, j)
    else:
        seen = _visible(mask, place, i, j)
    return seen


@triton.jit
def _visible(mask, place, i, j):
    """Of one node.  The column does the arithmetic: a thread holds few rows of a tile and many columns."""
    if mask.KIND == BAND or mask.KIND == BOUNDS:
        lo, hi = _limits(mask, place.Nq, place.Nk)
        if i.shape[1] == 1:
            seen = (j >= i + lo) & (j <= i + hi)
        else:
            seen = (i <= j - lo) & (i >= j - hi)
    elif mask.KIND == DILATED:
        away = j - i - (place.Nk - place.Nq)
        seen = (tl.abs(away) <= mask.reach) & (away % mask.step == 0)
    elif mask.KIND == PREFIX:
        seen = j < mask.n
    elif mask.KIND == BLOCKS:
        seen = _layout(mask, place, i // mask.block, j // mask.block) != 0
    else:
        seen = pairs.load(mask.bytes, place, i, j) != 0
    return seen


@triton.jit
def _limits(mask, Nq, Nk):
    """The limits of a band on j - i."""
    if mask.KIND == BAND:
        lo, hi = mask.lo, mask.hi
    else:
        lo = tl.where(mask.left >= FAR_AWAY, -FAR_AWAY, Nk - Nq - mask.left)
        hi = tl.where(mask.right >= FAR_AWAY, FAR_AWAY, Nk - Nq + mask.right)
        lo, hi = tl.maximum(lo, -mask.left_top), tl.minimum(hi, mask.right_top)
    return lo, hi


@triton.jit
def _layout(mask, place, bi, bj):
    """The layout at rows bi [n, 1] or [1, n] of blocks and columns bj the other way; 0 outside."""
    p_head = mask.p + tl.cast(place.h, tl.int64) * mask.stride_h
    inside = (bi < mask.num_i) & (bj < mask.num_j)
    return tl.load(p_head + (bi.to(tl.int64) * mask.num_j + bj), mask=inside, other=0)


# ---- Ranges -------------------------------------------------------------------------------------


@triton.jit
def keys(mask, i0, i1, Nq, Nk):
    if mask.KIND == FORMULA:
        begin, end = _keys(mask.nodes[0], i0, i1, Nq, Nk)
        begin2, begin3, begin4 = begin, begin, begin
        end2, end3, end4 = end, end, end
        for n in tl.static_range(1, mask.NUM):
            if mask.nodes[n].KIND == AND:
                begin, begin2, begin3 = tl.maximum(begin, begin2), begin3, begin4
                end, end2, end3 = tl.minimum(end, end2), end3, end4
            elif mask.nodes[n].KIND == OR:
                begin, begin2, begin3 = tl.minimum(begin, begin2), begin3, begin4
                end, end2, end3 = tl.maximum(end, end2), end3, end4
            else:
                begin2, begin3, begin4 = begin, begin2, begin3
                end2, end3, end4 = end, end2, end3
                begin, end = _keys(mask.nodes[n], i0, i1, Nq, Nk)
    else:
        begin, end = _keys(mask, i0, i1, Nq, Nk)
    return begin, end


@triton.jit
def _keys(mask, i0, i1, Nq, Nk):
    if mask.KIND == BAND or mask.KIND == BOUNDS:
        lo, hi = _limits(mask, Nq, Nk)
        begin, end = tl.maximum(i0 + lo, 0), tl.minimum(i1 + hi, Nk)
    elif mask.KIND == DILATED:
        begin = tl.maximum(i0 + (Nk - Nq) - mask.reach, 0)
        end = tl.minimum(i1 + (Nk - Nq) + mask.reach, Nk)
    elif mask.KIND == PREFIX:
        begin, end = i0 * 0, tl.minimum(mask.n, Nk) + i0 * 0
    elif mask.KIND == BLOCKS:
        rows_end = _least(mask.num_i, mask.block, Nq)
        begin, end = i0 * 0, tl.where(i0 < rows_end, _least(mask.num_j, mask.block, Nk), 0)
    else:
        begin, end = i0 * 0, Nk + i0 * 0
    return begin, end


@triton.jit
def queries(mask, j0, j1, Nq, Nk):
    if mask.KIND == FORMULA:
        begin, end = _queries(mask.nodes[0], j0, j1, Nq, Nk)
        begin2, begin3, begin4 = begin, begin, begin
        end2, end3, end4 = end, end, end
        for n in tl.static_range(1, mask.NUM):
            if mask.nodes[n].KIND == AND:
                begin, begin2, begin3 = tl.maximum(begin, begin2), begin3, begin4
                end, end2, end3 = tl.minimum(end, end2), end3, end4
            elif mask.nodes[n].KIND == OR:
                begin, begin2, begin3 = tl.minimum(begin, begin2), begin3, begin4
                end, end2, end3 = tl.maximum(end, end2), end3, end4
            else:
                begin2, begin3, begin4 = begin, begin2, begin3
                end2, end3, end4 = end, end2, end3
                begin, end = _queries(mask.nodes[n], j0, j1, Nq, Nk)
    else:
        begin, end = _queries(mask, j0, j1, Nq, Nk)
    return begin, end


@triton.jit
def _queries(mask, j0, j1, Nq, Nk):
    if mask.KIND == BAND or mask.KIND == BOUNDS:
        lo, hi = _limits(mask, Nq, Nk)
        begin, end = tl.maximum(j0 - hi, 0), tl.minimum(j1 - lo, Nq)
    elif mask.KIND == DILATED:
        begin = tl.maximum(j0 - (Nk - Nq) - mask.reach, 0)
        end = tl.minimum(j1 - (Nk - Nq) + mask.reach, Nq)
    elif mask.KIND == PREFIX:
        begin, end = j0 * 0, tl.where(j0 < mask.n, Nq, 0)
    elif mask.KIND == BLOCKS:
        columns_end = _least(mask.num_j, mask.block, Nk)
        begin, end = j0 * 0, tl.where(j0 < columns_end, _least(mask.num_i, mask.block, Nq), 0)
    else:
        begin, end = j0 * 0, Nq + j0 * 0
    return begin, end


@triton.jit
def _least(num, block, N):
    """What ``num`` blocks cover of N; their product may pass 32 bits."""
    return tl.where(num >= tl.cdiv(N, block), N, num * block)


@triton.jit
def keys_all(mask, i0, i1, Nq, Nk):
    if mask.KIND == BAND or mask.KIND == BOUNDS:
        lo, hi = _limits(mask, Nq, Nk)
        begin, end = tl.maximum(i1 - 1 + lo, 0), tl.minimum(i0 + hi + 1, Nk)
    else:
        begin, end = i0 * 0, i0 * 0
    return begin, end


@triton.jit
def queries_all(mask, j0, j1, Nq, Nk):
    if mask.KIND == BAND or mask.KIND == BOUNDS:
        lo, hi = _limits(mask, Nq, Nk)
        begin, end = tl.maximum(j1 - 1 - hi, 0), tl.minimum(j0 - lo + 1, Nq)
    else:
        begin, end = j0 * 0, j0 * 0
    return begin, end


# ---- Tiles --------------------------------------------------------------------------------------


@triton.jit
def found(mask, place, i0, i1, j0, j1):
    """NONE, SOME or ALL of [i0, i1) x [j0, j1), neither empty."""
    if mask.KIND == TOKENS:
        answer = _found_tokens(mask, place, i0, i1, j0, j1)
    elif mask.KIND == FORMULA:
        answer = _found(mask.nodes[0], place, i0, i1, j0, j1)
        second, third, fourth = answer, answer, answer
        for n in tl.static_range(1, mask.NUM):
            if mask.nodes[n].KIND == AND:
                answer, second, third = tl.minimum(answer, second), third, fourth
            elif mask.nodes[n].KIND == OR:
                answer, second, third = tl.maximum(answer, second), third, fourth
            else:
                second, third, fourth = answer, second, third
                answer = _found(mask.nodes[n], place, i0, i1, j0, j1)
    else:
        answer = _found(mask, place, i0, i1, j0, j1)
    return answer


@triton.jit
def _found(mask, place, i0, i1, j0, j1):
    if mask.KIND == BAND or mask.KIND == BOUNDS:
        least, most = j0 - i1 + 1, j1 - 1 - i0  # of j - i
        lo, hi = _limits(mask, place.Nq, place.Nk)
        is_none = (most < lo) | (least > hi)
        is_all = (least >= lo) & (most <= hi)
        answer = tl.where(is_none, 0, tl.where(is_all, 2, 1))
    elif mask.KIND == DILATED:
        shift = place.Nk - place.Nq
        least, most = j0 - i1 + 1 - shift, j1 - 1 - i0 - shift
        inside = (least >= -mask.reach) & (most <= mask.reach)
        inside = inside & ((mask.step == 1) | (least == most))
        # Is a multiple of step among the offsets from ``near`` to ``far`` of one side, or among both?
        near = tl.maximum(tl.maximum(least, -most), 0)
        far = tl.minimum(tl.where(least > 0, most, -least), mask.reach)
        is_none = (near > 0) & (far // mask.step * mask.step < near)
        answer = tl.where(is_none, 0, tl.where(inside, 2, 1))
    elif mask.KIND == PREFIX:
        answer = tl.where(j0 >= mask.n, 0, tl.where(j1 <= mask.n, 2, 1))
    elif mask.KIND == BLOCKS:
        bi = i0 // mask.block + tl.arange(0, mask.MEETS_I)[:, None]
        bj = j0 // mask.block + tl.arange(0, mask.MEETS_J)[None, :]
        met = (bi <= (i1 - 1) // mask.block) & (bj <= (j1 - 1) // mask.block)
        answer = _count(_layout(mask, place, bi, bj), met)
    else:
        i = i0 + tl.arange(0, mask.BM)[:, None]
        j = j0 + tl.arange(0, mask.BN)[None, :]
        answer = _count(pairs.load(mask.bytes, place, i, j), (i < i1) & (j < j1))
    return answer


@triton.jit
def _found_tokens(mask, place, i0, i1, j0, j1):
    """A band is asked from the first to the last token of both sides; what looks at data, pair by pair."""
    i, j = i0 + tl.arange(0, mask.BM), j0 + tl.arange(0, mask.BN)
    at_i, at_j = _tokens(mask, place, i, j)
    is_i, is_j = (at_i >= 0) & (i < i1), (at_j >= 0) & (j < j1)
    num_i, num_j = tl.sum(is_i.to(tl.int32), 0), tl.sum(is_j.to(tl.int32), 0)
    answer = SOME + num_i * 0
    if mask.mask.KIND == BAND:
        least_i = tl.min(tl.where(is_i, at_i, FAR_AWAY), 0)
        least_j = tl.min(tl.where(is_j, at_j, FAR_AWAY), 0)
        past_i = tl.max(tl.where(is_i, at_i, -1), 0) + 1
        past_j = tl.max(tl.where(is_j, at_j, -1), 0) + 1
        answer = _found(mask.mask, place, least_i, past_i, least_j, past_j)
        is_whole = (num_i == i1 - i0) & (num_j == j1 - j0)
        if mask.q.HAS_LABELS:
            is_whole = num_i < 0
        answer = tl.where(is_whole, answer, tl.minimum(answer, SOME))
    return tl.where((num_i == 0) | (num_j == 0), NONE, answer)


@triton.jit
def _count(shown, met):
    """NONE, SOME or ALL of the bytes ``shown``, of which those that ``met`` count."""
    is_any = tl.max(tl.max((met & (shown != 0)).to(tl.int32), 1), 0)
    is_all = 1 - tl.max(tl.max((met & (shown == 0)).to(tl.int32), 1), 0)
    return is_any + (is_any & is_all)


# ---- Walking a range by tiles -------------------------------------------------------------------


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
