"""attention, gradients of biases, weight and sinks, Triton                      maths: README.md

dbias_ij = sum of ds_ij before softcap,  dweight_ij = sum of dw_ij keep_ij clip(p_ij),  over the (b, h) that
share the pair's number;  dsinks_h = - sum_i exp(sinks_h - lse_i) delta_i

           Nk ->                    A program adds up tiles [BM, BN] of ds, made again from q, k, v, do, in
      +----+----+----+              registers, over the (b, h) that share a number and over the tiles that do,
 Nq   | ds |    |    |              and reduces the sum once, at the end:
  |   +----+----+----+                values   [Nq, Nk]  one tile; it is the result
  v   |    | ds |    |                keys     [1, Nk]   a column of tiles, summed over i
      +----+----+----+                queries  [Nq, 1]   a row of tiles, summed over j
                                      one      [1, 1]    all tiles
                                      offset   a diagonal of tiles, on which (i, j) of every tile has the same
                                               j - i; two neighbours overlap: even and odd ones apart
                                      index    a row of tiles, each sorted into the table's entries

Costs two products a pair and gradient, once more what dq needs.  Where few programs would run, the (b, h) are
split among more, by a rule that looks at shapes alone, and the parts (as many floats as the tensor has, or for
tables one row a part) are added by torch.sum: every sum has one order, no atomics.  Nothing of [B, Hq, Nq, Nk]
is stored unless the tensor itself is.

Resources: triton.py.  Measured: not yet run on a GPU.
Not done: one pass for several gradients; reuse of the ds of dq where nothing is shared.
Assumes what triton.py does.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention.triton_call import (
    how,
    load_known,
    products,
    rows_of,
    tile_of_keys,
)
from fastattn.kernels.attention.triton_tiles import choose
from fastattn.kernels.common import triton_masks as masks
from fastattn.kernels.common import triton_pairs as pairs
from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common import triton_terms as terms
from fastattn.kernels.common import triton_weights as weights
from fastattn.kernels.common.triton_dtypes import INTERPRETED
from fastattn.kernels.common.triton_pairs import Place

PROGRAMS = 512  # as many as keep a GPU busy
MOST_BINS = 4096  # entries of a table in the registers of a program


class Share(NamedTuple):
    """How the sums of a gradient are shared out.

    A row of the gradient is one batch and head of it, or all batches, or all heads; it sums over num_b
    batches and num_h heads of the call, ``chunk`` of the num_b num_h in each part.  Where it has fewer batches
    than the call, they are taken in turn, as those of groups are.
    """

    num_own: int  # programs of one row and part, each with its own tiles
    num_rows: int
    row_heads: int  # row r is that of batch r // row_heads and head r % row_heads
    num_b: int
    num_h: int
    chunk: int


@triton.jit(do_not_specialize=("group", "Nq", "Nk", "tiles_i", "tiles_j"))
def attention_dterm(
    out, table, q, k, v, do, known, how, share, group, Nq, Nk, tiles_i, tiles_j,
    FORM: tl.constexpr, IS_WEIGHT: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    # Find the row of the gradient, the part, and the first tile.
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    own = tl.program_id(0) % share.num_own
    row = tl.program_id(0) // share.num_own % share.num_rows
    part = tl.program_id(0) // share.num_own // share.num_rows
    b, h = row // share.row_heads, row % share.row_heads
    num_b = share.num_rows // share.row_heads
    place = Place(part * num_b + b, h, Nq, Nk)  # of the sum among the parts
    if FORM == "values":
        ti, tj = own // tiles_j, own % tiles_j
    elif FORM == "offset":
        away = own - (tiles_i - 1)  # tiles from the diagonal
        ti, tj = tl.maximum(-away, 0), tl.maximum(away, 0)
    elif FORM == "keys":
        ti, tj = own * 0, own
    elif FORM == "index":
        ti, tj = own % tiles_i, own * 0
    else:
        ti, tj = own, own * 0
    i = ti * BM + tl.arange(0, BM)[:, None]
    j = tj * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    none = tl.zeros([1, 1], tl.int32)

    # Add up, reduce and write.
    if FORM == "index":
        first = own // tiles_i * NUM_BINS
        bins = tl.zeros([1, NUM_BINS], tl.float32)
        for t in tl.range(0, tiles_j):
            total = _sum(
                acc, q, k, v, do, known, how, share, b, h, part, group, Nq, Nk, ti, t,
                FORM, IS_WEIGHT,
            )  # fmt: skip
            at_j = t * BN + j
            at = pairs.load(table.index, place, i, at_j)
            at = tl.minimum(tl.maximum(at, 0), table.last)
            inside = (i < table.index.num_i) & (at_j < table.index.num_j)
            least = tl.min(tl.min(tl.where(inside, at, first + NUM_BINS), 1), 0)
            at = tl.where(inside, at, -1)
            most = tl.max(tl.max(at, 1), 0)
            begin, end = tl.maximum(least, first), tl.minimum(most + 1, first + NUM_BINS)
            bins = _sort(bins, total, at, first, begin, end, NUM_BINS)
        pairs.store(out, place, none + ti, first + tl.arange(0, NUM_BINS)[None, :], bins)
    else:
        total = _sum(
            acc, q, k, v, do, known, how, share, b, h, part, group, Nq, Nk, ti, tj,
            FORM, IS_WEIGHT,
        )  # fmt: skip
        if FORM == "values":
            pairs.store(out, place, i, j, total)
        elif FORM == "keys":
            pairs.store(out, place, none, j, tl.sum(total, 0)[None, :])
        elif FORM == "queries":
            pairs.store(out, place, i, none, tl.sum(total, 1)[:, None])
        elif FORM == "one":
            pairs.store(out, place, none, none, tl.sum(tl.sum(total, 1), 0) + none)
        else:
            # Packed sequences differ in length; then a part is one sequence and head.
            b += part * share.chunk // share.num_h
            shift = rows.length(k, b, Nk) - rows.length(q, b, Nq)
            bins = tl.zeros([1, 2 * BN], tl.float32)
            bins = _sort(bins, total, j - i - away * BN, 1 - BN, 1 - BN, BN, 2 * BN)
            t = (away - 1) * BN + 1 + tl.arange(0, 2 * BN)[None, :] - shift + out.num_j // 2
            t = tl.where(t >= 0, t, out.num_j)  # past the end: not written
            pairs.store(out, place, none + (own & 1), t, bins)


@triton.jit
def _sum(
    acc, q, k, v, do, known, how, share, b, h, part, group, Nq, Nk, ti, tj,
    FORM: tl.constexpr, IS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The tiles that a program owns, of its part of the (b, h), in a fixed order."""
    BM: tl.constexpr = how.size.BM
    BN: tl.constexpr = how.size.BN
    last = tl.minimum((part + 1) * share.chunk, share.num_b * share.num_h)
    for pair in tl.range(part * share.chunk, last):
        at_b = b + pair // share.num_h * (share.num_rows // share.row_heads)
        at_h = h + pair % share.num_h
        here = Place(at_b, at_h, rows.length(q, at_b, Nq), rows.length(k, at_b, Nk))
        num_i, num_j = tl.cdiv(here.Nq, BM), tl.cdiv(here.Nk, BN)
        begin, end = ti * 0, tl.minimum(num_i - ti, num_j - tj)
        if FORM == "values" or FORM == "index":
            end = tl.minimum(end, 1)
        elif FORM == "keys":
            past = tl.minimum(tj * BN + BN, here.Nk)
            some = masks.queries(how.mask, tj * BN, past, here.Nq, here.Nk)
            begin, end = some[0] // BM, tl.where(tj < num_j, tl.cdiv(some[1], BM), 0)
        elif FORM == "queries":
            past = tl.minimum(ti * BM + BM, here.Nq)
            some = masks.keys(how.mask, ti * BM, past, here.Nq, here.Nk)
            begin, end = some[0] // BN, tl.where(ti < num_i, tl.cdiv(some[1], BN), 0)
        elif FORM == "one":
            end = num_i * num_j
        for t in tl.range(begin, end):
            if FORM == "keys":
                at_i, at_j = t, tj
            elif FORM == "queries":
                at_i, at_j = ti, t
            elif FORM == "one":
                at_i, at_j = t // num_j, t % num_j
            else:
                at_i, at_j = ti + t, tj + t
            if tile_of_keys(how, here, at_i * BM, at_j * BN) != masks.NONE:
                acc = _add(
                    acc, q, k, v, do, known, how, here, group, at_i * BM, at_j * BN, IS_WEIGHT
                )
    return acc


