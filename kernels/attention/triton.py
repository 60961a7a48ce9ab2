"""attention, Triton"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_scores as scores
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common.triton_dtypes import dot, narrow

RUNTIME = ("Hq", "Nq", "Nk")  # sizes that must not compile a kernel each


class Tile(NamedTuple):
    """BM queries x BN keys a step, and how many warps and load stages work on it."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# ---------------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=RUNTIME)
def attention_fwd(
    o, lse, q, k, v, mask, score, Hq, group, Nq, Nk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    # Find the tile.  Under a causal mask the last queries see most keys: they start first.
    num_tiles = tl.cdiv(Nq, BM)
    i0 = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BM
    h = tl.program_id(0) // num_tiles % Hq
    b = tl.program_id(0) // num_tiles // Hq
    hk = h // group

    # Load the queries, once.
    q_tile = rows.load(q, b, h, i0, Nq, BM, D, BD, True)  # [BM, BD]
    q_tile = scores.orient(score, q_tile)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)

    # Walk the keys: first the tiles without a hidden pair, then the others.
    i1 = tl.minimum(i0 + BM, Nq)
    walk = masks.walk(masks.keys(mask, i0, i1, Nq, Nk), masks.keys_all(mask, i0, i1, Nq, Nk), BN)
    factor = tl.abs(scores.factor(score)) * softmax.unit(NARROW)
    for j0 in tl.range(walk.full_begin, walk.full_end, BN):
        acc, m, l = _absorb(
            acc,
            m,
            l,
            q_tile,
            k,
            v,
            b,
            hk,
            mask,
            score,
            factor,
            i0,
            j0,
            Nk,
            D,
            DV,
            BD,
            BDV,
            BM,
            BN,
            False,
        )
    for t in tl.range(0, walk.num_partial):
        j0 = masks.partial(walk, t, BN)
        acc, m, l = _absorb(
            acc,
            m,
            l,
            q_tile,
            k,
            v,
            b,
            hk,
            mask,
            score,
            factor,
            i0,
            j0,
            Nk,
            D,
            DV,
            BD,
            BDV,
            BM,
            BN,
            True,
        )

    # Divide and write.
    o_tile, lse_tile = softmax.finish(acc, m, l, NARROW)
    rows.store(o, b, h, i0, o_tile, Nq, BM, DV, BDV)
    rows.store_scalars(lse, b, h, i0, lse_tile, Nq, BM)


