"""The online softmax.  What happens to a row that sees nothing is decided here, once.

A row holds  m, the largest logit so far (-inf: none yet),  l = sum of exp(x - m),  and the sum of
weighted values.  A row that sees nothing ends with l = 0 and m = -inf: o = 0, lse = -inf, and
weights of zero in the backward pass.

Beside 16-bit tensors (NARROW) logits are in base 2, which saves a multiplication an element.
Beside float32 they stay natural: the backward pass forms its weights from lse, and rounding that
to base 2 and back would double its error.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Known(NamedTuple):
    """What the backward pass knows of a row: lse as high + low, delta = do . o, and the gradient of lse.

    ``high`` is in the units of logits, and +inf if nothing is seen.  Only beside float32 are ``low`` and ``dlse``
    read; elsewhere ``delta`` is  do . o - dlse.
    """

    high: Any
    low: Any
    delta: Any
    dlse: Any


@triton.jit
def unit(NARROW: tl.constexpr):
    """What a natural logit is multiplied by."""
    return LOG2E if NARROW else 1.0


@triton.jit
def _exp(x, NARROW: tl.constexpr):
    return tl.exp2(x) if NARROW else tl.exp(x)


@triton.jit
def absorb(x, factor, m, l, NARROW: tl.constexpr, MAY_HIDE: tl.constexpr):
    """Take in logits factor * x [BM, BN], factor >= 0.

    Returns weights p [BM, BN], what earlier sums are multiplied by [BM], and the new m and l [BM].
    """
    m_new = tl.maximum(m, tl.max(x, 1) * factor)  # [BM]
    origin = m_new
    if MAY_HIDE:  # all of the row may be masked so far; subtract a finite number then
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = _exp(x * factor - origin[:, None], NARROW)  # [BM, BN]
    rescale = _exp(m - origin, NARROW)  # [BM]
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def join(acc, m, l, acc_part, m_part, l_part, NARROW: tl.constexpr):
    """Two states over disjoint keys as one: acc [BM, BDV], m and l [BM]."""
    m_new = tl.maximum(m, m_part)  # [BM]
    origin = tl.where(m_new == float("-inf"), 0.0, m_new)
    rescale = _exp(m - origin, NARROW)
    rescale_part = _exp(m_part - origin, NARROW)
    acc = acc * rescale[:, None] + acc_part * rescale_part[:, None]  # [BM, BDV]
    return acc, m_new, l * rescale + l_part * rescale_part


@triton.jit
def finish(acc, m, l, NARROW: tl.constexpr):
    """The output [BM, BDV], the natural log of the softmax denominator [BM], and what rounding took from it."""
    l = tl.where(l == 0.0, 1.0, l)
    lse = (m + tl.log2(l)) * LN2 if NARROW else m + tl.log(l)
    rest = tl.zeros_like(lse)
    if not NARROW:  # of a sum of two numbers, whichever is larger
        part = lse - m
        rest = (m - (lse - part)) + (tl.log(l) - part)
        rest = tl.where(tl.abs(lse) < float("inf"), rest, 0.0)
    return acc / l[:, None], lse, rest


@triton.jit
def settle(m, l, NARROW: tl.constexpr):
    """m and l of the whole row such that exp(x - m) is its softmax: l is 1."""
    total = tl.where(l == 0.0, 1.0, l)
    return m + (tl.log2(total) if NARROW else tl.log(total)), tl.where(l == 0.0, 0.0, 1.0)


@triton.jit
def settled(x, factor, m, NARROW: tl.constexpr):
    """The softmax p [BM, BN] of the logits factor * x, by the m that ``settle`` gives."""
    return _exp(x * factor - tl.where(m == float("-inf"), float("inf"), m)[:, None], NARROW)


@triton.jit
def shift(lse, NARROW: tl.constexpr):
    return tl.where(lse == float("-inf"), float("inf"), lse * unit(NARROW))


@triton.jit
def weights(x, factor, known, NARROW: tl.constexpr):
    """p = exp(logit - lse) from the logits factor * x."""
    p = _exp(x * factor - known.high, NARROW)
    return p if NARROW else p - p * known.low


@triton.jit
def grad(p, dp, known, NARROW: tl.constexpr):
    """ds = p (dp - delta + dlse), which is small where a row sees few keys: dlse comes last."""
    return p * (dp - known.delta) if NARROW else p * ((dp - known.delta) + known.dlse)


@triton.jit
def expand(known, axis: tl.constexpr):
    return Known(
        tl.expand_dims(known.high, axis), tl.expand_dims(known.low, axis),
        tl.expand_dims(known.delta, axis), tl.expand_dims(known.dlse, axis),
    )  # fmt: skip
