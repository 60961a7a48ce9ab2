"""attention, forward and backward, Triton for NVIDIA and AMD                    maths: README.md

o_i = sum_j p_ij v_j / l_i,   p_ij = exp(s_ij - m_i),   s_ij = scale q_i . k_j,   m_i = max_j s_ij
ds_ij = p_ij (dp_ij - delta_i),   delta_i = do_i . o_i - dlse_i,   p_ij = exp(s_ij - lse_i)

              Nk ->  K_j, V_j [BN x D]          fwd, dq: a program owns BM queries of a head and
      +-----+   +----+----+----+----+           walks the keys that the mask shows; tiles with no
 Nq   | Q_i | x | j0 | j1 | j2 | .. | -> o, dq  hidden pair first, then the partial ones.
  |   +-----+   +----+----+----+----+           dkdv: a program owns BN keys and walks the queries
  v   | Q_i | x | j  | -> dk, dv                of every head that reads them.  s and dp are made
      +-----+   +----+                          twice, so that each sum has one owner and one
      | ... |                                   order: no atomics, the same bits every time.

What a program owns lies in shared memory once, what it walks num_stages deep; sums in registers.
dq also writes what dkdv subtracts from logits (shift) and from dp (delta).  Float32 products are
those of float32 (no tf32), and dq corrects delta by a pass of its own: README.md, section 5.

Tiles are BM x BN / warps / stages.  Compiled: registers of a thread, and spills in bytes (NVIDIA)
or registers (AMD).               from: Triton 3.7.1, compared by tests/test_compile_targets.py

    16 bits    sm_90 (H100)         sm_100       sm_80, other sm      gfx942 (MI300)
               tile        reg spl  reg spl      tile        reg spl  tile        reg spl
    fwd    64  128x64/4/3  254   0  238   0      128x64/4/3  255  24  128x64/4/2  204   0
    fwd   128  128x128/8/2 255   8  234   0      128x64/8/2  226   0  128x32/4/2  211   0
    fwd   256  128x64/8/2  255   0  248   0      64x32/8/2   229   0  64x32/4/2   302   0
    dq     64  128x64/8/2  125   0   96   0      128x64/8/2  187   0  128x64/4/2  282   0
    dq    128  128x64/8/2  216   0  148   0      64x64/4/2   255   0  64x64/4/2   324   0
    dq    256  128x32/8/2  240   0  242   0      64x16/8/2   195   0  64x32/4/2   511   4
    dkdv   64  64x128/8/2  214   0  161   0      32x128/8/2  255   0  32x64/4/2   223   0
    dkdv  128  64x128/8/2  255  32  185   0      64x64/8/2   177   0  32x64/4/1   287   0
    dkdv  256  32x32/8/2   196   0  196   0      16x32/8/2   194   0  16x32/4/2   352   0

    32 bits    NVIDIA (sm_90 read)  gfx942 (MI300)
               tile        reg spl  tile        reg spl
    fwd    64  64x32/8/2   206   0  64x32/8/2   128   0
    fwd   128  32x16/8/2    64   0  32x32/8/2   168   0
    fwd   256  16x32/8/1    96   0  32x16/8/1   175   0
    dq     64  64x32/8/2   110   0  32x32/8/1   211   0
    dq    128  32x16/8/2    80   0  32x16/8/1   248   0
    dq    256  16x16/8/2    77   0  16x16/4/1   328   1
    dkdv   64  32x32/8/2    91   0  32x32/8/1   215   0
    dkdv  128  16x32/8/1   107   0  16x32/8/1   202   0
    dkdv  256  16x16/8/1   106   0  16x16/4/1   387   0

With grouped heads dkdv at 128 on sm_90 spills 192 bytes, outside the loops over queries.

Measured: not yet run on a GPU; results are checked in Triton's interpreter, code by reading it.
Not done, for want of a GPU to measure on: loads by TMA and warp specialisation on sm_90 and later;
float32 on tensor cores by splitting (3 x tf32); splitting keys over programs when queries are few.
Assumes D and Dv <= 256 (limits in api.py).  Any strides; 16-byte loads where 8 divides them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_scores as scores
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common.triton_dtypes import dot, narrow


class Size(NamedTuple):
    """Widths, the powers of two that hold them, and a tile's queries and keys; all constexpr."""

    D: Any
    DV: Any
    BD: Any
    BDV: Any
    BM: Any
    BN: Any