@triton.jit
def _add(acc, q, k, v, do, known, how, place, group, i0, j0, IS_WEIGHT: tl.constexpr):
    """Add the gradient of the tile at (i0, j0), made again."""
    BM: tl.constexpr = how.size.BM
    b, h, Nq = place.b, place.h, place.Nq
    i = i0 + tl.arange(0, BM)[:, None]
    j = j0 + tl.arange(0, how.size.BN)[None, :]
    q_tile = rows.load(q, b, h, i0, Nq, BM, how.size.D, how.size.BD, True)  # [BM, BD]
    do_tile = rows.load(do, b, h, i0, Nq, BM, how.size.DV, how.size.BDV, True)  # [BM, BDV]
    NARROW: tl.constexpr = q_tile.dtype != tl.float32
    row = load_known(known, b, h, i0, Nq, BM, NARROW, True)
    hk = rows.key_head(how, h, group)
    k_tile, s, p, dw = products(q_tile, do_tile, row, k, v, place, hk, i0, j0, how, True)
    if IS_WEIGHT:
        grad = weights.weight_grad(how.weigh, p, dw, place, i, j)
    else:
        dp = weights.grad(how.weigh, p, dw, weights.factors(how.weigh, place, i, j))
        grad = softmax.grad(p, dp, softmax.expand(row, 1), NARROW)
    return acc + tl.where(i < Nq, grad, 0.0)