@triton.jit
def _absorb(
    acc, m, l, q, k, v, b, hk, mask, score, factor, i0, j0, Nk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Take the keys j0 .. j0 + BN into the running softmax of the queries i0 .. i0 + BM."""
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, BN)[None, :]
    NARROW: tl.constexpr = q.dtype != tl.float32
    k_tile = rows.load(k, b, hk, j0, Nk, BN, D, BD, PARTIAL)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, BN, DV, BDV, PARTIAL)  # [BN, BDV]
    s = dot(q, tl.trans(k_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    x = scores.logits(score, s, i, j)
    if PARTIAL:
        x = tl.where(masks.visible(mask, i, j) & (j < Nk), x * factor, float("-inf"))
        factor = 1.0
    p, rescale, m, l = softmax.absorb(x, factor, m, l, NARROW, PARTIAL)
    acc = dot(narrow(p, v_tile.dtype), v_tile, acc * rescale[:, None])  # [BM, BDV]
    return acc, m, l


# ---------------------------------------------------------------------------------------------------
# Backward: dq and delta by tiles of queries, then dk and dv by tiles of keys


@triton.jit(do_not_specialize=RUNTIME)
def attention_dq(
    dq, shift, delta, do, dlse, q, k, v, o, lse, mask, score, Hq, group, Nq, Nk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    num_tiles = tl.cdiv(Nq, BM)
    i0 = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BM
    h = tl.program_id(0) // num_tiles % Hq
    b = tl.program_id(0) // num_tiles // Hq
    hk = h // group
    q_tile = rows.load(q, b, h, i0, Nq, BM, D, BD, True)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, BM, DV, BDV, True)  # [BM, BDV]
    lse_tile = rows.load_scalars(lse, b, h, i0, Nq, BM)  # [BM]
    factor = scores.factor(score) * softmax.unit(NARROW)
    shift_tile = softmax.shift(lse_tile, NARROW)
    i1 = tl.minimum(i0 + BM, Nq)
    some = masks.keys(mask, i0, i1, Nq, Nk)
    walk = masks.walk(some, masks.keys_all(mask, i0, i1, Nq, Nk), BN)

    # delta_i = do_i . o_i - dlse_i, kept with the shift for the pass over keys.
    o_tile = rows.load(o, b, h, i0, Nq, BM, DV, BDV, True)  # [BM, BDV]
    delta_tile = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # [BM]
    if not NARROW:
        # In float32 the roundings of o would show: correct delta until sum_j p_ij (dp_ij - delta_i) = 0.
        excess = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM], tl.float32)
        for j0 in tl.range(some[0] // BN * BN, some[1], BN):
            k_tile, s, p, dp = _weights(q_tile, do_tile, shift_tile, k, v, b, hk, mask, score, factor, i0, j0, Nk,
                                        D, DV, BD, BDV, BM, BN, True)  # fmt: skip
            excess += tl.sum(p * (dp - delta_tile[:, None]), 1)
            total += tl.sum(p, 1)
        delta_tile += excess / tl.where(total == 0.0, 1.0, total)
    if dlse is not None:
        dlse_tile = rows.load_scalars(dlse, b, h, i0, Nq, BM)  # [BM]
        delta_tile -= tl.where(lse_tile == float("-inf"), 0.0, dlse_tile)  # lse is constant there
    rows.store_scalars(delta, b, h, i0, delta_tile, Nq, BM)
    rows.store_scalars(shift, b, h, i0, shift_tile, Nq, BM)

    acc = tl.zeros([BM, BD], tl.float32)
    for j0 in tl.range(walk.full_begin, walk.full_end, BN):
        acc = _add_dq(acc, q_tile, do_tile, shift_tile, delta_tile, k, v, b, hk, mask, score, factor, i0, j0, Nk,
                      D, DV, BD, BDV, BM, BN, False)  # fmt: skip
    for t in tl.range(0, walk.num_partial):
        j0 = masks.partial(walk, t, BN)
        acc = _add_dq(acc, q_tile, do_tile, shift_tile, delta_tile, k, v, b, hk, mask, score, factor, i0, j0, Nk,
                      D, DV, BD, BDV, BM, BN, True)  # fmt: skip
    rows.store(dq, b, h, i0, acc * scores.scale(score), Nq, BM, D, BD)


@triton.jit
def _weights(
    q, do, shift, k, v, b, hk, mask, score, factor, i0, j0, Nk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """The keys j0 .. j0 + BN, and for the queries i0 .. i0 + BM their products, weights p and gradients dp."""
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, BN)[None, :]
    NARROW: tl.constexpr = q.dtype != tl.float32
    k_tile = rows.load(k, b, hk, j0, Nk, BN, D, BD, PARTIAL)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, BN, DV, BDV, PARTIAL)  # [BN, BDV]
    s = dot(q, tl.trans(k_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    p = softmax.weights(scores.logits(score, s, i, j), factor, shift[:, None], NARROW)  # [BM, BN]
    if PARTIAL:
        p = tl.where(masks.visible(mask, i, j) & (j < Nk), p, 0.0)
    dp = dot(do, tl.trans(v_tile), tl.zeros([BM, BN], tl.float32))  # [BM, BN]
    return k_tile, s, p, dp


@triton.jit
def _add_dq(
    acc, q, do, shift, delta, k, v, b, hk, mask, score, factor, i0, j0, Nk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add what the keys j0 .. j0 + BN give to dq of the queries i0 .. i0 + BM."""
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, BN)[None, :]
    k_tile, s, p, dp = _weights(q, do, shift, k, v, b, hk, mask, score, factor, i0, j0, Nk,
                                D, DV, BD, BDV, BM, BN, PARTIAL)  # fmt: skip
    ds = scores.logits_grad(score, p * (dp - delta[:, None]), s, i, j)
    return dot(narrow(ds, k_tile.dtype), k_tile, acc)  # [BM, BD]


