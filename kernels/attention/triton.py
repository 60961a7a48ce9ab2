"""attention, forward and backward, Triton for NVIDIA and AMD                    maths: README.md

o_i = sum_j p_ij v_j / l_i,   p_ij = exp(s_ij - m_i),   s_ij = scale q_i . k_j,   m_i = max_j s_ij
ds_ij = p_ij (dp_ij - delta_i),   delta_i = do_i . o_i - dlse_i,   p_ij = exp(s_ij - lse_i)

and, where it is asked for, s_ij = softcap tanh(s_ij / softcap) + biases, and o_i = sum_j w_ij v_j with
w_ij = keep_ij weight_ij clip(p_ij) (triton_scores, triton_weights; gradients: triton_gradients).

              Nk ->  K_j, V_j [BN x D]          fwd, dq: a program owns BM queries of a head and
      +-----+   +----+----+----+----+           walks the keys that the mask shows; tiles with no
 Nq   | Q_i | x | j0 | j1 | j2 | .. | -> o, dq  hidden pair first, then the partial ones.
  |   +-----+   +----+----+----+----+           dkdv: a program owns BN keys and walks the queries
  v   | Q_i | x | j  | -> dk, dv                of every head that reads them.  s and dp are made
      +-----+   +----+                          twice, so that each sum has one owner and one
      | ... |                                   order: no atomics, the same bits every time.

What a program owns lies in shared memory once, what it walks num_stages deep; sums in registers.
dq also writes what is known of each query: what dkdv subtracts from logits and from dp.  Float32 products are
those of float32 (no tf32).  dq corrects delta by a pass of its own, in 16 bits only where a bias or
the sinks get gradients: README.md, section 6.

Where the mask is no band, each tile in the range of its keys is asked first, and skipped without a
load of k or v if nothing in it is visible.  Clipped weights need the whole denominator first: fwd and
dq walk the keys twice.  A packed sequence's tiles are found on the GPU, from its ends; a group's are of
its slots, whose rows are gathered by the tokens in them and written back so (triton_rows, triton_groups).

One file because the passes walk the same tiles; what they share is in triton_call, tiles in
triton_tiles.

Tiles are BM x BN / warps / stages.  Compiled: registers of a thread, and spills in bytes (NVIDIA)
or registers (AMD).               from: Triton 3.7.1, compared by tests/test_compile_targets.py

    16 bits    sm_90 (H100)         sm_100       sm_80, other sm      gfx942 (MI300)
               tile        reg spl  reg spl      tile        reg spl  tile        reg spl
    fwd    64  128x64/4/3  254   0  238   0      128x64/4/3  255  24  128x64/4/2  204   0
    fwd   128  128x128/8/2 255   8  234   0      128x64/8/2  226   0  128x32/4/2  211   0
    fwd   256  128x64/8/2  255   0  248   0      64x32/8/2   229   0  64x32/4/2   302   0
    dq     64  128x64/8/2  125   0   96   0      128x64/8/2  186   0  128x64/4/2  282   0
    dq    128  128x64/8/2  218   0  140   0      64x64/4/2   255   0  64x64/4/2   325   0
    dq    256  128x32/8/2  234   0  228   0      64x16/8/2   194   0  64x32/4/2   512   0
    dkdv   64  64x128/8/2  214   0  161   0      32x128/8/2  255   0  32x64/4/2   223   0
    dkdv  128  64x128/8/2  255  32  185   0      64x64/8/2   177   0  32x64/4/1   287   0
    dkdv  256  32x32/8/2   196   0  196   0      16x32/8/2   194   0  16x32/4/2   350   0

    32 bits    NVIDIA (sm_90 read)  gfx942 (MI300)
               tile        reg spl  tile        reg spl
    fwd    64  64x32/8/2   206   0  64x32/8/2   128   0
    fwd   128  32x16/8/2    64   0  32x32/8/2   168   0
    fwd   256  16x32/8/1    96   0  32x16/8/1   175   0
    dq     64  64x32/8/2   124   0  32x32/8/1   225   0
    dq    128  32x16/8/2    76   0  32x16/8/1   256   0
    dq    256  16x16/8/2    80   0  16x16/4/1   313   0
    dkdv   64  32x32/8/2    95   0  32x32/8/1   246   0
    dkdv  128  16x32/8/1   175   0  16x32/8/1   206   0
    dkdv  256  16x16/8/1   107   0  16x16/4/1   403   0

With grouped heads dkdv at 128 on sm_90 spills 192 bytes, outside the loops over queries.

With more than a band and a scale tiles are smaller (RICH in triton_tiles).  Spills at width 128 in 16
bits of fwd, dq, dkdv and the gradients (triton_gradients) of a bias; of tables by offset and index; of
rows of keys and queries; with block masks; softcap and sinks; dropout and clip; packed and heads; groups
with labels; the greatest logits (fwd, dq, dkdv and what finds them, triton_topk); keys in a cache:

             sm_80            sm_90            sm_100           gfx942
    bias       0   0   0   0    0   0   0   0    0   0   0   0    0   0   0   0
    tables     0   0   0   8    0   0   0   0    0   0   0   0    0   0   0   0
    rows       0   0   0   0    0   0   0   0    0   0   0   0    0   0   0   0
    blocks     0   0   0   -    0   0   0   -    0   0   0   -    0   0   0   -
    sinks     40   0   0   -    0   0   0   -    0   0   0   -    0   0   0   -
    dropout    0   0   0   -    0   0   0   -    0   0   0   -    0   0   0   -
    packed    32   0  24   -    0   0 144   -    0   0 528   -    0   0   0   -
    groups     0   0   0   -    0   0   0   -    0   0   0   -    0   0   0   -
    topk       0   0   0  16    0   0 176   0    0   0   0   0    0   0   0   0
    cached     0   0   0   -    0   0   0   -   16   0   0   -    0   0   0   -

Measured: not yet run on a GPU; results are checked in Triton's interpreter, code by reading it.
Not done, for want of a GPU to measure on: loads by TMA and warp specialisation on sm_90 and later;
float32 on tensor cores by splitting (3 x tf32); splitting keys over programs when queries are few;
a list of the tiles that a mask shows, so that loads of the next could run ahead there and in groups;
several small groups in one tile.
Assumes D and Dv <= 256 (limits in api.py).  Any strides; 16-byte loads where 8 divides them.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention import triton_gradients as gradients
from fastattn.kernels.attention import triton_groups as groups
from fastattn.kernels.attention.triton_call import (
    call,
    how,
    load_known,
    products,
    rows_of,
    store_known,
    tile_of_keys,
    tile_of_queries,
)
from fastattn.kernels.attention.triton_tiles import choose
from fastattn.kernels.attention.triton_topk import attention_floors
from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_scores as scores
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common import triton_weights as weights
from fastattn.kernels.common.triton_dtypes import dot, narrow
from fastattn.kernels.common.triton_pairs import Place

# ---- Forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("Hq", "Nq", "Nk"))
def attention_fwd(o, lse, rest, q, k, v, how, Hq, group, Nq, Nk):
    # Find the tile.  Under a causal mask the last queries see most keys: they start first.
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    b, h, i0 = rows.tile(q, Hq, Nq, how.size.BM, True)
    hk = rows.key_head(how, h, group)
    Nq = rows.length(q, b, Nq)
    Nk = rows.length(k, b, Nk, i0 < Nq)

    # Load the queries, once.
    q_tile = rows.load(q, b, h, i0, Nq, how.size.BM, how.size.D, how.size.BD, True)  # [BM, BD]
    q_tile = scores.orient(how.score, q_tile)
    m, l = weights.start(how.weigh, h, how.size.BM, NARROW)
    acc = tl.zeros([how.size.BM, how.size.BDV], tl.float32)

    # Walk the keys: first the tiles without a hidden pair, then the others.
    i1 = tl.minimum(i0 + how.size.BM, Nq)
    some = masks.keys(how.mask, i0, i1, Nq, Nk)
    walk = masks.walk(some, masks.keys_all(how.mask, i0, i1, Nq, Nk), how.size.BN)
    for PASS in tl.static_range(how.weigh.PASSES):
        if PASS == 1:
            m, l = softmax.settle(m, l, NARROW)
        for j0 in tl.range(walk.full_begin, walk.full_end, how.size.BN):
            acc, m, l = _absorb(
                acc, m, l, q_tile, k, v, Place(b, h, Nq, Nk), hk, i0, j0, how, PASS, False
            )
        for t in tl.range(0, walk.num_partial):
            j0 = masks.partial(walk, t, how.size.BN)
            acc, m, l = _absorb_partial(
                acc, m, l, q_tile, k, v, Place(b, h, Nq, Nk), hk, i0, j0, how, PASS
            )

    # Divide and write.
    o_tile, lse_tile, rest_tile = softmax.finish(acc, m, l, NARROW)
    if how.mask.KIND == masks.TOKENS:  # an empty slot has no sink either
        held = rows.is_held(q, b, h, i0, Nq, how.size.BM)
        lse_tile = tl.where(held, lse_tile, float("-inf"))
    rows.store(o, b, h, i0, o_tile, Nq, how.size.BM, how.size.DV, how.size.BDV)
    rows.store_scalars(lse, b, h, i0, lse_tile, Nq, how.size.BM)
    if not NARROW:
        rows.store_scalars(rest, b, h, i0, rest_tile, Nq, how.size.BM)


@triton.jit
def _absorb(acc, m, l, q, k, v, place, hk, i0, j0, how, PASS: tl.constexpr, PARTIAL: tl.constexpr):
    """Take the keys j0 .. j0 + BN into the running softmax of the queries i0 .. i0 + BM."""
    NARROW: tl.constexpr = q.dtype != tl.float32
    IS_LAST: tl.constexpr = PASS + 1 == how.weigh.PASSES
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    b, Nk = place.b, place.Nk
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, BN)[None, :]
    k_tile = rows.load(k, b, hk, j0, Nk, BN, how.size.D, how.size.BD, PARTIAL)  # [BN, BD]
    if IS_LAST:
        v_tile = rows.load(v, b, hk, j0, Nk, BN, how.size.DV, how.size.BDV, PARTIAL)  # [BN, BDV]
    s = dot(q, tl.trans(k_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    x = scores.logits(how.score, s, place, i, j)
    factor = tl.abs(scores.factor(how.score)) * softmax.unit(NARROW)
    if PARTIAL:
        x = tl.where(masks.visible(how.mask, place, i, j) & (j < Nk), x * factor, float("-inf"))
        factor = 1.0
    if PASS == 0:
        MAY_HIDE: tl.constexpr = PARTIAL or how.score.MAY_HIDE
        p, rescale, m, l = softmax.absorb(x, factor, m, l, NARROW, MAY_HIDE)  # [BM, BN]
    else:
        p, rescale = softmax.settled(x, factor, m, NARROW), tl.full([BM], 1.0, tl.float32)
    if IS_LAST:
        w = weights.apply(how.weigh, p, weights.factors(how.weigh, place, i, j))
        acc = dot(narrow(w, v_tile.dtype), v_tile, acc * rescale[:, None])  # [BM, BDV]
    return acc, m, l


@triton.jit
def _absorb_partial(acc, m, l, q, k, v, place, hk, i0, j0, how, PASS: tl.constexpr):
    """The same where a pair may be hidden; unless the mask is a band, the tile itself is asked."""
    if how.IS_BAND:
        acc, m, l = _absorb(acc, m, l, q, k, v, place, hk, i0, j0, how, PASS, True)
    else:
        found = tile_of_keys(how, place, i0, j0)
        if found == masks.ALL:
            acc, m, l = _absorb(acc, m, l, q, k, v, place, hk, i0, j0, how, PASS, False)
        elif found == masks.SOME:
            acc, m, l = _absorb(acc, m, l, q, k, v, place, hk, i0, j0, how, PASS, True)
    return acc, m, l


# ---- Backward: dq by tiles of queries, then dk and dv by tiles of keys --------------------------


@triton.jit(do_not_specialize=("Hq", "Nq", "Nk"))
def attention_dq(
    dq, rows_known, do, dlse, q, k, v, o, lse, rest, how, Hq, group, Nq, Nk, IS_EXACT: tl.constexpr
):
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    BM: tl.constexpr = how.size.BM
    b, h, i0 = rows.tile(q, Hq, Nq, BM, True)
    hk = rows.key_head(how, h, group)
    Nq = rows.length(q, b, Nq)
    Nk = rows.length(k, b, Nk, i0 < Nq)
    q_tile = rows.load(q, b, h, i0, Nq, BM, how.size.D, how.size.BD, True)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, BM, how.size.DV, how.size.BDV, True)  # [BM, BDV]
    lse_tile = rows.load_scalars(lse, b, h, i0, Nq, BM)  # [BM]
    high = softmax.shift(lse_tile, NARROW)
    low, dlse_tile = high, tl.zeros([BM], tl.float32)
    if not NARROW:
        low = rows.load_scalars(rest, b, h, i0, Nq, BM)  # [BM]
    if dlse is not None:
        dlse_tile = rows.load_scalars(dlse, b, h, i0, Nq, BM)  # [BM]
        dlse_tile = tl.where(lse_tile == float("-inf"), 0.0, dlse_tile)  # lse is constant there
    i1 = tl.minimum(i0 + BM, Nq)
    some = masks.keys(how.mask, i0, i1, Nq, Nk)
    walk = masks.walk(some, masks.keys_all(how.mask, i0, i1, Nq, Nk), how.size.BN)

    # delta_i = do_i . o_i, kept with the others for the pass over keys.
    o_tile = rows.load(o, b, h, i0, Nq, BM, how.size.DV, how.size.BDV, True)  # [BM, BDV]
    delta_tile = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # [BM]
    if IS_EXACT or how.weigh.PASSES == 2:
        # The roundings of o would show, and clipped weights have another sum than o:
        # correct until sum_j p_ij (dp_ij - delta_i) = 0, where dp of the sink is 0.
        excess = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM], tl.float32)
        known = softmax.Known(high, low, delta_tile, dlse_tile)
        if how.weigh.p_sinks is not None:
            total = weights.sink(how.weigh, h, known, NARROW)
            excess = -total * delta_tile
        for j0 in tl.range(some[0] // how.size.BN * how.size.BN, some[1], how.size.BN):
            if how.IS_BAND:  # noqa: SIM114  (decided when compiled)
                excess, total = _add_excess(
                    excess, total, known, q_tile, do_tile, k, v, Place(b, h, Nq, Nk), hk, i0, j0, how
                )  # fmt: skip
            elif tile_of_keys(how, Place(b, h, Nq, Nk), i0, j0) != masks.NONE:
                excess, total = _add_excess(
                    excess, total, known, q_tile, do_tile, k, v, Place(b, h, Nq, Nk), hk, i0, j0, how
                )  # fmt: skip
        delta_tile += excess / tl.where(total == 0.0, 1.0, total)
    if NARROW:
        delta_tile -= dlse_tile
    known = softmax.Known(high, low, delta_tile, dlse_tile)
    store_known(rows_known, known, b, h, i0, Nq, BM, NARROW)

    # Walk the keys as the forward pass does.
    acc = tl.zeros([BM, how.size.BD], tl.float32)
    for j0 in tl.range(walk.full_begin, walk.full_end, how.size.BN):
        acc = _add_dq(
            acc, known, q_tile, do_tile, k, v, Place(b, h, Nq, Nk), hk, i0, j0, how, False
        )  # fmt: skip
    for t in tl.range(0, walk.num_partial):
        j0 = masks.partial(walk, t, how.size.BN)
        acc = _add_dq_partial(
            acc, known, q_tile, do_tile, k, v, Place(b, h, Nq, Nk), hk, i0, j0, how
        )  # fmt: skip
    rows.store(dq, b, h, i0, acc * scores.scale(how.score), Nq, BM, how.size.D, how.size.BD)


@triton.jit
def _add_excess(excess, total, known, q, do, k, v, place, hk, i0, j0, how):
    """Add p (dp - delta) and p of the keys j0 .. j0 + BN."""
    i = i0 + tl.arange(0, how.size.BM)[:, None]
    j = j0 + tl.arange(0, how.size.BN)[None, :]
    k_tile, s, p, dw = products(q, do, known, k, v, place, hk, i0, j0, how, True)
    dp = weights.grad(how.weigh, p, dw, weights.factors(how.weigh, place, i, j))
    return excess + tl.sum(p * (dp - known.delta[:, None]), 1), total + tl.sum(p, 1)


@triton.jit
def _add_dq(acc, known, q, do, k, v, place, hk, i0, j0, how, PARTIAL: tl.constexpr):
    """Add what the keys j0 .. j0 + BN give to dq of the queries i0 .. i0 + BM."""
    i = i0 + tl.arange(0, how.size.BM)[:, None]
    j = j0 + tl.arange(0, how.size.BN)[None, :]
    NARROW: tl.constexpr = q.dtype != tl.float32
    k_tile, s, p, dw = products(q, do, known, k, v, place, hk, i0, j0, how, PARTIAL)
    dp = weights.grad(how.weigh, p, dw, weights.factors(how.weigh, place, i, j))
    ds = softmax.grad(p, dp, softmax.expand(known, 1), NARROW)
    ds = scores.logits_grad(how.score, ds, s)  # [BM, BN]
    return dot(narrow(ds, k_tile.dtype), k_tile, acc)  # [BM, BD]


@triton.jit
def _add_dq_partial(acc, known, q, do, k, v, place, hk, i0, j0, how):
    if how.IS_BAND:
        acc = _add_dq(acc, known, q, do, k, v, place, hk, i0, j0, how, True)
    else:
        found = tile_of_keys(how, place, i0, j0)
        if found == masks.ALL:
            acc = _add_dq(acc, known, q, do, k, v, place, hk, i0, j0, how, False)
        elif found == masks.SOME:
            acc = _add_dq(acc, known, q, do, k, v, place, hk, i0, j0, how, True)
    return acc


@triton.jit(do_not_specialize=("Hk", "Nq", "Nk"))
def attention_dkdv(dk, dv, do, known, q, k, v, how, Hk, group, Nq, Nk):
    # Find the tile.  Under a causal mask the first keys are seen by most queries: they start first.
    b, hk, j0 = rows.tile(k, Hk, Nk, how.size.BN, False)
    Nk = rows.length(k, b, Nk)
    Nq = rows.length(q, b, Nq, j0 < Nk)
    k_tile = rows.load(k, b, hk, j0, Nk, how.size.BN, how.size.D, how.size.BD, True)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, how.size.BN, how.size.DV, how.size.BDV, True)  # [BN, BDV]
    dk_acc = tl.zeros([how.size.BN, how.size.BD], tl.float32)
    dv_acc = tl.zeros([how.size.BN, how.size.BDV], tl.float32)

    # Walk the queries of every head that reads these keys, always in the same order: no atomics.
    j1 = tl.minimum(j0 + how.size.BN, Nk)
    some = masks.queries(how.mask, j0, j1, Nq, Nk)
    walk = masks.walk(some, masks.queries_all(how.mask, j0, j1, Nq, Nk), how.size.BM)
    for g in tl.range(0, group):
        h = hk * group + g
        full_end, num_partial = walk.full_end, walk.num_partial
        if how.heads is not None:  # group is Hq then
            h = g
            reads = rows.key_head(how, h, group) == hk
            full_end = tl.where(reads, full_end, walk.full_begin)
            num_partial = tl.where(reads, num_partial, 0)
        for i0 in tl.range(walk.full_begin, full_end, how.size.BM):
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, q, do, known,
                Place(b, h, Nq, Nk), i0, j0, how, False,
            )  # fmt: skip
        for t in tl.range(0, num_partial):
            i0 = masks.partial(walk, t, how.size.BM)
            dk_acc, dv_acc = _add_dkdv_partial(
                dk_acc, dv_acc, k_tile, v_tile, q, do, known, Place(b, h, Nq, Nk), i0, j0, how
            )  # fmt: skip
    dk_acc = dk_acc * scores.scale(how.score)
    rows.store(dk, b, hk, j0, dk_acc, Nk, how.size.BN, how.size.D, how.size.BD)
    rows.store(dv, b, hk, j0, dv_acc, Nk, how.size.BN, how.size.DV, how.size.BDV)


@triton.jit
def _add_dkdv(dk, dv, k, v, q, do, known, place, i0, j0, how, PARTIAL: tl.constexpr):
    """Add what the queries i0 .. i0 + BM of one head give to dk and dv of the keys j0 .. j0 + BN.

    Everything is transposed, keys x queries, so that p and ds are ready as left factors.  Queries
    past Nq add nothing: their do and what is known of them are loaded as zero.
    """
    NARROW: tl.constexpr = k.dtype != tl.float32
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    b, h, Nq = place.b, place.h, place.Nq
    i = i0 + tl.arange(0, BM)[None, :]
    j = j0 + tl.arange(0, BN)[:, None]
    q_tile = rows.load(q, b, h, i0, Nq, BM, how.size.D, how.size.BD, PARTIAL)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, BM, how.size.DV, how.size.BDV, PARTIAL)  # [BM, BDV]
    row = softmax.expand(load_known(known, b, h, i0, Nq, BM, NARROW, PARTIAL), 0)  # [1, BM]
    if how.score.floor is None:
        s = dot(k, tl.trans(q_tile), tl.zeros([BN, BM], tl.float32))  # [BN, BM]
    else:  # to the bit what was compared with the floor
        s = tl.trans(dot(q_tile, tl.trans(k), tl.zeros([BM, BN], tl.float32)))
    factor = scores.factor(how.score) * softmax.unit(NARROW)
    x = scores.logits(how.score, s, place, i, j)
    p = softmax.weights(x, factor, row, NARROW)  # [BN, BM]
    if PARTIAL:
        seen = masks.visible(how.mask, place, i, j)
        if how.score.MAY_HIDE:  # or what is read as bias there may make p infinite
            seen = seen & (i < Nq)
        p = tl.where(seen, p, 0.0)
    c = weights.factors(how.weigh, place, i, j)
    w = weights.apply(how.weigh, p, c)
    dv = dot(narrow(w, do_tile.dtype), do_tile, dv)  # [BN, BDV]
    dw = dot(v, tl.trans(do_tile), tl.zeros([BN, BM], tl.float32))  # [BN, BM]
    dp = weights.grad(how.weigh, p, dw, c)
    ds = scores.logits_grad(how.score, softmax.grad(p, dp, row, NARROW), s)  # [BN, BM]
    return dot(narrow(ds, q_tile.dtype), q_tile, dk), dv  # [BN, BD]


@triton.jit
def _add_dkdv_partial(dk, dv, k, v, q, do, known, place, i0, j0, how):
    if how.IS_BAND:
        dk, dv = _add_dkdv(dk, dv, k, v, q, do, known, place, i0, j0, how, True)
    else:
        found = tile_of_queries(how, place, i0, j0)
        if found == masks.ALL:
            dk, dv = _add_dkdv(dk, dv, k, v, q, do, known, place, i0, j0, how, False)
        elif found == masks.SOME:
            dk, dv = _add_dkdv(dk, dv, k, v, q, do, known, place, i0, j0, how, True)
    return dk, dv


# ---- Launch -------------------------------------------------------------------------------------


KERNELS = {
    "fwd": attention_fwd,
    "dq": attention_dq,
    "dkdv": attention_dkdv,
    "floors": attention_floors,
}


def run(name, c, at, *tensors, **more):
    """Launch a kernel, one program a tile of the rows that it owns.

    ``at`` says of each tensor what its rows are: triton_call.rows_of.
    """
    B, Hq, _, D = c.q.shape
    Hk, DV = c.v.shape[1], c.v.shape[3]
    Nq, Nk = c.lengths
    H, N, ends = (Hk, Nk, c.cu_k) if name == "dkdv" else (Hq, Nq, c.cu_q)
    if c.num * H * N == 0:
        return
    length = N if ends is None else triton.cdiv(N * B, c.num)
    tile = choose("dterm" if c.topk else name, c.q, max(D, DV), c.num * H, length, c.is_plain)
    BLOCK = tile.BN if name == "dkdv" else tile.BM
    group = Hq if name == "dkdv" and c.heads is not None else Hq // max(Hk, 1)
    KERNELS[name][(H * rows.num_tiles(B, N, BLOCK, ends),)](
        *(rows_of(c, t, of) for of, t in zip(at, tensors)),
        how(c, tile.BM, tile.BN), H, group, Nq, Nk if Hk else 0, **more,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=not c.topk,
    )  # fmt: skip


def with_floors(c, rest, are_known):
    """``c`` whose queries keep their greatest logits: ``rest`` says which, or is told."""
    if not c.topk:
        return c
    value, last = rest[:, :, 1], rest[:, :, 2]
    if not are_known:
        run("floors", c, "QQqk", value, last, c.q, c.k, topk=c.topk)
    return c._replace(score=c.score._replace(floor=scores.Floor(rows.rows(value), rows.rows(last))))


def forward(o, lse, rest, q, k, v, *more):
    c = call(q, k, v, *more)
    if c.cu_q is not None or q.dtype != torch.float32:  # beside 16 bits it is not read
        rest.zero_()
    if c.cu_q is not None:  # tokens of no sequence
        o.zero_()
        lse.fill_(float("-inf"))
    with launch.on(q):
        c = with_floors(c, rest, False)
        run("fwd", c, "QQQqkk" if c.by_slot else "qQQqkk", o, lse, rest[:, :, 0], q, k, v)


def backward(dq, dk, dv, dbias, dbias2, dweight, dsinks, do, dlse, q, k, v, *more):
    *extras, o, lse, rest, code, numbers, needs = more
    c = with_floors(call(q, k, v, *extras, code, numbers), rest, True)
    bias, bias_index, bias2, bias2_index, weight, weight_index, sinks = extras[:7]
    terms = [
        (grad, is_weight, *term)
        for grad, needed, is_weight, *term in (
            (dbias, needs[3], False, bias, bias_index),
            (dbias2, needs[4], False, bias2, bias2_index),
            (dweight, needs[5], True, weight, weight_index),
        )
        if needed and term[0] is not None
    ]
    has_dsinks = needs[6] and sinks is not None
    # Sums of many ds show what o was rounded by, in 16 bits too.
    is_exact = q.dtype == torch.float32 or has_dsinks or not all(term[1] for term in terms)
    # What is known of each query, side by side.
    width = 4 if q.dtype == torch.float32 else 2
    known = torch.empty((*lse.shape, width), dtype=torch.float32, device=q.device)
    if c.cu_q is not None:
        for t in (dq, dk, dv, known):
            t.zero_()
    repeats_q, repeats_k = groups.repeats(c)
    dq_to = groups.by_slot(q, c.slots_q) if repeats_q else dq
    dk_to, dv_to = (groups.by_slot(t, c.slots_k) for t in (k, v)) if repeats_k else (dk, dv)
    of_o = "Q" if c.by_slot else "q"
    of_dq, of_dk = "Q" if repeats_q else "q", "K" if repeats_k else "k"
    with launch.on(q):
        run(
            "dq", c, f"{of_dq}Q{of_o}Qqkk{of_o}QQ", dq_to, known, do, dlse, q, k, v, o, lse, rest[:, :, 0],
            IS_EXACT=is_exact,
        )  # fmt: skip
        run("dkdv", c, f"{of_dk}{of_dk}{of_o}Qqkk", dk_to, dv_to, do, known, q, k, v)
        for term in terms:
            gradients.run(*term, c, do, known)
        if repeats_q:
            groups.gather(dq, dq_to, c.slots_q)
        if repeats_k:
            groups.gather(dk, dk_to, c.slots_k)
            groups.gather(dv, dv_to, c.slots_k)
    if has_dsinks:
        gradients.sinks(dsinks, sinks, lse, known)
