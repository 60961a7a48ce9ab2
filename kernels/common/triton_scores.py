"""What happens to a logit between q . k and the softmax, and its derivative.

A kernel forms the raw product s = q . k and asks

    logits(score, s, place, i, j)      what is done to each product; a logit is  factor * logits
    factor(score)                      a number; all there is to plain scaling, where it melts into
                                       the softmax's subtraction
    logits_grad(score, ds, s)          from gradients at the logits to gradients at  scale * products
    scale(score)                       what dq and dk are multiplied by in the end
    orient(score, q)                   q with the sign that makes factor >= 0
    score.MAY_HIDE                     whether a logit may be -inf, which hides a pair as a mask does

A further rule adds a field, None where it is absent, and a branch in these functions.  Kernels do not
change.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common import triton_rows as rows
from fastattn.kernels.common import triton_terms as terms
from fastattn.kernels.common.triton_dtypes import narrow


class Score(NamedTuple):
    """s_ij = softcap * tanh(scale * q_i . k_j / softcap) + bias_ij + bias2_ij"""

    scale: Any
    is_negative: Any  # constexpr, since orienting q costs registers in which it must be held
    softcap: Any
    bias: Any
    bias2: Any
    floor: Any  # of rows that keep their greatest logits, or None
    NUM_BIASES: Any  # constexpr
    IS_SCALE: Any  # constexpr: scaling is all
    MAY_HIDE: Any


class Floor(NamedTuple):
    """Of a row are kept the logits above ``value``, and those equal to it of the keys up to ``last``; triton_rows."""

    value: Any
    last: Any  # the bits of an int32


def encode(scale, softcap=0.0, bias=None, bias2=None, keeps_some=False):
    """A call that keeps some logits gets its ``floor`` when it is known."""
    num_biases = (bias is not None) + (bias2 is not None)
    is_scale = not softcap and not num_biases and not keeps_some
    return Score(
        scale, tl.constexpr(is_scale and scale < 0), softcap or None, bias, bias2, None,
        *map(tl.constexpr, (num_biases, is_scale, num_biases > 0 or keeps_some)),
    )  # fmt: skip


@triton.jit
def factor(score):
    return score.scale if score.IS_SCALE else 1.0


@triton.jit
def scale(score):
    return score.scale


@triton.jit
def orient(score, q):
    return narrow(-q.to(tl.float32), q.dtype) if score.is_negative else q


@triton.jit
def logits(score, s, place, i, j):
    if not score.IS_SCALE:
        s = s * score.scale
        if score.softcap is not None:
            s = score.softcap * _tanh(s / score.softcap)
        if score.NUM_BIASES >= 1:
            s += terms.value(score.bias, place, i, j)
        if score.NUM_BIASES == 2:
            s += terms.value(score.bias2, place, i, j)
        if score.floor is not None:
            s = _kept(score.floor, s, place, i, j)
    return s


@triton.jit
def _kept(floor, x, place, i, j):
    is_row, none = i < place.Nq, tl.zeros_like(i)
    value = tl.load(rows.place(floor.value, place.b, place.h, i, none), mask=is_row, other=0.0)
    last = tl.load(rows.place(floor.last, place.b, place.h, i, none), mask=is_row, other=0.0)
    beyond = j > last.to(tl.int32, bitcast=True)
    return tl.where((x < value) | ((x == value) & beyond), float("-inf"), x)


@triton.jit
def logits_grad(score, ds, s):
    if score.softcap is not None:
        t = _tanh(s * score.scale / score.softcap)
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def _tanh(x):
    """To a few units in the last place, near 0 too: there by the odd polynomial of Cephes' tanhf."""
    y = x * x
    near = 2.06390887954e-2 + y * -5.70498872745e-3
    near = 1.33314422036e-1 + y * (-5.37397155531e-2 + y * near)
    near = x + x * y * (-3.33332819422e-1 + y * near)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(y < 0.390625, near, tl.where(x < 0, -far, far))
