"""What happens to a logit between q . k and the softmax, and its derivative.

A kernel forms the raw product s = q . k and asks

    unit(score)                     a number: logits in base 2 are  unit * logits(score, s, i, j)
    logits(score, s, i, j)          anything done to each product; plain scaling does nothing here, so
                                    that its multiplication melts into the softmax's subtraction
    logits_grad(score, ds, s, i, j) the derivative: from the gradient at scale * logits back to the products
    orient(score, q)                q with the sign that makes the unit >= 0, for maxima before scaling
    scale(score)                    what dq and dk are multiplied by in the end

A soft-cap or a bias adds a NamedTuple, a constexpr field that tells the scores apart, and a branch in these
functions.  Kernels do not change.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common.triton_dtypes import narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Scale(NamedTuple):
    """s_ij = scale * q_i . k_j"""

    scale: Any
    unit: Any


def encode(scale):
    return Scale(scale, scale / math.log(2))


@triton.jit
def scale(score):
    return score.scale


@triton.jit
def unit(score):
    return score.unit


@triton.jit
def orient(score, q):
    return narrow(tl.where(score.scale < 0, -1.0, 1.0) * q.to(tl.float32), q.dtype)


@triton.jit
def logits(score, s, i, j):
    return s


@triton.jit
def logits_grad(score, ds, s, i, j):
    return ds