# ---- Forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("Hq", "Nq", "Nk"))
def attention_fwd(o, lse, q, k, v, mask, score, size, Hq, group, Nq, Nk):
    # Find the tile.  Under a causal mask the last queries see most keys: they start first.
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    num_tiles = tl.cdiv(Nq, size.BM)
    i0 = (num_tiles - 1 - tl.program_id(0) % num_tiles) * size.BM
    h = tl.program_id(0) // num_tiles % Hq
    b = tl.program_id(0) // num_tiles // Hq
    hk = h // group

    # Load the queries, once.
    q_tile = rows.load(q, b, h, i0, Nq, size.BM, size.D, size.BD, True)  # [BM, BD]
    q_tile = scores.orient(score, q_tile)
    factor = tl.abs(scores.factor(score)) * softmax.unit(NARROW)
    m = tl.full([size.BM], float("-inf"), tl.float32)
    l = tl.zeros([size.BM], tl.float32)
    acc = tl.zeros([size.BM, size.BDV], tl.float32)

    # Walk the keys: first the tiles without a hidden pair, then the others.
    i1 = tl.minimum(i0 + size.BM, Nq)
    some = masks.keys(mask, i0, i1, Nq, Nk)
    walk = masks.walk(some, masks.keys_all(mask, i0, i1, Nq, Nk), size.BN)
    for j0 in tl.range(walk.full_begin, walk.full_end, size.BN):
        acc, m, l = _absorb(
            acc, m, l, q_tile, k, v, b, hk, i0, j0, Nk, mask, score, factor, size, False
        )
    for t in tl.range(0, walk.num_partial):
        j0 = masks.partial(walk, t, size.BN)
        acc, m, l = _absorb(
            acc, m, l, q_tile, k, v, b, hk, i0, j0, Nk, mask, score, factor, size, True
        )

    # Divide and write.
    o_tile, lse_tile = softmax.finish(acc, m, l, NARROW)
    rows.store(o, b, h, i0, o_tile, Nq, size.BM, size.DV, size.BDV)
    rows.store_scalars(lse, b, h, i0, lse_tile, Nq, size.BM)


@triton.jit
def _absorb(
    acc, m, l, q, k, v, b, hk, i0, j0, Nk, mask, score, factor, size, PARTIAL: tl.constexpr
):
    """Take the keys j0 .. j0 + BN into the running softmax of the queries i0 .. i0 + BM."""
    NARROW: tl.constexpr = q.dtype != tl.float32
    i = i0 + tl.arange(0, size.BM)[:, None]
    j = j0 + tl.arange(0, size.BN)[None, :]
    k_tile = rows.load(k, b, hk, j0, Nk, size.BN, size.D, size.BD, PARTIAL)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, size.BN, size.DV, size.BDV, PARTIAL)  # [BN, BDV]
    s = dot(q, tl.trans(k_tile), tl.zeros([size.BM, size.BN], tl.float32))  # [BM, BN]
    x = scores.logits(score, s, i, j)
    if PARTIAL:
        x = tl.where(masks.visible(mask, i, j) & (j < Nk), x * factor, float("-inf"))
        factor = 1.0
    p, rescale, m, l = softmax.absorb(x, factor, m, l, NARROW, PARTIAL)
    return dot(narrow(p, v_tile.dtype), v_tile, acc * rescale[:, None]), m, l  # [BM, BDV]


# ---- Backward: dq by tiles of queries, then dk and dv by tiles of keys --------------------------


