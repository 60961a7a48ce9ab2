"""add_norm, forward and backward, Triton for NVIDIA and AMD                      maths: README.md

s = x + bias + residual,   y = (s - mean) * rstd * weight + beta,   over each row of D
dx = rstd * (g - average - t c) + ds,   g = dy * weight,   c = rstd^2 sum(g h) / n

             D ->                      fwd: a program owns BM rows and reads them once; they stay
   rows  +------------+                in registers from the sum to y.
    |    | BM x BD    | <- program 0   bwd: a program owns a part, consecutive rows, and walks it BM
    v    +------------+                at a time, dx on the way.  Sums over its rows (dbias,
         | BM x BD    | <- program 1   dweight, dbeta) stay in registers and are written once.
         +------------+                sum: a program adds 32 columns of all parts, in order: no
           | | | | |                   atomics, the same bits every time.
         dbias, dweight, dbeta [D]

BD is the power of two that holds D.  Registers of a thread, and spills in bytes (NVIDIA) or
registers (AMD), of bfloat16: layer with everything (768), rms with residual and weight (4096), rms
with weight (16384).              from: Triton 3.7.1, compared by tests/test_compile_targets.py

    kernel     D    BM/warps   sm_90      gfx942
                               reg  spl   reg  spl
    fwd      768    2/4         48    0    36    0
    fwd     4096    1/8         40    0    30    0
    fwd    16384    1/16        86    0    56    0
    bwd      768    2/4        128    0    84    0
    bwd     4096    1/8         80    0    68    0
    bwd    16384    1/16       128    0   102    0
    sum      768    32/4        32    0    20    0
    sum     4096    32/4        32    0    16    0
    sum    16384    32/4        32    0    16    0

Layer with bias, weight and beta at D = 16384 does not fit: its backward pass spills.

Measured: not yet run on a GPU; results are checked in Triton's interpreter, code by reading it.
Not done: rows in pieces, for D past 2^16.  Assumes contiguous float32 parameters (api.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_rows as rows

LAYER, RMS, CRMS = (tl.constexpr(kind) for kind in range(3))
MAX_PARTS = 512  # parts of which sums over rows are made: enough to fill a GPU, few beside the rows


class Tile(NamedTuple):
    """BM rows of BD columns a step."""

    BM: int
    BD: int
    num_warps: int


def tile(D):
    BD = launch.block(D)
    return Tile(max(1, 2048 // BD), BD, 4 if BD <= 2048 else 8 if BD <= 8192 else 16)


# ---- Forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("N",))
def norm_fwd(
    y, s, mean, rstd, x, residual, bias, weight, beta, eps, N,
    KIND: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0) * BM
    d = tl.arange(0, BD)
    # Add, in float32, and round once.
    h = rows.load(x, 0, 0, i0, N, BM, D, BD, True).to(tl.float32)  # [BM, BD]
    if bias is not None:
        h += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
    if residual is not None:
        h += rows.load(residual, 0, 0, i0, N, BM, D, BD, True).to(tl.float32)
    if s is not None:
        h = rows.store(s, 0, 0, i0, h, N, BM, D, BD).to(tl.float32)

    # Statistics; columns past D are zero.
    if KIND == LAYER:
        mean_tile = tl.sum(h, 1) / D  # [BM]
        h = tl.where(d[None, :] < D, h - mean_tile[:, None], 0.0)
    else:
        mean_tile = tl.zeros([BM], tl.float32)
    square = tl.sum(h * h, 1)  # [BM]
    if KIND == CRMS:
        last = tl.sum(h, 1)
        square += last * last
    rstd_tile = tl.rsqrt(square / (D + 1 if KIND == CRMS else D) + eps)  # [BM]

    # Scale, shift and write.
    h *= rstd_tile[:, None]
    if weight is not None:
        h *= tl.load(weight + d, mask=d < D, other=0.0)[None, :]
    if beta is not None:
        h += tl.load(beta + d, mask=d < D, other=0.0)[None, :]
    rows.store(y, 0, 0, i0, h, N, BM, D, BD)
    i = i0 + tl.arange(0, BM)
    tl.store(mean + i, mean_tile, mask=i < N)
    tl.store(rstd + i, rstd_tile, mask=i < N)


# ---- Backward: dx, and sums over rows by parts; then the sums of the parts ----------------------


@triton.jit(do_not_specialize=("N", "num_steps"))
def norm_bwd(
    dx, parts, dy, ds, s, weight, mean, rstd, N, num_steps,
    KIND: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    dbias = tl.zeros([BM, BD], tl.float32)
    dweight = tl.zeros([BM, BD], tl.float32)
    dbeta = tl.zeros([BM, BD], tl.float32)
    for step in tl.range(0, num_steps):
        i0 = (tl.program_id(0) * num_steps + step) * BM
        i = i0 + tl.arange(0, BM)
        # Rows past N have rstd = 0 and dy = 0: they add nothing.
        h = rows.load(s, 0, 0, i0, N, BM, D, BD, True).to(tl.float32)  # [BM, BD]
        if KIND == LAYER:
            h -= tl.load(mean + i, mask=i < N, other=0.0)[:, None]
        rstd_tile = tl.load(rstd + i, mask=i < N, other=0.0)[:, None]  # [BM, 1]
        g = rows.load(dy, 0, 0, i0, N, BM, D, BD, True).to(tl.float32)  # [BM, BD]
        if HAS_BETA:
            dbeta += g
        if HAS_WEIGHT:
            dweight += g * (h * rstd_tile)
            g *= tl.load(weight + d, mask=d < D, other=0.0)[None, :]

        # Take out of g what the statistics absorb.
        along = (
            tl.sum(g * h, 1)[:, None] * (rstd_tile * rstd_tile) / (D + 1 if KIND == CRMS else D)
        )  # [BM, 1]
        if KIND == LAYER:
            g -= tl.sum(g, 1)[:, None] / D
        if KIND == CRMS:
            h += tl.sum(h, 1)[:, None]
        g = (g - h * along) * rstd_tile
        if ds is not None:
            g += rows.load(ds, 0, 0, i0, N, BM, D, BD, True).to(tl.float32)
        rows.store(dx, 0, 0, i0, g, N, BM, D, BD)
        if HAS_BIAS:
            dbias += tl.where((i < N)[:, None], g, 0.0)

    # One row of each sum a part [3, parts, D].
    p_part = parts + tl.program_id(0) * D + d
    step_sum = tl.num_programs(0) * D
    if HAS_BIAS:
        tl.store(p_part, tl.sum(dbias, 0), mask=d < D)
    if HAS_WEIGHT:
        tl.store(p_part + step_sum, tl.sum(dweight, 0), mask=d < D)
    if HAS_BETA:
        tl.store(p_part + 2 * step_sum, tl.sum(dbeta, 0), mask=d < D)


@triton.jit(do_not_specialize=("num_parts",))
def norm_sum(
    dbias, dweight, dbeta, parts, num_parts, D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """Sum the parts, always in the same order."""
    if dbias is not None:
        _sum(dbias, parts, num_parts, D, BP, BC)
    if dweight is not None:
        _sum(dweight, parts + num_parts * D, num_parts, D, BP, BC)
    if dbeta is not None:
        _sum(dbeta, parts + 2 * num_parts * D, num_parts, D, BP, BC)


@triton.jit
def _sum(total, parts, num_parts, D: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    d = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros([BP, BC], tl.float32)
    for first in tl.range(0, num_parts, BP):
        n = first + tl.arange(0, BP)[:, None]
        acc += tl.load(
            parts + n * D + d[None, :], mask=(n < num_parts) & (d[None, :] < D), other=0.0
        )
    tl.store(total + d, tl.sum(acc, 0), mask=d < D)


# ---- Launch -------------------------------------------------------------------------------------


def forward(y, s, mean, rstd, x, residual, bias, weight, beta, eps, kind):
    N, D = x.shape
    t = tile(D)
    if N:
        with launch.on(x):
            norm_fwd[(triton.cdiv(N, t.BM),)](
                rows.rows(y), rows.rows(s) if s.numel() else None, mean, rstd, rows.rows(x),
                None if residual is None else rows.rows(residual), bias, weight, beta, eps, N,
                kind, D, **t._asdict(), enable_fp_fusion=True,
            )  # fmt: skip


def backward(dx, dbias, dweight, dbeta, dy, ds, s, bias, weight, beta, mean, rstd, eps, kind):
    N, D = s.shape
    t = tile(D)
    given = [parameter is not None for parameter in (bias, weight, beta)]
    # The size of a part depends on the shape alone: sums are in the same order on every machine.
    num_steps = max(1, triton.cdiv(N, t.BM * MAX_PARTS)) if any(given) else 1
    num_parts = triton.cdiv(N, t.BM * num_steps)
    parts = torch.empty(
        (3, num_parts, D) if any(given) else 1, dtype=torch.float32, device=s.device
    )
    with launch.on(s):
        if N:
            norm_bwd[(num_parts,)](
                rows.rows(dx), parts, rows.rows(dy), None if ds is None else rows.rows(ds),
                rows.rows(s), weight, mean, rstd, N, num_steps, kind, D, **t._asdict(),
                HAS_BIAS=given[0], HAS_WEIGHT=given[1], HAS_BETA=given[2], enable_fp_fusion=True,
            )  # fmt: skip
        if D and any(given):
            sums = [
                total if wanted else None for total, wanted in zip((dbias, dweight, dbeta), given)
            ]
            norm_sum[(triton.cdiv(D, 32),)](
                *sums, parts, num_parts, D, 32, 32, num_warps=4, enable_fp_fusion=True
            )
