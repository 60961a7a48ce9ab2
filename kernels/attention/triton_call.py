"""What is said of a call of attention beside its tensors, and what a tile of queries and keys makes of it.

``call`` takes the op's arguments, ``how`` what kernels carry of them; the functions in Triton are what
all passes have in common.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_scores as scores
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common import triton_terms as terms
from fastattn.kernels.common import triton_weights as weights
from fastattn.kernels.common.triton_dtypes import dot


class Size(NamedTuple):
    """Widths, the powers of two that hold them, and a tile's queries and keys; all constexpr."""

    D: Any
    DV: Any
    BD: Any
    BDV: Any
    BM: Any
    BN: Any


class How(NamedTuple):
    """Which pairs are seen, what happens to logits and to weights, who reads which keys, and tiles."""

    mask: Any
    score: Any
    weigh: Any
    heads: Any  # None: h // group
    size: Any
    IS_BAND: Any  # constexpr: the mask's ranges say everything


class Call(NamedTuple):
    """What a launch needs beside the tensors that a kernel reads and writes."""

    q: Any
    k: Any
    v: Any
    code: Any  # the mask's formula
    blocks: Any
    visible: Any
    score: Any
    weigh: Any
    heads: Any
    cu_q: Any
    cu_k: Any
    slots_q: Any
    slots_k: Any
    by_slot: Any  # o has a row a slot
    is_plain: Any  # a band, and nothing beside scaling
    topk: Any  # logits that a query keeps, or 0

    @property
    def lengths(self):
        """Rows of queries and of keys, slots where there are groups."""
        pairs = (self.q, self.slots_q), (self.k, self.slots_k)
        return tuple(t.shape[2] if slots is None else slots.shape[3] for t, slots in pairs)

    @property
    def num(self):
        """Batches, or packed sequences, or groups of all batches: what biases call batches."""
        B, ends = self.q.shape[0], self.cu_q
        return B if ends is None else B * (ends.shape[0] - 1)


def call(
    q, k, v, bias, bias_index, bias2, bias2_index, weight, weight_index, sinks, visible, blocks, heads,
    cu_q, cu_k, seed, slots_q, slots_k, code, numbers,
):  # fmt: skip
    scale, softcap, low, high, dropout, by_slot, topk = numbers
    num = None if slots_q is None else q.shape[0] * (cu_q.shape[0] - 1)
    first, second, factor = (
        terms.encode(*term, num)
        for term in ((bias, bias_index), (bias2, bias2_index), (weight, weight_index))
    )
    score = scores.encode(scale, softcap, first, second, topk > 0)
    weigh = weights.encode(sinks, low, high, factor, seed, dropout)
    is_plain = len(code) == masks.WIDTH and code[0] == 0 and bool(score.IS_SCALE and weigh.IS_PLAIN)
    # In a row of the index one slot follows the other.
    slots_q, slots_k = (
        t if t is None or t.stride(3) == 1 else t.contiguous() for t in (slots_q, slots_k)
    )
    return Call(
        q, k, v, code, blocks, visible, score, weigh, heads, cu_q, cu_k, slots_q, slots_k, bool(by_slot),
        is_plain and slots_k is None, int(topk),
    )  # fmt: skip


