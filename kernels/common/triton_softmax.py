"""The online softmax, in base 2.  What happens to a row that sees nothing is decided here, once.

A row holds  m, the largest logit so far (-inf: none yet),  l = sum of 2^(x - m)  and the sum of weighted values.
Such a row ends with l = 0 and m = -inf:  o = 0,  lse = -inf,  and weights of zero in the backward pass.
"""

import triton
import triton.language as tl

from fastattn.kernels.common.triton_scores import LN2, LOG2E


@triton.jit
def absorb(x, unit, m, l, PARTIAL: tl.constexpr):
    """Take in logits unit * x [BM, BN], unit >= 0: weights p, rescaling of what was summed, and new m, l."""
    m_new = tl.maximum(m, tl.max(x, 1) * unit)  # [BM]
    origin = m_new
    if PARTIAL:  # all of the row may be masked so far; subtract a finite number then
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(x * unit - origin[:, None])  # [BM, BN]
    rescale = tl.exp2(m - origin)  # [BM]
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def finish(acc, m, l):
    """The output [BM, BDV] and the natural log of the softmax denominator [BM]."""
    l = tl.where(l == 0.0, 1.0, l)
    return acc / l[:, None], m * LN2 + tl.log(l)


@triton.jit
def weights(x, scale, lse, PRECISE: tl.constexpr):
    """p = exp(scale * x - lse), from the logits and their rows' lse; 0 in a row that sees nothing."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if PRECISE:  # float32: round nothing between lse and the subtraction, one multiplication more
        p = tl.exp(x * scale - lse)
    else:
        p = tl.exp2(x * (scale * LOG2E) - lse * LOG2E)
    return p