@triton.jit
def _sort(bins, x, t_tile, first, begin, end, NUM_BINS: tl.constexpr):
    """Add each number of the tile x to the bin t that t_tile names, of [begin, end); bins begin at ``first``.

    One after another: few where a table is of distances, and then the same in most of a tile.
    """
    bin = first + tl.arange(0, NUM_BINS)[None, :]
    for t in tl.range(begin, end):
        entry = tl.sum(tl.sum(tl.where(t_tile == t, x, 0.0), 1), 0)
        bins = tl.where(bin == t, bins + entry, bins)
    return bins


# ---- Launch -------------------------------------------------------------------------------------


def run(grad, is_weight, values, index, c, do, known):
    """Write the gradient of a bias or weight: of its values, or of its table if there are an index or two axes."""
    Hq, Hk, num = c.q.shape[1], c.k.shape[1], c.num
    Nq, Nk = c.lengths
    is_packed = c.cu_q is not None
    if not (num * Hq * Nq * Nk * Hk and grad.numel()):
        grad.zero_()
        return
    tile = choose("dterm", c.q, max(c.q.shape[3], c.v.shape[3]))
    BLOCK = tile.BM

    # What a program owns, and where it writes: [batches, heads, rows, columns], parts among batches.
    is_table = values.dim() == 2
    last = values.shape[-1] - 1
    if not is_table:
        rows_b, rows_h, num_i, num_j = values.shape
        form = {(True, True): "values", (False, True): "keys", (True, False): "queries"}.get(
            (num_i > 1, num_j > 1), "one"
        )
        tiles = triton.cdiv(num_i, BLOCK), triton.cdiv(num_j, BLOCK)
        num_own = tiles[0] * tiles[1]
        shape = (num_i, num_j)
    elif index is None:
        form, rows_b, rows_h = "offset", 1, values.shape[0]
        # Lengths of packed sequences are not known here, but the table holds their offsets.
        lengths = (last // 2 + 1,) * 2 if is_packed else (Nq, Nk)
        tiles = tuple(triton.cdiv(N, BLOCK) for N in lengths)
        num_own = sum(tiles) - 1
        shape = (2, last + 1)
    else:
        form, rows_b, rows_h = "index", 1, values.shape[0]
        tiles = tuple(triton.cdiv(N, BLOCK) for N in index.shape)
        bins = min(triton.next_power_of_2(last + 1), MOST_BINS)
        num_own = tiles[0] * triton.cdiv(last + 1, bins)
        shape = (tiles[0], last + 1)
    sharing = num // rows_b * (Hq // rows_h)
    parts = triton.cdiv(4 if INTERPRETED.value else PROGRAMS, num_own * rows_b * rows_h)
    chunk = 1 if form == "offset" and is_packed else triton.cdiv(sharing, min(parts, sharing))
    parts = triton.cdiv(sharing, chunk)
    share = Share(num_own, rows_b * rows_h, rows_h, num // rows_b, Hq // rows_h, chunk)

    # A single part of values is the result; else parts are added.
    is_direct = parts == 1 and not is_table
    make = torch.zeros if form == "offset" else torch.empty
    out = grad if is_direct else make(
        (parts * rows_b, rows_h, *shape), dtype=torch.float32, device=grad.device
    )  # fmt: skip
    attention_dterm[(num_own * rows_b * rows_h * parts,)](
        pairs.pairs(out), terms.encode(values, index) if form == "index" else None,
        *(rows_of(c, t, "qkk"[n]) for n, t in enumerate((c.q, c.k, c.v))),
        rows_of(c, do, "Q" if c.by_slot else "q"), rows_of(c, known, "Q"),
        how(c, BLOCK, BLOCK), share, Hq // Hk, Nq, Nk, *tiles,
        form, is_weight, bins if form == "index" else 1,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=not c.topk,
    )  # fmt: skip
    if is_table:
        grad.copy_(out.sum((0, 2)).view(grad.shape))
    elif not is_direct:
        grad.copy_(out.view(parts, *grad.shape).sum(0))


def sinks(grad, given, lse, known):
    """The sink's share of each denominator times dlse - delta: its dp is 0."""
    delta = known[..., 1] - known[..., 3] if known.shape[-1] == 4 else known[..., 1]
    p = torch.exp(given.float()[:, None] - lse.float()).masked_fill(lse == float("-inf"), 0.0)
    grad.copy_(-(p * delta).sum((0, 2)))
