"""Where the rows of a tensor [B, H, N, D] live, and tiles of them.

Kernels carry a tensor as ``Rows``, a pointer and its strides in elements, and ask for tiles of
consecutive rows of one head.  Places of heads are 64-bit, since a tensor may pass 2^31 elements;
places inside a head are 32-bit wherever that is enough, which saves a register an address.
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


def rows(t):
    """A tensor [B, H, N, D], or [B, H, N] of one number a row, or [N, D] of a single head."""
    b, h, n, d = {4: t.stride(), 3: (*t.stride(), 0), 2: (0, 0, *t.stride())}[t.dim()]
    # Triton sees where 16 divides a stride, and loads 16 bytes at a time; of 8 it must be told.
    unit = 8 if (b | h | n) % 16 == 8 else 1
    N = t.shape[-1 if t.dim() == 3 else -2] + 256  # tiles overhang by less
    is_wide = N * n + 256 * d >= 1 << 31
    return Rows(t, b // unit, h // unit, n // unit, d, tl.constexpr(unit), tl.constexpr(is_wide))


@triton.jit
def _place(t, b, h, i, d):
    """Addresses of rows i [NUM, 1] and columns d [1, BLOCK] of one head."""
    p_head = t.p + (tl.cast(b, tl.int64) * t.stride_b + tl.cast(h, tl.int64) * t.stride_h) * t.UNIT
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
    p_tile = _place(t, b, h, i, d)
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
    tl.store(_place(t, b, h, i, d), tile, mask=(i < N) & (d < WIDTH))
    return tile


@triton.jit
def load_scalars(t, b, h, i0, N, NUM: tl.constexpr):
    """One number a row [NUM] of a tensor [B, H, N]; zero past row N."""
    i = i0 + tl.arange(0, NUM)
    return tl.load(_place(t, b, h, i, tl.zeros_like(i)), mask=i < N, other=0.0)


@triton.jit
def store_scalars(t, b, h, i0, x, N, NUM: tl.constexpr):
    i = i0 + tl.arange(0, NUM)
    tl.store(_place(t, b, h, i, tl.zeros_like(i)), x, mask=i < N)