@triton.jit(do_not_specialize=(*RUNTIME, "Hk"))
def attention_dkdv(
    dk, dv, do, shift, delta, q, k, v, mask, score, Hk, group, Nq, Nk,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by most queries under a causal mask: they start first.
    num_tiles = tl.cdiv(Nk, BN)
    j0 = tl.program_id(0) % num_tiles * BN
    hk = tl.program_id(0) // num_tiles % Hk
    b = tl.program_id(0) // num_tiles // Hk
    k_tile = rows.load(k, b, hk, j0, Nk, BN, D, BD, True)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, BN, DV, BDV, True)  # [BN, BDV]
    factor = scores.factor(score) * softmax.unit(k_tile.dtype != tl.float32)
    dk_acc = tl.zeros([BN, BD], tl.float32)
    dv_acc = tl.zeros([BN, BDV], tl.float32)

    # Walk the queries of every head that reads these keys, always in the same order: no atomics.
    j1 = tl.minimum(j0 + BN, Nk)
    walk = masks.walk(
        masks.queries(mask, j0, j1, Nq, Nk), masks.queries_all(mask, j0, j1, Nq, Nk), BM
    )
    for g in tl.range(0, group):
        h = hk * group + g
        for i0 in tl.range(walk.full_begin, walk.full_end, BM):
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, q, do, shift, delta, b, h, mask, score, factor, i0, j0, Nq,
                D, DV, BD, BDV, BM, BN, False)  # fmt: skip
        for t in tl.range(0, walk.num_partial):
            i0 = masks.partial(walk, t, BM)
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, q, do, shift, delta, b, h, mask, score, factor, i0, j0, Nq,
                D, DV, BD, BDV, BM, BN, True)  # fmt: skip
    rows.store(dk, b, hk, j0, dk_acc * scores.scale(score), Nk, BN, D, BD)
    rows.store(dv, b, hk, j0, dv_acc, Nk, BN, DV, BDV)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q, do, shift, delta, b, h, mask, score, factor, i0, j0, Nq,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add what the queries i0 .. i0 + BM of one head give to dk and dv of the keys j0 .. j0 + BN.

    Everything is transposed, keys x queries, so that p and ds are ready as left factors.  Queries past Nq add
    nothing: their do, delta and shift are loaded as zero.
    """
    i = i0 + tl.arange(0, BM)[None, :]
    j = j0 + tl.arange(0, BN)[:, None]
    NARROW: tl.constexpr = k.dtype != tl.float32
    q_tile = rows.load(q, b, h, i0, Nq, BM, D, BD, PARTIAL)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, BM, DV, BDV, PARTIAL)  # [BM, BDV]
    shift_tile = rows.load_scalars(shift, b, h, i0, Nq, BM)  # [BM]
    delta_tile = rows.load_scalars(delta, b, h, i0, Nq, BM)  # [BM]
    s = dot(k, tl.trans(q_tile), tl.zeros([BN, BM], tl.float32))  # [BN, BM]
    p = softmax.weights(
        scores.logits(score, s, i, j), factor, shift_tile[None, :], NARROW
    )  # [BN, BM]
    if PARTIAL:
        p = tl.where(masks.visible(mask, i, j), p, 0.0)
    dv = dot(narrow(p, do_tile.dtype), do_tile, dv)  # [BN, BDV]
    dp = dot(v, tl.trans(do_tile), tl.zeros([BN, BM], tl.float32))  # [BN, BM]
    ds = scores.logits_grad(score, p * (dp - delta_tile[None, :]), s, i, j)
    return dot(narrow(ds, q_tile.dtype), q_tile, dk), dv  # [BN, BD]


# ---------------------------------------------------------------------------------------------------
# Launch

# {kind of processor: {kernel: tiles for widths up to 64, 128 and 256}}, by the size of a number in bytes.
TILES = {
    2: {
        "sm_90": {
            "fwd": (Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            "dq": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
            "dkdv": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 32, 8, 2)),
        },
        "sm": {
            "fwd": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
            "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 16, 8, 2)),
            "dkdv": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 8, 2)),
        },
        "gfx": {
            "fwd": (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 32, 4, 2)),
            "dq": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
            "dkdv": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(16, 32, 4, 2)),
        },
    },
    4: {
        "sm": {
            "fwd": (Tile(64, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 1)),
            "dq": (Tile(64, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 16, 8, 2)),
            "dkdv": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        },
        "gfx": {
            "fwd": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
            "dq": (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
            "dkdv": (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
        },
    },
}  # fmt: skip
TILES[4]["sm_90"] = TILES[4]["sm"]
SMALL = {"fwd": Tile(64, 64, 4, 2), "dq": Tile(64, 64, 4, 2), "dkdv": Tile(64, 64, 8, 2)}
FEW = 128  # programs that leave most of a large GPU idle: halve their tiles


def tile(kernel, q, v, owned):
    """The tile for ``owned`` rows of which the kernel's programs own BM (or BN, dkdv) each."""
    kind = launch.target(q.device.index)
    if kind == "interpreter":
        return Tile(64, 64, 1, 1)
    width = max(q.shape[3], v.shape[3])
    t = TILES[q.element_size()][kind][kernel][0 if width <= 64 else 1 if width <= 128 else 2]
    rows_each = t.BN if kernel == "dkdv" else t.BM
    return (
        SMALL[kernel]
        if kind != "gfx" and rows_each == 128 and owned <= FEW * rows_each and width <= 128
        else t
    )