@triton.jit(do_not_specialize=("Hq", "Nq", "Nk"))
def attention_dq(dq, shift, delta, do, dlse, q, k, v, o, lse, mask, score, size, Hq, group, Nq, Nk):
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    num_tiles = tl.cdiv(Nq, size.BM)
    i0 = (num_tiles - 1 - tl.program_id(0) % num_tiles) * size.BM
    h = tl.program_id(0) // num_tiles % Hq
    b = tl.program_id(0) // num_tiles // Hq
    hk = h // group
    q_tile = rows.load(q, b, h, i0, Nq, size.BM, size.D, size.BD, True)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, size.BM, size.DV, size.BDV, True)  # [BM, BDV]
    lse_tile = rows.load_scalars(lse, b, h, i0, Nq, size.BM)  # [BM]
    shift_tile = softmax.shift(lse_tile, NARROW)
    factor = scores.factor(score) * softmax.unit(NARROW)
    i1 = tl.minimum(i0 + size.BM, Nq)
    some = masks.keys(mask, i0, i1, Nq, Nk)
    walk = masks.walk(some, masks.keys_all(mask, i0, i1, Nq, Nk), size.BN)

    # delta_i = do_i . o_i - dlse_i, kept with the shift for the pass over keys.
    o_tile = rows.load(o, b, h, i0, Nq, size.BM, size.DV, size.BDV, True)  # [BM, BDV]
    delta_tile = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # [BM]
    if not NARROW:
        # In float32 the roundings of o would show: correct until sum_j p_ij (dp_ij - delta_i) = 0.
        excess = tl.zeros([size.BM], tl.float32)
        total = tl.zeros([size.BM], tl.float32)
        for j0 in tl.range(some[0] // size.BN * size.BN, some[1], size.BN):
            k_tile, s, p, dp = _weights(
                q_tile,
                do_tile,
                shift_tile,
                k,
                v,
                b,
                hk,
                i0,
                j0,
                Nk,
                mask,
                score,
                factor,
                size,
                True,
            )
            excess += tl.sum(p * (dp - delta_tile[:, None]), 1)
            total += tl.sum(p, 1)
        delta_tile += excess / tl.where(total == 0.0, 1.0, total)
    if dlse is not None:
        dlse_tile = rows.load_scalars(dlse, b, h, i0, Nq, size.BM)  # [BM]
        delta_tile -= tl.where(lse_tile == float("-inf"), 0.0, dlse_tile)  # lse is constant there
    rows.store_scalars(delta, b, h, i0, delta_tile, Nq, size.BM)
    rows.store_scalars(shift, b, h, i0, shift_tile, Nq, size.BM)

    # Walk the keys as the forward pass does.
    acc = tl.zeros([size.BM, size.BD], tl.float32)
    for j0 in tl.range(walk.full_begin, walk.full_end, size.BN):
        k_tile, s, p, dp = _weights(
            q_tile, do_tile, shift_tile, k, v, b, hk, i0, j0, Nk, mask, score, factor, size, False
        )
        acc = _add_dq(acc, delta_tile, k_tile, s, p, dp, i0, j0, score, size)
    for t in tl.range(0, walk.num_partial):
        j0 = masks.partial(walk, t, size.BN)
        k_tile, s, p, dp = _weights(
            q_tile, do_tile, shift_tile, k, v, b, hk, i0, j0, Nk, mask, score, factor, size, True
        )
        acc = _add_dq(acc, delta_tile, k_tile, s, p, dp, i0, j0, score, size)
    rows.store(dq, b, h, i0, acc * scores.scale(score), Nq, size.BM, size.D, size.BD)


@triton.jit
def _weights(
    q, do, shift, k, v, b, hk, i0, j0, Nk, mask, score, factor, size, PARTIAL: tl.constexpr
):
    """The keys j0 .. j0 + BN; their products with BM queries, the weights p, and dp."""
    NARROW: tl.constexpr = q.dtype != tl.float32
    i = i0 + tl.arange(0, size.BM)[:, None]
    j = j0 + tl.arange(0, size.BN)[None, :]
    k_tile = rows.load(k, b, hk, j0, Nk, size.BN, size.D, size.BD, PARTIAL)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, size.BN, size.DV, size.BDV, PARTIAL)  # [BN, BDV]
    s = dot(q, tl.trans(k_tile), tl.zeros([size.BM, size.BN], tl.float32))  # [BM, BN]
    p = softmax.weights(scores.logits(score, s, i, j), factor, shift[:, None], NARROW)  # [BM, BN]
    if PARTIAL:
        p = tl.where(masks.visible(mask, i, j) & (j < Nk), p, 0.0)
    dp = dot(do, tl.trans(v_tile), tl.zeros([size.BM, size.BN], tl.float32))  # [BM, BN]
    return k_tile, s, p, dp


