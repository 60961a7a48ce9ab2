"""Where the rows of a tensor [B, H, N, D] live, and tiles of them.

Kernels carry a tensor as ``Rows``, a pointer and its strides in elements, and ask for tiles of
consecutive rows of one head.  Places of heads are 64-bit, since a tensor may pass 2^31 elements;
places inside a head are 32-bit wherever that is enough, which saves a register an address.

Sequences may also lie packed, end to end in the rows of a single batch: then b counts sequences, and
``length`` and ``tile`` read on the GPU where each begins and which of them a program works on.  Tiles
do not cross sequences.  Whatever the ends are, nothing outside the tensor is touched.
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
    ends: Any  # of packed sequences
    IS_PACKED: Any  # constexpr


class Ends(NamedTuple):
    """Sequence b is the rows p[b] to p[b + 1] of N; there are ``num`` of them."""

    p: Any
    num: Any
    N: Any


def rows(t, ends=None):
    """A tensor [B, H, N, D], or [B, H, N] of one number a row, or [N, D] of a single head.

    ``ends`` int32 [num + 1]: the tensor is [1, H, N, D] and holds packed sequences.
    """
    b, h, n, d = {4: t.stride(), 3: (*t.stride(), 0), 2: (0, 0, *t.stride())}[t.dim()]
    # Triton sees where 16 divides a stride, and loads 16 bytes at a time; of 8 it must be told.
    unit = 8 if (b | h | n) % 16 == 8 else 1
    N = t.shape[-1 if t.dim() == 3 else -2] + 256  # tiles overhang by less
    is_wide = N * n + 256 * d >= 1 << 31
    return Rows(
        t, b // unit, h // unit, n // unit, d, tl.constexpr(unit), tl.constexpr(is_wide),
        tl.constexpr(0) if ends is None else Ends(ends, ends.shape[0] - 1, t.shape[2]),
        tl.constexpr(ends is not None),
    )  # fmt: skip


def num_tiles(B, N, BLOCK, ends=None):
    """How many tiles of BLOCK rows hold the rows of a head: for packed sequences, of which the lengths are
    not known here, at most one more than whole tiles for each."""
    if ends is None:
        return B * triton.cdiv(N, BLOCK)
    return N // BLOCK + ends.shape[0] - 1


@triton.jit
def tile(t, H, N, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The batch, the head and the first row of this program; beyond the last row, it has no work.

    Packed sequence b has the slots from  begin(b) // BLOCK + b  on: as many as it needs, or one more.
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
        slot = tl.program_id(0) // H
        b = slot * 0
        past = t.ends.num + b
        while past - b > 1:  # begin slots of b and of past enclose the slot
            middle = (b + past) // 2
            if _begin(t, middle) // BLOCK + middle <= slot:
                b = middle
            else:
                past = middle
        at = slot - (_begin(t, b) // BLOCK + b)
        at = tl.where(at < 0, t.ends.N // BLOCK + 1, at)  # rows before the first sequence
    return b, h, at * BLOCK


@triton.jit
def _begin(t, b):
    return tl.minimum(tl.maximum(tl.load(t.ends.p + b), 0), t.ends.N)


@triton.jit
def length(t, b, N, has_work=True):
    """The rows of batch b: N, or those of a packed sequence, of which a program without work has none."""
    if t.IS_PACKED:
        N = tl.where(has_work, tl.maximum(_begin(t, b + 1) - _begin(t, b), 0), 0)
    return N


@triton.jit
def place(t, b, h, i, d):
    """Addresses of rows i [NUM, 1] and columns d [1, BLOCK] of one head."""
    if not t.IS_PACKED:
        p_batch = tl.cast(b, tl.int64) * t.stride_b
    else:
        p_batch = tl.cast(_begin(t, b), tl.int64) * t.stride_n
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
    """Rows i0 .. i0 + NUM as a tile [NUM, BLOCK]; zero past WIDTH columns and, if CHECK, N rows."""
    i = i0 + tl.arange(0, NUM)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    p_tile = place(t, b, h, i, d)
    if CHECK:
        if WIDTH == BLOCK:
            tile = tl.load(p_tile, mask=i < N, other=0.0)
        else:
            tile = tl.load(p_tile, mask=(i < N) & (d < WIDTH), other=0.0)
    else:
        if WIDTH == BLOCK:
            tile = tl.load(p_tile)
        else:
            tile = tl.load(p_tile, mask=d < WIDTH, other=0.0)
    return tile


@triton.jit
def store(t, b, h, i0, tile, N, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a float32 tile to rows i0 .. i0 + NUM, and return it as rounded."""
    i = i0 + tl.arange(0, NUM)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    tile = narrow(tile, t.p.dtype.element_ty)
    tl.store(place(t, b, h, i, d), tile, mask=(i < N) & (d < WIDTH))
    return tile


@triton.jit
def load_scalars(t, b, h, i0, N, NUM: tl.constexpr):
    """One number a row [NUM] of a tensor [B, H, N]; zero past row N."""
    i = i0 + tl.arange(0, NUM)
    return tl.load(place(t, b, h, i, tl.zeros_like(i)), mask=i < N, other=0.0)


@triton.jit
def store_scalars(t, b, h, i0, x, N, NUM: tl.constexpr):
    i = i0 + tl.arange(0, NUM)
    tl.store(place(t, b, h, i, tl.zeros_like(i)), x, mask=i < N)
