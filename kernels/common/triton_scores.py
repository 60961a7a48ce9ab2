"""What happens to a logit between q . k and the softmax, and its derivative.

A kernel forms the raw product s = q . k and asks

    logits(score, s, i, j)           what is done to each product; a logit is  factor * logits
    factor(score)                    a number; all there is to plain scaling, where it melts into
                                     the softmax's subtraction
    logits_grad(score, ds, s, i, j)  from gradients at the logits to gradients at  scale * products
    scale(score)                     what dq and dk are multiplied by in the end
    orient(score, q)                 q with the sign that makes factor >= 0

A soft-cap or a bias adds a NamedTuple, a constexpr field that tells the scores apart, and a branch
in these functions.  Kernels do not change.
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