@triton.jit
def _add_dq(acc, delta, k, s, p, dp, i0, j0, score, size):
    """Add what the keys j0 .. j0 + BN give to dq of the queries i0 .. i0 + BM."""
    i = i0 + tl.arange(0, size.BM)[:, None]
    j = j0 + tl.arange(0, size.BN)[None, :]
    ds = scores.logits_grad(score, p * (dp - delta[:, None]), s, i, j)  # [BM, BN]
    return dot(narrow(ds, k.dtype), k, acc)  # [BM, BD]


@triton.jit(do_not_specialize=("Hk", "Nq", "Nk"))
def attention_dkdv(dk, dv, do, pairs, q, k, v, mask, score, size, Hk, group, Nq, Nk):
    # Find the tile.  Under a causal mask the first keys are seen by most queries: they start first.
    num_tiles = tl.cdiv(Nk, size.BN)
    j0 = tl.program_id(0) % num_tiles * size.BN
    hk = tl.program_id(0) // num_tiles % Hk
    b = tl.program_id(0) // num_tiles // Hk
    k_tile = rows.load(k, b, hk, j0, Nk, size.BN, size.D, size.BD, True)  # [BN, BD]
    v_tile = rows.load(v, b, hk, j0, Nk, size.BN, size.DV, size.BDV, True)  # [BN, BDV]
    factor = scores.factor(score) * softmax.unit(k_tile.dtype != tl.float32)
    dk_acc = tl.zeros([size.BN, size.BD], tl.float32)
    dv_acc = tl.zeros([size.BN, size.BDV], tl.float32)

    # Walk the queries of every head that reads these keys, always in the same order: no atomics.
    j1 = tl.minimum(j0 + size.BN, Nk)
    some = masks.queries(mask, j0, j1, Nq, Nk)
    walk = masks.walk(some, masks.queries_all(mask, j0, j1, Nq, Nk), size.BM)
    for g in tl.range(0, group):
        h = hk * group + g
        for i0 in tl.range(walk.full_begin, walk.full_end, size.BM):
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, q, do, pairs,
                b, h, i0, j0, Nq, mask, score, factor, size, False,
            )  # fmt: skip
        for t in tl.range(0, walk.num_partial):
            i0 = masks.partial(walk, t, size.BM)
            dk_acc, dv_acc = _add_dkdv(
                dk_acc, dv_acc, k_tile, v_tile, q, do, pairs,
                b, h, i0, j0, Nq, mask, score, factor, size, True,
            )  # fmt: skip
    rows.store(dk, b, hk, j0, dk_acc * scores.scale(score), Nk, size.BN, size.D, size.BD)
    rows.store(dv, b, hk, j0, dv_acc, Nk, size.BN, size.DV, size.BDV)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q, do, pairs, b, h, i0, j0, Nq, mask, score, factor, size,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add what the queries i0 .. i0 + BM of one head give to dk and dv of the keys j0 .. j0 + BN.

    Everything is transposed, keys x queries, so that p and ds are ready as left factors.  Queries
    past Nq add nothing: their do, shift and delta are loaded as zero.
    """
    NARROW: tl.constexpr = k.dtype != tl.float32
    i = i0 + tl.arange(0, size.BM)[None, :]
    j = j0 + tl.arange(0, size.BN)[:, None]
    q_tile = rows.load(q, b, h, i0, Nq, size.BM, size.D, size.BD, PARTIAL)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, size.BM, size.DV, size.BDV, PARTIAL)  # [BM, BDV]
    # Out of a tile, because single loads of rows would be made by each of the threads that need one.
    pair_tile = rows.load(pairs, b, h, i0, Nq, size.BM, 2, 2, PARTIAL)  # [BM, 2]
    is_shift = tl.arange(0, 2)[None, :] == 0
    shift_row = tl.sum(tl.where(is_shift, pair_tile, 0.0), 1)[None, :]  # [1, BM]
    delta_row = tl.sum(tl.where(is_shift, 0.0, pair_tile), 1)[None, :]  # [1, BM]
    s = dot(k, tl.trans(q_tile), tl.zeros([size.BN, size.BM], tl.float32))  # [BN, BM]
    p = softmax.weights(scores.logits(score, s, i, j), factor, shift_row, NARROW)  # [BN, BM]
    if PARTIAL:
        p = tl.where(masks.visible(mask, i, j), p, 0.0)
    dv = dot(narrow(p, do_tile.dtype), do_tile, dv)  # [BN, BDV]
    dp = dot(v, tl.trans(do_tile), tl.zeros([size.BN, size.BM], tl.float32))  # [BN, BM]
    ds = scores.logits_grad(score, p * (dp - delta_row), s, i, j)  # [BN, BM]
    return dot(narrow(ds, q_tile.dtype), q_tile, dk), dv  # [BN, BD]


# ---- Launch -------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """BM queries x BN keys a step, and how many warps and load stages work on it."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By the bytes of a number, the kind of processor and the kernel: for widths to 64, 128 and 256.
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
            "dkdv": (Tile(32, 128, 8, 2), Tile(64, 64, 8, 2), Tile(16, 32, 8, 2)),
        },
        "gfx": {
            "fwd": (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 32, 4, 2)),
            "dq": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
            "dkdv": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), Tile(16, 32, 4, 2)),
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
}
TILES[4]["sm_90"] = TILES[4]["sm"]
# Where programs that own 128 rows each have too few rows, or are too few to fill a GPU, they own 64.
SMALL = {"fwd": Tile(64, 64, 4, 2), "dq": Tile(64, 64, 4, 2), "dkdv": Tile(32, 64, 4, 2)}
FEW_PROGRAMS = 128
KERNELS = {"fwd": attention_fwd, "dq": attention_dq, "dkdv": attention_dkdv}


