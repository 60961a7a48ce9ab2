"""decode, Triton for NVIDIA and AMD                                              maths: README.md

o_i = sum_j p_ij v_j / l_i,   p_ij = exp(s_ij - m_i),   over the keys of a cache, each read from memory once.

             one sequence's keys ->               split: a program owns SPLIT keys of a key head and BM of the
         +---------+---------+-----+              R = group x Nq query rows that read it; it writes (m, l, o).
 R rows  | split 0 | split 1 | ... |              merge: a program owns one query row of one head, adds its
         +---------+---------+-----+              splits in order, and puts in the sink.
          (m, l, o) (m, l, o)       -> o, lse

Nobody waits for lengths on the way to a launch: there are as many programs as the cache has room for, and those past a
sequence's length end at once.  Splits lie at multiples of SPLIT from the first token, so that the order of every sum
depends on the sequence alone.  A length past the cache is cut to it, a page number to those that exist.

Tiles are BM x BN / warps / stages.  Compiled: registers of a thread, and spills in bytes (NVIDIA)
or registers (AMD).               from: Triton 3.7.1, compared by tests/test_compile_targets.py

    16 bits  sm_90 (H100)         sm_100   sm_80, other sm      gfx942 (MI300)
             tile        reg spl  reg spl  tile        reg spl  tile        reg spl
    64       16x128/4/3  143   0  144   0  16x128/4/2  128   0  16x64/4/2   113   0
    128      16x64/4/3   114   0  116   0  16x64/4/2   128   0  16x64/4/1   143   0
    256      16x64/4/2   166   0  168   0  16x32/4/2   168   0  16x32/4/1   142   0

    32 bits  NVIDIA (sm_90 read)  gfx942 (MI300)
             tile        reg spl  tile        reg spl
    64       16x64/4/2    80   0  16x64/4/1   146   0
    128      16x32/8/2    80   0  16x32/4/1   170   0
    256      16x32/8/1   106   0  16x16/4/1   184   0

Measured: not yet run on a GPU; results are checked in Triton's interpreter, code by reading it.
Not done, for want of a GPU to measure on: splits of a size that fits the GPU, one launch for short sequences.
Assumes D and Dv <= 256 (limits in api.py).  Any strides with a dense last axis; 16-byte loads where 8 divides them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common.triton_dtypes import dot, narrow
from fastattn.kernels.common.triton_pairs import Place


class Size(NamedTuple):
    """Widths, the powers of two that hold them, a tile's query rows and keys, and a split's keys; all constexpr."""

    D: Any
    DV: Any
    BD: Any
    BDV: Any
    BM: Any
    BN: Any
    SPLIT: Any


class Cache(NamedTuple):
    """Token j of head h of sequence b begins at  p + UNIT (place stride_b + h stride_h + row stride_n): in a dense cache
    place and row are b and j, in pages of PAGE tokens table[b, j // PAGE] and j % PAGE."""

    p: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any
    UNIT: Any  # constexpr


class Room(NamedTuple):
    """What sequences have: their lengths, the table of pages or None, and what the cache holds."""

    lengths: Any
    length_step: Any
    table: Any
    table_b: Any
    table_p: Any
    num_pages: Any
    page_size: Any
    capacity: Any  # tokens
    num_new: Any


@triton.jit
def _tokens(room, b):
    """How many tokens a sequence has, the new ones included; never more than there is room for."""
    length = tl.load(room.lengths + b.to(tl.int64) * room.length_step).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0) + room.num_new, room.capacity).to(tl.int32)


@triton.jit
def _places(cache, room, b, h, j, is_token):
    """Addresses of tokens j [BN] of one head; page numbers are read where ``is_token``."""
    p_head = cache.p + tl.cast(h, tl.int64) * cache.stride_h * cache.UNIT
    if room.table is None:
        place = tl.cast(b, tl.int64) * cache.stride_b * cache.UNIT + j.to(tl.int64) * (
            cache.stride_n * cache.UNIT
        )
    else:
        p_table = (
            room.table
            + tl.cast(b, tl.int64) * room.table_b
            + (j // room.page_size).to(tl.int64) * room.table_p
        )
        page = tl.load(p_table, mask=is_token, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), room.num_pages - 1)
        place = page * (cache.stride_b * cache.UNIT) + (j % room.page_size).to(tl.int64) * (
            cache.stride_n * cache.UNIT
        )
    return p_head + place


