"""Where the rows of a tensor [B, H, N, D] live, and tiles of them.

Kernels carry a tensor as ``Rows``: a pointer and its strides, in elements.  They ask for a head, then for tiles of
consecutive rows.  Offsets of rows are 64-bit: a tensor may pass 2^31 elements, and any stride is allowed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common.triton_dtypes import narrow


class Rows(NamedTuple):
    """Row i of head h of batch b begins at  p + b stride_b + h stride_h + i stride_n."""

    p: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any
    stride_d: Any


def rows(t):
    """A tensor [B, H, N, D], or [B, H, N] of one number a row."""
    return Rows(t, *t.stride()) if t.dim() == 4 else Rows(t, *t.stride(), 0)


@triton.jit
def head(t, b, h):
    p = t.p + tl.cast(b, tl.int64) * t.stride_b + tl.cast(h, tl.int64) * t.stride_h
    return Rows(p, t.stride_b, t.stride_h, t.stride_n, t.stride_d)


@triton.jit
def _place(t, i0, N, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses [NUM, BLOCK], and which rows [NUM, 1] and columns [1, BLOCK] exist."""
    i = tl.arange(0, NUM)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    # The tile's offsets do not depend on i0: loops keep them and move one scalar.
    p_tile = t.p + tl.cast(i0, tl.int64) * t.stride_n + (i.to(tl.int64) * t.stride_n + d.to(tl.int64) * t.stride_d)
    return p_tile, i0 + i < N, d < WIDTH


@triton.jit
def load(t, i0, N, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Rows i0 .. i0 + NUM as a tile [NUM, BLOCK], zero past column WIDTH and, if CHECK, past row N."""
    p_tile, m_row, m_column = _place(t, i0, N, NUM, WIDTH, BLOCK)
    if CHECK:
        if WIDTH == BLOCK:
            tile = tl.load(p_tile, mask=m_row, other=0.0)
        else:
            tile = tl.load(p_tile, mask=m_row & m_column, other=0.0)
    else:
        if WIDTH == BLOCK:
            tile = tl.load(p_tile)
        else:
            tile = tl.load(p_tile, mask=m_column, other=0.0)
    return tile


@triton.jit
def store(t, i0, tile, N, NUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    p_tile, m_row, m_column = _place(t, i0, N, NUM, WIDTH, BLOCK)
    tl.store(p_tile, narrow(tile, t.p.dtype.element_ty), mask=m_row & m_column)


@triton.jit
def load_scalars(t, i0, N, NUM: tl.constexpr):
    """One number a row [NUM] of a tensor [B, H, N]; zero past row N."""
    i = i0 + tl.arange(0, NUM)
    return tl.load(t.p + i.to(tl.int64) * t.stride_n, mask=i < N, other=0.0)


@triton.jit
def store_scalars(t, i0, x, N, NUM: tl.constexpr):
    i = i0 + tl.arange(0, NUM)
    tl.store(t.p + i.to(tl.int64) * t.stride_n, x, mask=i < N)