def how(c, BM, BN):
    """``c`` for kernels whose tiles are BM x BN."""
    D, DV = c.q.shape[3], c.v.shape[3]
    size = (D, DV, launch.block(D), launch.block(DV), BM, BN)
    (Hq, Nq), (Hk, Nk) = c.q.shape[1:3], c.k.shape[1:3]
    is_packed = c.cu_q is not None and c.slots_q is None
    mask = masks.encode(c.code, Nq, Nk, is_packed, c.blocks, c.visible, BM, BN)
    heads = None if c.heads is None else rows.Heads(c.heads, max(Hk - 1, 0))
    if c.slots_q is not None:
        slots_q, slots_k = rows.slots_of(c.slots_q, Hq, Nq), rows.slots_of(c.slots_k, Hk, Nk)
        ends = (rows.ends_of(cu, N) for cu, N in zip((c.cu_q, c.cu_k), c.lengths))
        group = max(Hq // max(Hk, 1), 1)
        mask = masks.of_tokens(mask, slots_q, slots_k, *ends, heads, group, Nq, Nk, BM, BN)
    is_band = tl.constexpr(masks.is_band(mask))
    return How(mask, c.score, c.weigh, heads, Size(*map(tl.constexpr, size)), is_band)


def rows_of(c, t, of):
    """A tensor whose rows are those of queries, "q", or keys, "k"; or by slot where there are groups, "Q" or "K"."""
    if t is None:
        return None
    ends, slots = (c.cu_q, c.slots_q) if of in "qQ" else (c.cu_k, c.slots_k)
    return rows.rows(t, ends, slots if of in "qk" else None, is_grouped=slots is not None)


# ---- In kernels ---------------------------------------------------------------------------------

# What is known of a row lies side by side, [BM, 2] or beside float32 [BM, 4]: high, delta, low, dlse.  A tile,
# because single loads of rows would be made by each of the threads that need one.


@triton.jit
def store_known(t, known, b, h, i0, N, BM: tl.constexpr, NARROW: tl.constexpr):
    WIDTH: tl.constexpr = 2 if NARROW else 4
    at = tl.arange(0, WIDTH)[None, :]
    tile = tl.where(at == 0, known.high[:, None], known.delta[:, None])  # [BM, WIDTH]
    if not NARROW:
        tile = tl.where(at == 2, known.low[:, None], tile)
        tile = tl.where(at == 3, known.dlse[:, None], tile)
    rows.store(t, b, h, i0, tile, N, BM, WIDTH, WIDTH)


@triton.jit
def load_known(t, b, h, i0, N, BM: tl.constexpr, NARROW: tl.constexpr, CHECK: tl.constexpr):
    WIDTH: tl.constexpr = 2 if NARROW else 4
    tile = rows.load(t, b, h, i0, N, BM, WIDTH, WIDTH, CHECK)  # [BM, WIDTH]
    at = tl.arange(0, WIDTH)[None, :]
    high = tl.sum(tl.where(at == 0, tile, 0.0), 1)  # [BM]
    delta = tl.sum(tl.where(at == 1, tile, 0.0), 1)
    low, dlse = high, delta
    if not NARROW:
        low = tl.sum(tl.where(at == 2, tile, 0.0), 1)
        dlse = tl.sum(tl.where(at == 3, tile, 0.0), 1)
    return softmax.Known(high, low, delta, dlse)


@triton.jit
def products(q, do, known, k, v, place, hk, i0, j0, how, PARTIAL: tl.constexpr):
    """The keys j0 .. j0 + BN; their products s with BM queries, the softmax p, and dw = do . v."""
    NARROW: tl.constexpr = q.dtype != tl.float32
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    b, Nk = place.b, place.Nk
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, BN)[None, :]
    k_tile = rows.load(k, b, hk, j0, Nk, BN, how.size.D, how.size.BD, PARTIAL)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, BN, how.size.DV, how.size.BDV, PARTIAL)  # [BN, BDV]
    s = dot(q, tl.trans(k_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    x = scores.logits(how.score, s, place, i, j)
    factor = scores.factor(how.score) * softmax.unit(NARROW)
    p = softmax.weights(x, factor, softmax.expand(known, 1), NARROW)  # [BM, BN]
    if PARTIAL:
        p = tl.where(masks.visible(how.mask, place, i, j) & (j < Nk), p, 0.0)
    dw = dot(do, tl.trans(v_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    return k_tile, s, p, dw


@triton.jit
def tile_of_keys(how, place, i0, j0):
    """masks.found of the tile at (i0, j0); ALL only where all its keys exist."""
    i1 = tl.minimum(i0 + how.size.BM, place.Nq)
    j1 = tl.minimum(j0 + how.size.BN, place.Nk)
    found = masks.found(how.mask, place, i0, i1, j0, j1)
    return tl.where(place.Nk < j0 + how.size.BN, tl.minimum(found, masks.SOME), found)


@triton.jit
def tile_of_queries(how, place, i0, j0):
    """The same; ALL only where all its queries exist."""
    i1 = tl.minimum(i0 + how.size.BM, place.Nq)
    j1 = tl.minimum(j0 + how.size.BN, place.Nk)
    found = masks.found(how.mask, place, i0, i1, j0, j1)
    return tl.where(place.Nq < i0 + how.size.BM, tl.minimum(found, masks.SOME), found)
