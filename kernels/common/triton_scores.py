"""What happens to a logit between q . k and the softmax, and its derivative.

A kernel forms the raw product s = q . k and asks

    logits(score, s, i, j)          what is done to each product: the logit is  factor * logits;  plain scaling
                                    does nothing here, so that it melts into the softmax's subtraction
    factor(score)                   a number
    logits_grad(score, ds, s, i, j) the derivative: from the gradient at scale * logits back to the products
    orient(score, q)                q with the sign that makes the factor >= 0, for maxima before scaling
    scale(score)                    what dq and dk are multiplied by in the end

A soft-cap or a bias adds a NamedTuple, a constexpr field that tells the scores apart, and a branch in these
functions.  Kernels do not change.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common.triton_dtypes import narrow


class Scale(NamedTuple):
    """s_ij = scale * q_i . k_j"""

    scale: Any
    is_negative: Any  # constexpr, since orienting q costs registers in which it must be held


def encode(scale):
    return Scale(scale, tl.constexpr(scale < 0))


@triton.jit
def factor(score):
    return score.scale


@triton.jit
def scale(score):
    return score.scale


@triton.jit
def orient(score, q):
    return narrow(-q.to(tl.float32), q.dtype) if score.is_negative else q


@triton.jit
def logits(score, s, i, j):
    return s


@triton.jit
def logits_grad(score, ds, s, i, j):
    return ds
