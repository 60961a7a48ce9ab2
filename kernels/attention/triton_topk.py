"""attention, the greatest logits of each query, Triton                               maths: README.md, section 4

The row i keeps  s_ij > floor_i,  and of the keys with  s_ij = floor_i  those up to last_i.

floor_i is found as a number of 32 bits in the order of floats, four bits at a time: of 15 candidates
the greatest that topk logits reach.  Each of the eight steps, one that counts what is above, and one that
counts what is equal up to the last, make the products again: ten products, and nothing is written but
two numbers a query.

Every later pass makes the same logits again and compares, so they must be the same bits: all passes share
one tile and one orientation of the product (triton.py, triton_tiles), and products and sums are not fused.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.triton_call import tile_of_keys
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_scores as scores
from fastattn.kernels.common.triton_dtypes import dot
from fastattn.kernels.common.triton_pairs import Place

NONE = tl.constexpr(-(1 << 31))  # below every number


@triton.jit(do_not_specialize=("Hq", "Nq", "Nk", "topk"))
def attention_floors(floor, last, q, k, how, Hq, group, Nq, Nk, topk):
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    b, h, i0 = rows.tile(q, Hq, Nq, BM, True)
    hk = rows.key_head(how, h, group)
    place = Place(b, h, Nq, Nk)
    q_tile = rows.load(q, b, h, i0, Nq, BM, how.size.D, how.size.BD, True)  # [BM, BD]
    some = masks.keys(how.mask, i0, tl.minimum(i0 + BM, Nq), Nq, Nk)
    begin = some[0] // BN * BN

    # Four bits a step, the highest first: how many of the candidates do topk logits reach?
    at = tl.full([BM], NONE, tl.int32)
    for step in tl.static_range(8):
        counts = tl.zeros([BM, 16], tl.int32)  # of logits at or above candidate 0 .. 15
        digit = tl.arange(0, 16)[None, :]
        for j0 in tl.range(begin, some[1], BN):
            if tile_of_keys(how, place, i0, j0) != masks.NONE:
                x = _in_order(q_tile, k, place, hk, i0, j0, how)
                for d in tl.static_range(1, 16):
                    candidate = at + (tl.full([BM], d, tl.int32) << (28 - 4 * step))
                    reached = tl.sum((x >= candidate[:, None]).to(tl.int32), 1)
                    counts += tl.where(digit == d, reached[:, None], 0)
        best = tl.sum(((counts >= topk) & (digit > 0)).to(tl.int32), 1)  # they fall with d
        at += best << (28 - 4 * step)

    # Of the keys at the floor itself, as many as are missing above it.
    above = tl.zeros([BM], tl.int32)
    for j0 in tl.range(begin, some[1], BN):
        if tile_of_keys(how, place, i0, j0) != masks.NONE:
            x = _in_order(q_tile, k, place, hk, i0, j0, how)
            above += tl.sum((x > at[:, None]).to(tl.int32), 1)
    missing = topk - above  # [BM]
    last_tile = tl.zeros([BM], tl.int32)
    for j0 in tl.range(begin, some[1], BN):
        if tile_of_keys(how, place, i0, j0) != masks.NONE:
            x = _in_order(q_tile, k, place, hk, i0, j0, how)
            equal = (x == at[:, None]).to(tl.int32)
            rank = tl.cumsum(equal, 1)
            j = j0 + tl.arange(0, BN)[None, :]
            is_last = (equal > 0) & (rank == missing[:, None])
            last_tile += tl.sum(tl.where(is_last, j, 0), 1)
            missing -= tl.sum(equal, 1)

    # A row that sees fewer keys keeps them all.
    value = _swapped(at).to(tl.float32, bitcast=True)
    value = tl.where(at == NONE, float("-inf"), value)
    last_tile = tl.where(at == NONE, Nk, last_tile)
    rows.store_scalars(floor, b, h, i0, value, Nq, BM)
    rows.store_scalars(last, b, h, i0, last_tile.to(tl.float32, bitcast=True), Nq, BM)


@triton.jit
def _in_order(q, k, place, hk, i0, j0, how):
    """The logits of BM queries and the keys j0 .. j0 + BN as integers in their order; NONE where a pair is hidden."""
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, BN)[None, :]
    k_tile = rows.load(k, place.b, hk, j0, place.Nk, BN, how.size.D, how.size.BD, True)  # [BN, BD]
    s = dot(q, tl.trans(k_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    x = scores.logits(how.score, s, place, i, j)
    seen = masks.visible(how.mask, place, i, j) & (j < place.Nk)
    x = tl.where(x == 0.0, 0.0, x)  # of both signs
    return tl.where(seen, _swapped(x.to(tl.int32, bitcast=True)), NONE)


@triton.jit
def _swapped(bits):
    """The bits of a float as an integer in the order of floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