def choose(name, target, itemsize, width, heads, N):
    """The tile for a kernel that owns the N rows, queries or keys, of so many heads."""
    if target == "interpreter":
        return Tile(64, 64, 1, 1)
    tile = TILES[itemsize][target][name][0 if width <= 64 else 1 if width <= 128 else 2]
    owned = tile.BN if name == "dkdv" else tile.BM
    few = N <= 64 or heads * triton.cdiv(N, 128) <= FEW_PROGRAMS
    return SMALL[name] if few and owned == 128 and width <= 128 and target != "gfx" else tile


def run(name, tensors, q, k, v, mask, scale):
    """Launch a kernel, one program a tile of the rows that it owns."""
    B, Hq, Nq, D = q.shape
    _, Hk, Nk, DV = v.shape
    H, N = (Hk, Nk) if name == "dkdv" else (Hq, Nq)
    if B * H * N == 0:
        return
    target = launch.target(q.device.index)
    tile = choose(name, target, q.element_size(), max(D, DV), B * H, N)
    num_tiles = triton.cdiv(N, tile.BN if name == "dkdv" else tile.BM)
    size = (D, DV, launch.block(D), launch.block(DV), tile.BM, tile.BN)
    KERNELS[name][(B * H * num_tiles,)](
        *(t if t is None else rows.rows(t) for t in tensors),
        masks.encode(mask, Nq, Nk), scores.encode(scale), Size(*map(tl.constexpr, size)),
        H, Hq // Hk, Nq, Nk,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def forward(o, lse, q, k, v, mask, scale):
    with launch.on(q):
        run("fwd", (o, lse, q, k, v), q, k, v, mask, scale)


def backward(dq, dk, dv, do, dlse, q, k, v, o, lse, mask, scale):
    # What is subtracted from logits and from dp, side by side for each query.
    pairs = torch.empty((*lse.shape, 2), dtype=torch.float32, device=q.device)
    shift, delta = pairs.unbind(-1)
    with launch.on(q):
        run("dq", (dq, shift, delta, do, dlse, q, k, v, o, lse), q, k, v, mask, scale)
        run("dkdv", (dk, dv, do, pairs, q, k, v), q, k, v, mask, scale)