def forward(o, lse, q, k, v, mask, scale):
    B, Hq, Nq, D = q.shape
    _, Hk, Nk, DV = v.shape
    if B * Hq * Nq == 0:
        return
    with launch.on(q):
        t = tile("fwd", q, v, B * Hq * Nq)
        attention_fwd[(B * Hq * triton.cdiv(Nq, t.BM),)](
            *map(rows.rows, (o, lse, q, k, v)),
            masks.encode(mask, Nq, Nk), scores.encode(scale), Hq, Hq // Hk, Nq, Nk,
            D, DV, launch.block(D), launch.block(DV), **t._asdict(), enable_fp_fusion=True,
        )  # fmt: skip


def backward(dq, dk, dv, do, dlse, q, k, v, o, lse, mask, scale):
    B, Hq, Nq, D = q.shape
    _, Hk, Nk, DV = v.shape
    sizes = (D, DV, launch.block(D), launch.block(DV))
    what = (masks.encode(mask, Nq, Nk), scores.encode(scale))
    shift, delta = torch.empty((2, B, Hq, Nq), dtype=torch.float32, device=q.device)
    dlse = dlse if dlse is None else rows.rows(dlse)
    with launch.on(q):
        if B * Hq * Nq:
            t = tile("dq", q, v, B * Hq * Nq)
            attention_dq[(B * Hq * triton.cdiv(Nq, t.BM),)](
                *map(rows.rows, (dq, shift, delta, do)), dlse, *map(rows.rows, (q, k, v, o, lse)),
                *what, Hq, Hq // Hk, Nq, Nk, *sizes, **t._asdict(), enable_fp_fusion=True,
            )  # fmt: skip
        if B * Hk * Nk:
            t = tile("dkdv", q, v, B * Hk * Nk)
            attention_dkdv[(B * Hk * triton.cdiv(Nk, t.BN),)](
                *map(rows.rows, (dk, dv, do, shift, delta, q, k, v)),
                *what, Hk, Hq // Hk, Nq, Nk, *sizes, **t._asdict(), enable_fp_fusion=True,
            )  # fmt: skip