@triton.jit
def _load(cache, room, b, h, j, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens j [BN] of one head as a tile [BN, BLOCK]; zero from token n on and past WIDTH columns."""
    d = tl.arange(0, BLOCK)[None, :]
    p_tile = _places(cache, room, b, h, j, j < n)[:, None] + d
    if WIDTH == BLOCK:
        tile = tl.load(p_tile, mask=(j < n)[:, None], other=0.0)
    else:
        tile = tl.load(p_tile, mask=(j < n)[:, None] & (d < WIDTH), other=0.0)
    return tile


# ---- Scores of these kernels: what is done to a logit before the softmax ---------------------------------


class Score(NamedTuple):
    scale: Any
    softcap: Any
    slopes: Any  # [Hq] or None
    IS_CAPPED: Any  # constexpr


@triton.jit
def _tanh(x):
    """Within 2 ulp; near zero, where 1 - 2 / (exp(2x) + 1) would cancel, by a polynomial in x^2."""
    z = x * x
    y = z * -0.006001800764 + 0.02093142457
    y = y * z - 0.05383701622
    y = y * z + 0.1333267838
    y = y * z - 0.3333332837
    size = tl.minimum(tl.abs(x), 20.0)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(tl.abs(x) < 0.625, y * z * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _logits(score, s, slope, distance):
    x = s * score.scale
    if score.IS_CAPPED:
        x = _tanh(x / score.softcap) * score.softcap
    if score.slopes is not None:
        x -= slope * tl.abs(distance).to(tl.float32)
    return x


# ---- The kernels ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("Hk", "group", "Nq", "num_splits"))
def decode_split(parts, stats, q, k, v, room, bounds, score, size, Hk, group, Nq, num_splits):
    # Find the split and its rows.
    NARROW: tl.constexpr = q.p.dtype.element_ty != tl.float32
    R = group * Nq
    num_tiles = tl.cdiv(R, size.BM)
    split = tl.program_id(0) % num_splits
    tile = tl.program_id(0) // num_splits % num_tiles
    h = tl.program_id(0) // num_splits // num_tiles % Hk
    b = tl.program_id(0) // num_splits // num_tiles // Hk
    n = _tokens(room, b)
    place = Place(b, h, Nq, n)
    r = tile * size.BM + tl.arange(0, size.BM)  # [BM]
    i = r % Nq
    some = masks.keys(bounds, 0, Nq, Nq, n)
    begin = tl.maximum(some[0] // size.BN * size.BN, split * size.SPLIT)
    end = tl.minimum(some[1], (split + 1) * size.SPLIT)
    if begin >= end:
        return

    # Load its query rows, once: row r is query r % Nq of head h * group + r // Nq.
    d = tl.arange(0, size.BD)[None, :]
    hq = tl.minimum(h * group + r // Nq, Hk * group - 1)
    m_q = (r < R)[:, None] & (d < size.D)
    p_q = rows.place(q, b, hq[:, None], i[:, None], d)
    q_tile = tl.load(p_q, mask=m_q, other=0.0)  # [BM, BD]
    slope = tl.zeros([size.BM], tl.float32)
    if score.slopes is not None:
        slope = tl.load(score.slopes + hq)
    unit = softmax.unit(NARROW)
    m = tl.full([size.BM], float("-inf"), tl.float32)
    l = tl.zeros([size.BM], tl.float32)
    acc = tl.zeros([size.BM, size.BDV], tl.float32)

    # Walk its keys.
    for j0 in tl.range(begin, end, size.BN):
        j = j0 + tl.arange(0, size.BN)  # [BN]
        k_tile = _load(k, room, b, h, j, n, size.D, size.BD)  # [BN, BD]
        v_tile = _load(v, room, b, h, j, n, size.DV, size.BDV)  # [BN, BDV]
        s = dot(q_tile, tl.trans(k_tile), tl.zeros([size.BM, size.BN], tl.float32))  # [BM, BN]
        x = _logits(score, s, slope[:, None], (n - Nq + i)[:, None] - j[None, :]) * unit
        is_seen = masks.visible(bounds, place, i[:, None], j[None, :]) & (j < end)[None, :]
        x = tl.where(is_seen, x, float("-inf"))
        p, rescale, m, l = softmax.absorb(x, 1.0, m, l, NARROW, True)
        acc = dot(narrow(p, v_tile.dtype), v_tile, acc * rescale[:, None])  # [BM, BDV]

    # Write the part: o, then m and l.
    dv = tl.arange(0, size.BDV)[None, :]
    at = ((tl.cast(b, tl.int64) * Hk * group + hq) * Nq + i) * num_splits + split  # [BM]
    tl.store(parts + at[:, None] * size.DV + dv, acc, mask=(r < R)[:, None] & (dv < size.DV))
    tl.store(stats + 2 * at, m, mask=r < R)
    tl.store(stats + 2 * at + 1, l, mask=r < R)


@triton.jit(do_not_specialize=("Hq", "Nq", "num_splits"))
def decode_merge(o, lse, parts, stats, room, bounds, sinks, size, Hq, Nq, num_splits):
    NARROW: tl.constexpr = o.p.dtype.element_ty != tl.float32
    i = tl.program_id(0) % Nq
    h = tl.program_id(0) // Nq % Hq
    b = tl.program_id(0) // Nq // Hq
    n = _tokens(room, b)
    some = masks.keys(bounds, 0, Nq, Nq, n)
    first = some[0] // size.SPLIT
    last = tl.where(some[1] > some[0], tl.cdiv(some[1], size.SPLIT), first)
    dv = tl.arange(0, size.BDV)
    unit = softmax.unit(NARROW)

    # Add the splits in order; the sink is a logit without a value.
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    if sinks is not None:
        m = tl.zeros([1], tl.float32) + tl.load(sinks + h) * unit
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([1, size.BDV], tl.float32)
    at = tl.program_id(0).to(tl.int64) * num_splits
    for split in tl.range(first, last):
        m_part = tl.load(stats + 2 * (at + split) + tl.zeros([1], tl.int32))
        l_part = tl.load(stats + 2 * (at + split) + 1 + tl.zeros([1], tl.int32))
        part = tl.load(parts + (at + split) * size.DV + dv, mask=dv < size.DV, other=0.0)[None, :]
        acc, m, l = softmax.join(acc, m, l, part, m_part, l_part, NARROW)

    # Divide and write.
    o_tile, lse_tile, rest = softmax.finish(acc, m, l, NARROW)
    rows.store(o, b, h, i, o_tile, Nq, 1, size.DV, size.BDV)
    rows.store_scalars(lse, b, h, i, lse_tile, Nq, 1)


@triton.jit(do_not_specialize=("Hk", "num_new"))
def decode_append(cache, new, room, Hk, num_new, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One new token of one head; not written where the cache has no room."""
    i = tl.program_id(0) % num_new
    h = tl.program_id(0) // num_new % Hk
    b = tl.program_id(0) // num_new // Hk
    length = tl.load(room.lengths + tl.cast(b, tl.int64) * room.length_step).to(tl.int64)
    is_room = (length >= 0) & (length + num_new <= room.capacity)
    j = (tl.where(is_room, length, 0) + i).to(tl.int32) + tl.zeros([1], tl.int32)
    d = tl.arange(0, BLOCK)[None, :]
    m_row = is_room & (d < WIDTH)
    row = tl.load(rows.place(new, b, h, i, d), mask=m_row, other=0.0)  # [1, BLOCK]
    tl.store(_places(cache, room, b, h, j, is_room)[:, None] + d, row, mask=m_row)


# ---- Launch -----------------------------------------------------------------------------------------------

SPLIT = 512  # keys of a split


class Tile(NamedTuple):
    """BM query rows x BN keys a step, and how many warps and load stages work on it."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By the bytes of a number and the kind of processor: for widths to 64, 128 and 256.
TILES = {
    2: {
        "sm_90": (Tile(16, 128, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 2)),
        "sm": (Tile(16, 128, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
        "gfx": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 1), Tile(16, 32, 4, 1)),
    },
    4: {
        "sm_90": (Tile(16, 64, 4, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
        "sm": (Tile(16, 64, 4, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 1)),
        "gfx": (Tile(16, 64, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    },
}


def choose(target, itemsize, width):
    if target == "interpreter":
        return Tile(16, 64, 1, 1)
    return TILES[itemsize][target][0 if width <= 64 else 1 if width <= 128 else 2]


def _cache(t, table):
    """A dense cache [B, Hk, Nmax, D], or pages [pages, page_size, Hk, D]."""
    b, h, n, _ = t.stride() if table is None else (t.stride(0), t.stride(2), t.stride(1), 1)
    unit = 8 if (b | h | n) % 16 == 8 else 1  # Triton sees by itself where 16 divides a stride
    return Cache(t, b // unit, h // unit, n // unit, tl.constexpr(unit))


def _room(k_cache, lengths, table, num_new):
    if table is None:
        return Room(lengths, lengths.stride(0), None, 0, 0, 1, 1, k_cache.shape[2], num_new)
    page_size = k_cache.shape[1]
    return Room(
        lengths, lengths.stride(0), table, *table.stride(), max(k_cache.shape[0], 1), max(page_size, 1),
        table.shape[1] * page_size if k_cache.shape[0] else 0, num_new,
    )  # fmt: skip


def forward(
    o, lse, q, k_cache, v_cache, lengths, block_table, sinks, alibi_slopes, *more
):  # fmt: skip
    num_new, mask, scale, softcap, num_splits = more[
        -5:
    ]  # before them, what the row's limits refuse
    B, Hq, Nq, D = q.shape
    Hk, DV = k_cache.shape[1 if block_table is None else 2], v_cache.shape[3]
    if B * Hq * Nq == 0:
        return
    room = _room(k_cache, lengths, block_table, num_new)
    tile = choose(launch.target(q.device.index), q.element_size(), max(D, DV))
    # Without waiting for lengths num_splits can only divide what the cache has room for.
    split = triton.cdiv(max(room.capacity, 1), num_splits or 1) if num_splits else SPLIT
    split = triton.cdiv(split, tile.BN) * tile.BN
    count = max(triton.cdiv(room.capacity, split), 1)
    parts = torch.empty((B, Hq, Nq, count, DV), dtype=torch.float32, device=q.device)
    stats = torch.empty((B, Hq, Nq, count, 2), dtype=torch.float32, device=q.device)
    size = Size(
        *map(tl.constexpr, (D, DV, launch.block(D), launch.block(DV), tile.BM, tile.BN, split))
    )
    score = Score(scale, softcap, alibi_slopes, tl.constexpr(softcap != 0))
    bounds = masks.encode(mask, Nq, 0, is_packed=True)
    group = Hq // Hk
    num_tiles = triton.cdiv(group * Nq, tile.BM)
    with launch.on(q):
        decode_split[(B * Hk * num_tiles * count,)](
            parts, stats, rows.rows(q), _cache(k_cache, block_table), _cache(v_cache, block_table), room, bounds,
            score, size, Hk, group, Nq, count, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        decode_merge[(B * Hq * Nq,)](
            rows.rows(o), rows.rows(lse), parts, stats, room, bounds, sinks, size, Hq, Nq, count, num_warps=1
        )  # fmt: skip


def append(k_cache, v_cache, k_new, v_new, lengths, block_table):
    B, Hk, num_new, _ = k_new.shape
    if B * Hk * num_new == 0:
        return
    room = _room(k_cache, lengths, block_table, num_new)
    with launch.on(k_new):
        for cache, new in ((k_cache, k_new), (v_cache, v_new)):
            width = tl.constexpr(new.shape[3])
            block = tl.constexpr(launch.block(new.shape[3]))
            decode_append[(B * Hk * num_new,)](
                _cache(cache, block_table),
                rows.rows(new),
                room,
                Hk,
                num_new,
                width,
                block,
                num_warps=1,
            )
