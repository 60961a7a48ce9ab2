"""Philox 4x32 with ten rounds: which weights dropout keeps, as fastattn/dropout.py defines it.

A word is a pure function of the seed and of where the weight stands: key = seed, counter =
(j // 4, i, head, batch), and word j % 4 belongs to key j.  A tile is made a quarter as wide, four words
at a time, and interleaved as truth values, which are a quarter as many bytes to move between threads.
"""

import triton
import triton.language as tl


@triton.jit
def philox(key0, key1, x0, x1, x2, x3):
    """Four words of a tile of counters, all uint32."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(x0, tl.full(x0.shape, 0xD2511F53, tl.uint32)), x0 * 0xD2511F53
        high1, low1 = tl.umulhi(x2, tl.full(x2.shape, 0xCD9E8D57, tl.uint32)), x2 * 0xCD9E8D57
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def keep(p_seed, threshold, place, i, j):
    """True where the pair's word reaches the threshold; i and j are runs of consecutive numbers, one of them
    a column and the other a row, and j begins at a multiple of 4."""
    if i.shape[1] == 1:
        kept = _keep(p_seed, threshold, place, i, j)
    else:
        kept = tl.trans(_keep(p_seed, threshold, place, tl.trans(i), tl.trans(j)))
    return kept


@triton.jit
def _keep(p_seed, threshold, place, i, j):
    """i is a column [M, 1] and j a row [1, N]."""
    M: tl.constexpr = i.shape[0]
    N: tl.constexpr = j.shape[1]
    seed = tl.load(p_seed)
    quad = tl.min(j, 1)[:, None] // 4 + tl.arange(0, N // 4)[None, :]
    zeros = tl.zeros([M, N // 4], tl.uint32)
    x0, x1, x2, x3 = philox(
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
        zeros + quad.to(tl.uint32), zeros + i.to(tl.uint32),
        zeros + tl.cast(place.h, tl.uint32), zeros + tl.cast(place.b, tl.uint32),
    )  # fmt: skip
    least = tl.cast(threshold, tl.uint32)
    even = tl.interleave((x0 >= least).to(tl.int8), (x2 >= least).to(tl.int8))
    odd = tl.interleave((x1 >= least).to(tl.int8), (x3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0
