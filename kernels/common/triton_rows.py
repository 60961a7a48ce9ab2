"""Where the rows of a tensor [B, H, N, D] live, and tiles of them.

Kernels carry a tensor as ``Rows``, a pointer and its strides in elements, and ask for tiles of
consecutive rows of one head.  Places of heads are 64-bit, since a tensor may pass 2^31 elements;
places inside a head are 32-bit wherever that is enough, which saves a register an address.

Sequences may also lie packed, end to end in the rows of a single batch: then b counts sequences, and
``length`` and ``tile`` read on the GPU where each begins and which of them a program works on.  Tiles
do not cross sequences.  Whatever the ends are, nothing outside the tensor is touched.

Or in groups of slots, each of which holds the number of a token or nothing: then b counts the groups of
all batches, and row i of one is the token that its slot i holds, gathered on the way.  What has a row for
each slot (lse, sums not yet put together) lies as packed sequences do, in every batch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common.triton_dtypes import narrow


class Rows(NamedTuple):
    """Row i of head h of batch b begins at  p + UNIT (b stride_b + h stride_h + i stride_n)."""

    p: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any
    stride_d: Any
    UNIT: Any  # constexpr
    IS_WIDE: Any  # constexpr: places inside a head pass 2^31
    ends: Any  # of packed sequences and groups
    slots: Any  # whose tokens the rows are
    IS_PACKED: Any  # constexpr
    IS_GROUPED: Any  # constexpr: packed in every batch, and b counts the sequences of all of them
    HAS_SLOTS: Any  # constexpr; in Triton 3.6 a tuple that may be None holds no None


class Ends(NamedTuple):
    """Sequence b is the rows p[b] to p[b + 1] of N; there are ``num`` of them."""

    p: Any
    num: Any
    N: Any


class Slots(NamedTuple):
    """Slot t of head h of a batch holds the token  p[batch stride_b + h // per stride_h + t]  of ``num``, or none.

    Its label lies ``stride_label`` behind it.
    """

    p: Any
    stride_b: Any
    stride_h: Any
    stride_label: Any
    per: Any  # heads that a row of the index serves
    num: Any
    HAS_LABELS: Any  # constexpr


class Heads(NamedTuple):
    """The key head of query head h is p[h], at most ``last``."""

    p: Any
    last: Any


def ends_of(ends, N):
    return Ends(ends, ends.shape[0] - 1, N)


def slots_of(index, H, num_tokens):
    """An index int32 [B|1, heads, 1 or 2, slots] for a tensor of H heads and so many tokens."""
    B, heads, planes, _ = index.shape
    return Slots(
        index, index.stride(0) if B > 1 else 0, index.stride(1) if heads > 1 else 0,
        index.stride(2), max(H // max(heads, 1), 1), num_tokens, tl.constexpr(planes > 1),
    )  # fmt: skip


def rows(t, ends=None, index=None, is_grouped=False):
    """A tensor [B, H, N, D], or [B, H, N] of one number a row, or [N, D] of a single head.

    ``ends`` int32 [num + 1]: the tensor is [1, H, N, D] and holds packed sequences; or it is of tokens, and
    ``index`` says which of them each slot of a group holds; or, if ``is_grouped``, of slots.
    """
    b, h, n, d = {4: t.stride(), 3: (*t.stride(), 0), 2: (0, 0, *t.stride())}[t.dim()]
    # Triton sees where 16 divides a stride, and loads 16 bytes at a time; of 8 it must be told.
    unit = 8 if (b | h | n) % 16 == 8 else 1
    N = t.shape[-1 if t.dim() == 3 else -2] + 256  # tiles overhang by less
    is_wide = N * n + 256 * d >= 1 << 31
    return Rows(
        t, b // unit, h // unit, n // unit, d, tl.constexpr(unit), tl.constexpr(is_wide),
        tl.constexpr(0) if ends is None else ends_of(ends, t.shape[2] if index is None else index.shape[3]),
        tl.constexpr(0) if index is None else slots_of(index, t.shape[1], t.shape[2]),
        tl.constexpr(ends is not None), tl.constexpr(is_grouped or index is not None),
        tl.constexpr(index is not None),
    )  # fmt: skip


def num_tiles(B, N, BLOCK, ends=None):
    """How many tiles of BLOCK rows hold the rows of a head: for packed sequences, of which the lengths are
    not known here, at most one more than whole tiles for each."""
    if ends is None:
        return B * triton.cdiv(N, BLOCK)
    return B * (N // BLOCK + ends.shape[0] - 1)


@triton.jit
def tile(t, H, N, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The batch, the head and the first row of this program; beyond the last row, it has no work.

    Packed sequence b has the places from  begin(b) // BLOCK + b  on: as many as it needs, or one more.
    """
    if not t.IS_PACKED:
        num_tiles = tl.cdiv(N, BLOCK)
        h = tl.program_id(0) // num_tiles % H
        b = tl.program_id(0) // num_tiles // H
        at = tl.program_id(0) % num_tiles
        if LAST_FIRST:
            at = num_tiles - 1 - at
    else:
        h = tl.program_id(0) % H
        spot = tl.program_id(0) // H
        before = spot * 0  # sequences of the batches before
        if t.IS_GROUPED:
            spots = t.ends.N // BLOCK + t.ends.num  # of a batch
            before = spot // spots * t.ends.num
            spot = spot % spots
        b = spot * 0
        past = t.ends.num + b
        while past - b > 1:  # begin places of b and of past enclose the place
            middle = (b + past) // 2
            if _begin(t.ends, middle) // BLOCK + middle <= spot:
                b = middle
            else:
                past = middle
        at = spot - (_begin(t.ends, b) // BLOCK + b)
        at = tl.where(at < 0, t.ends.N // BLOCK + 1, at)  # rows before the first sequence
        b += before
    return b, h, at * BLOCK


@triton.jit
def _begin(ends, b):
    return tl.minimum(tl.maximum(tl.load(ends.p + b), 0), ends.N)


@triton.jit
def length(t, b, N, has_work=True):
    """The rows of batch b: N, or those of a packed sequence, of which a program without work has none."""
    if t.IS_PACKED:
        if t.IS_GROUPED:
            b = b % t.ends.num
        N = tl.where(has_work, tl.maximum(_begin(t.ends, b + 1) - _begin(t.ends, b), 0), 0)
    return N


@triton.jit
def key_head(how, h, group):
    """The key head that query head h reads; ``how.heads`` may say so."""
    if how.heads is None:
        hk = h // group
    else:
        hk = tl.minimum(tl.maximum(tl.load(how.heads.p + h), 0), how.heads.last)
    return hk


@triton.jit
def _p_slots(slots, ends, b, h, i):
    at = tl.cast(b // ends.num, tl.int64) * slots.stride_b
    at += tl.cast(h // slots.per, tl.int64) * slots.stride_h
    return slots.p + (at + _begin(ends, b % ends.num)) + i


@triton.jit
def tokens(slots, ends, b, h, i, N):
    """The tokens that the slots i of a group of N hold; below 0 for none, and for what is no token."""
    token = tl.load(_p_slots(slots, ends, b, h, i), mask=i < N, other=-1)
    return tl.where(token < slots.num, token, -1)


@triton.jit
def labels(slots, ends, b, h, i, N):
    return tl.load(_p_slots(slots, ends, b, h, i) + slots.stride_label, mask=i < N, other=0)


@triton.jit
def _which(t, b, h, i, N):
    """Which rows of the tensor the rows i are, and whether they are there."""
    inside = i < N
    if t.HAS_SLOTS:
        i = tokens(t.slots, t.ends, b, h, i, N)
        inside = i >= 0
    return i, inside


@triton.jit
def is_held(t, b, h, i0, N, NUM: tl.constexpr):
    """Whether the rows i0 .. i0 + NUM are there [NUM]: slots may be empty."""
    i, inside = _which(t, b, h, i0 + tl.arange(0, NUM), N)
    return inside


@triton.jit
def place(t, b, h, i, d):
    """Addresses of rows i [NUM, 1] and columns d [1, BLOCK] of one head; in groups of tokens, those are i."""
    if t.IS_GROUPED:
        p_batch = tl.cast(b // t.ends.num, tl.int64) * t.stride_b
        if not t.HAS_SLOTS:
            p_batch += tl.cast(_begin(t.ends, b % t.ends.num), tl.int64) * t.stride_n
    elif t.IS_PACKED:
        p_batch = tl.cast(_begin(t.ends, b), tl.int64) * t.stride_n
    else:
        p_batch = tl.cast(b, tl.int64) * t.stride_b
    p_head = t.p + (p_batch + tl.cast(h, tl.int64) * t.stride_h) * t.UNIT
    if t.IS_WIDE:
        p_tile = p_head + (i.to(tl.int64) * (t.stride_n * t.UNIT) + d.to(tl.int64) * t.stride_d)
    else:
        p_tile = p_head + (i * (t.stride_n * t.UNIT) + d * t.stride_d)
    return p_tile


@triton.jit
def load(
    t, b, h, i0, N, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr
):
    """Rows i0 .. i0 + NUM as a tile [NUM, BLOCK]; zero past WIDTH columns and, if CHECK, N rows.

    Zero where a slot is empty, too.
    """
    d = tl.arange(0, BLOCK)[None, :]
    i, inside = _which(t, b, h, i0 + tl.arange(0, NUM)[:, None], N)
    p_tile = place(t, b, h, i, d)
    if CHECK or t.HAS_SLOTS:
        if WIDTH == BLOCK:
            tile = tl.load(p_tile, mask=inside, other=0.0)
        else:
            tile = tl.load(p_tile, mask=inside & (d < WIDTH), other=0.0)
    else:
        if WIDTH == BLOCK:
            tile = tl.load(p_tile)
        else:
            tile = tl.load(p_tile, mask=d < WIDTH, other=0.0)
    return tile


@triton.jit
def store(t, b, h, i0, tile, N, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a float32 tile to rows i0 .. i0 + NUM, and return it as rounded."""
    d = tl.arange(0, BLOCK)[None, :]
    i, inside = _which(t, b, h, i0 + tl.arange(0, NUM)[:, None], N)
    tile = narrow(tile, t.p.dtype.element_ty)
    tl.store(place(t, b, h, i, d), tile, mask=inside & (d < WIDTH))
    return tile


@triton.jit
def load_scalars(t, b, h, i0, N, NUM: tl.constexpr):
    """One number a row [NUM] of a tensor [B, H, N]; zero past row N."""
    i, inside = _which(t, b, h, i0 + tl.arange(0, NUM), N)
    return tl.load(place(t, b, h, i, tl.zeros_like(i)), mask=inside, other=0.0)


@triton.jit
def store_scalars(t, b, h, i0, x, N, NUM: tl.constexpr):
    i, inside = _which(t, b, h, i0 + tl.arange(0, NUM), N)
    tl.store(place(t, b, h, i, tl.zeros_like(i)), x, mask=inside)
